"""The dependency analysis: what must be narrowed together."""
