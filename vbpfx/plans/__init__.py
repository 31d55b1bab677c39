"""Plans: data that describes which blocks are narrowed, and how."""
