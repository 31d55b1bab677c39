"""Activation statistics: an instrumented graph, and the loop that runs data through it."""
