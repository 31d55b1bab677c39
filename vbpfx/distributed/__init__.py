"""Distributed runs: one process, or several that share the data."""
