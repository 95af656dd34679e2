"""Fast experts on the processor, from torch operators alone."""
