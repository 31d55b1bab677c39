"""Export pruned graphs to the formats that deployment runtimes read."""
