"""Inspection: find out what can be pruned of a model, before any data is seen."""
