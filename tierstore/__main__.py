"""`python -m tierstore`: what can be tried from a shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tierstore import demo


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 for success, 1 for a check that failed, 2 for one that could not run."""
    parser = argparse.ArgumentParser(prog="python -m tierstore", description="A tiered tensor store for PyTorch.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.add_command(commands)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
