"""ace-prune: make a language model sparse in one command, without retraining, and prove what it did."""

from __future__ import annotations

__version__ = "0.1.0"
