"""Reconstruction, block after block: choose neurons and fit layers on what the narrowed network computes."""
