"""Dense against pruned on data, with labels or without."""
