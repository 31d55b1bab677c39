"""Planning: make a plan from activation statistics and a budget."""
