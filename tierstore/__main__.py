"""`python -m tierstore`, or `tierstore`: what can be done from a shell."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tierstore.commands import demo, doctor, generate, inspect, maintain, plan
from tierstore.commands.showing import remarks
from tierstore.errors import TierStoreError

_EPILOG = """\
`tierstore COMMAND --help` says more, with an example.

exit code of every command: 0 for success, 1 for a check that failed, 2 if it could not run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 for success, 1 for a check that failed, 2 for one that could not run."""
    parser = argparse.ArgumentParser(
        prog="tierstore",
        description="A tiered tensor store for PyTorch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (demo, plan, inspect, doctor, generate, maintain):
        module.add_command(commands)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has gone, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TierStoreError, OSError) as error:
        remarks().print(f"tierstore: {error}", markup=False)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
