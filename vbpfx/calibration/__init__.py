"""Calibration: gather activation statistics by running data through an instrumented graph."""
