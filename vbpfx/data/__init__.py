"""Data: from folders, arrays and texts to the arguments of a forward call."""
