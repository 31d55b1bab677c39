"""The runtimes for deploying pruned networks, one adapter per file. Their packages are imported only when used."""
