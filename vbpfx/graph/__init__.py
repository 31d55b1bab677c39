"""Models as graphs whose nodes know their shapes."""
