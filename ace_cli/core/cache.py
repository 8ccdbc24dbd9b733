"""Where what is made once and used again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$ACE_PRUNE_CACHE, or ``ace-prune`` under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ace-prune"
    return Path(os.environ.get("ACE_PRUNE_CACHE", default))
