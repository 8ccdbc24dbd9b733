"""Roundings, ``quantize=NAME``: one file each."""
