"""`python -m tierstore verify` and `repair`: looks through a disk store, or puts it right."""

from __future__ import annotations

import argparse
from typing import Any

from tierstore.commands.showing import results
from tierstore.maintenance import Inspection, repair, verify
from tierstore.sizes import format_size


def add_command(commands: Any) -> None:
    """Add `verify` and `repair` to the subparsers of `python -m tierstore`."""
    for name, act in (("verify", verify), ("repair", repair)):
        command = commands.add_parser(name, help=(act.__doc__ or "").splitlines()[0], description=act.__doc__)
        command.add_argument("path", help="the directory of a disk store")
        command.set_defaults(run=run, act=act)


def run(arguments: argparse.Namespace) -> int:
    """Look through a store, or put it right; 0 if nothing was wrong, 1 if something was, 2 if there is no store to look at."""
    console = results()
    inspection: Inspection = arguments.act(arguments.path)
    for finding in inspection.findings:
        console.print(f"{finding.key!a} in {finding.file}: {finding.problem}", markup=False)
    wrong = f"{len(inspection.findings)} findings" if inspection.findings else "nothing wrong"
    console.print(f"{inspection.values} sound values, {format_size(inspection.nbytes)}; {wrong}", markup=False)
    return 0 if inspection.sound else 1
