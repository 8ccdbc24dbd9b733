"""``ace-prune``, which is ``python -m ace_cli``."""

import sys


def main() -> None:
    """The command. Until it is imported, nothing in it can say in one line that Ctrl-C was pressed."""
    try:
        from ace_cli.cli.prune import main as prune
    except KeyboardInterrupt:
        print("ace-prune: Interrupted. Nothing was begun.", file=sys.stderr)
        sys.exit(2)
    prune()


if __name__ == "__main__":
    main()
