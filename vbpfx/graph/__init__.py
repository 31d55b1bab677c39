"""Capture models as graphs whose nodes know their shapes."""
