"""Where the numbers of a run may also go: one file per tracker, each through its own library."""
