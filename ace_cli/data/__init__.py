"""Text: documents from files and the hub, text a model writes, and the windows that calibration draws from them."""
