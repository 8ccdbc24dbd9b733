"""The facts of a run: typed and versioned, then shown."""
