"""Looking at a model at work: which experts are picked."""
