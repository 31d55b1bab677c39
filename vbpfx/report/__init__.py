"""What a pruned network is reported to be: figures, plots, a page."""
