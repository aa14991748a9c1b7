"""Training: data, recipes, the loop, checkpoints."""
