"""Training what pruning kept, with the pruned positions fixed; one file per way."""
