"""Storage: files that are written completely or not at all, and never with pickle."""
