"""``python -m ace_cli`` is ``ace-prune``."""

from ace_cli.cli.prune import main

if __name__ == "__main__":
    main()
