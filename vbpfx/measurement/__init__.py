"""Measure latency per block and per runtime, and how much the output depends on each block."""
