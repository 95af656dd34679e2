"""Training: recipes, one step for all trainings, balance, checkpoints, data, held-out loss."""
