"""How much each slot must lose, one file per rule."""
