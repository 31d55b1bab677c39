"""The command line, with one file per command."""

from vbpfx.cli.root import app, main

__all__ = ["app", "main"]
