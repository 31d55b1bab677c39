"""``python -m vbpfx``."""

from vbpfx.cli import main

main()
