"""Refitting the weights that stay, one file per method."""
