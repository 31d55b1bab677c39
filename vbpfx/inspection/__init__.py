"""What could be pruned of a model, before any data."""
