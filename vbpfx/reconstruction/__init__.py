"""Block after block: neurons chosen and layers refitted on what the narrowed network computes."""
