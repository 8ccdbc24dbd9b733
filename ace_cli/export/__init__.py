"""Other forms of a finished checkpoint: folder in, folder out."""
