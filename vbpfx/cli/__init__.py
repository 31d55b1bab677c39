"""The command line: one file a command."""

from vbpfx.cli.root import app, main

__all__ = ["app", "main"]
