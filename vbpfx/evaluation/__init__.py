"""Evaluation: compare the pruned network with the dense one on data, with or without labels."""
