"""Training: the one loop, its data and its measure (held-out loss)."""
