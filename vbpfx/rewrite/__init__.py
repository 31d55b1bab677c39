"""A plan carried out, and proved right."""
