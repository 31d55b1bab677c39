"""Models by name, and models without weights."""
