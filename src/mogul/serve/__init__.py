"""The engine: a checkpoint becomes the fastest way to generate from it on one machine."""
