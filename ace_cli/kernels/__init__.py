"""What touches every element of a large matrix: selection, threads over its rows, loops compiled for a CPU."""
