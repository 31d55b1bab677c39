"""Report on a pruned network: figures, plots, and an HTML page."""
