"""Where texts come from, one file per source: each is offered as ``calib=NAME`` and as ``eval=NAME``."""
