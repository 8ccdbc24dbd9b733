"""The four commands: arguments in, exit code out."""
