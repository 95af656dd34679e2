"""Slow, obvious, differentiable: what every other backend must agree with."""
