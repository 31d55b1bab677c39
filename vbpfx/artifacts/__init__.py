"""Pruned networks in folders, and graphs as JSON."""
