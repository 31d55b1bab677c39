"""The outputs of networks, and measures of the difference between the outputs of two networks."""
