"""Importance scores, one file each. Higher = keep."""
