"""Apply a plan to a network, and verify the result."""
