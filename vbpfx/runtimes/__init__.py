"""Runtimes that pruned networks are deployed in, one adapter a file; a runtime's package is imported when it is asked for."""
