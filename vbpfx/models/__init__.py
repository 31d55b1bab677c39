"""Load models by name, and models whose weights stay in files."""
