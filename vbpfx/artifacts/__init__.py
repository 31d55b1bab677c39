"""Artifacts: save and load pruned networks as folders, with their graphs as JSON."""
