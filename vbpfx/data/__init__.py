"""Read data from folders, arrays and texts, and convert it to the arguments of a forward call."""
