"""From statistics and a budget to a plan."""
