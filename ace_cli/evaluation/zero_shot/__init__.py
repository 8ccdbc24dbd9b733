"""Zero-shot tasks through lm-eval: its tasks, prompts, metrics and bookkeeping; our streamed model answers."""
