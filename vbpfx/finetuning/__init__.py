"""Distillation from the dense network."""
