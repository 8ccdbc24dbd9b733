"""What the processes of test_killed.py run. No pytest here: they start from a server that has imported everything."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def prune(arguments: list[str], log: Path) -> None:
    """ace-prune as a user starts it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    import torch

    from ace_cli.cli.prune import main

    torch.set_num_threads(1)
    sys.argv = ["ace-prune", *arguments]
    main()
