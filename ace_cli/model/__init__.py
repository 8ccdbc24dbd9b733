"""Models as files: where they come from, how their blocks are read, run and written one at a time."""
