"""How a run is doing, and what is done about it."""
