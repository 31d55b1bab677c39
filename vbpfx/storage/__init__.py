"""Files: whole or not at all, and never pickle."""
