"""Pure mathematics on tensors: statistics, patterns, metrics, allocations and repairs. No model, no file."""
