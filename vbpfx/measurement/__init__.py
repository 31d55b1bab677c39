"""What is measured: latency per block and per runtime, and what the output loses."""
