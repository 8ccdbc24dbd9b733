"""What a checkpoint is worth: evaluation texts, one file per source, and perplexity."""
