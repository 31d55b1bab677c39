"""Export of pruned graphs to the formats that deployment runtimes read, one adapter a file."""
