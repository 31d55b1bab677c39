"""Plans: what is narrowed, as data."""
