"""`python -m tierstore`: what can be tried from a shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from tierstore import demo
from tierstore.errors import BackendError
from tierstore.maintenance import Inspection, repair, verify
from tierstore.sizes import format_size


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 for success, 1 for a check that failed, 2 for one that could not run."""
    parser = argparse.ArgumentParser(prog="python -m tierstore", description="A tiered tensor store for PyTorch.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.add_command(commands)
    for name, act in (("verify", verify), ("repair", repair)):
        command = commands.add_parser(name, help=(act.__doc__ or "").splitlines()[0], description=act.__doc__)
        command.add_argument("path", help="the directory of a disk store")
        command.set_defaults(run=_maintain, act=act)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


def _maintain(arguments: argparse.Namespace) -> int:
    """Look through a store, or put it right; 0 if nothing was wrong, 1 if something was, 2 if there is no store to look at."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        inspection: Inspection = arguments.act(arguments.path)
    except BackendError as error:
        console.print(str(error), markup=False)
        return 2
    for finding in inspection.findings:
        console.print(f"{finding.key!a} in {finding.file}: {finding.problem}", markup=False)
    wrong = f"{len(inspection.findings)} findings" if inspection.findings else "nothing wrong"
    console.print(f"{inspection.values} sound values, {format_size(inspection.nbytes)}; {wrong}", markup=False)
    return 0 if inspection.sound else 1


if __name__ == "__main__":
    sys.exit(main())
