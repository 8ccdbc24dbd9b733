"""What may be taken out of a model. One file each."""
