"""Time, memory and price of a model on machines, from shapes alone: no torch in this room."""
