"""How fast checkpoints write, with every engine that is here."""
