"""Predictions against what was measured, and the bars they must clear."""
