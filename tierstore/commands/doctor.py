"""`python -m tierstore doctor`: what works on this machine, what limits it, and how fast its links are."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from tierstore.commands.showing import print_json, remarks, results, table
from tierstore.machine.diagnosis import Diagnosis, diagnose
from tierstore.machine.limits import least_memory
from tierstore.sizes import format_size

_EPILOG = """\
It takes a few seconds. With --disk, a file of up to 256 MiB (a quarter of the free space at most) is written into the
directory and read; it has no name and is gone however the command ends.

example: tierstore doctor --disk /nvme

exit code: 0 nothing is wrong, 1 something is, and the problems say what
"""


def add_command(commands: Any) -> None:
    """Add `doctor` to the subparsers of `python -m tierstore`."""
    parser = commands.add_parser(
        "doctor",
        help="what works here: devices, backends, limits, and the speed of each link",
        description="Show versions, devices, backends, limits on memory, and the measured bandwidth of each link.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--disk", type=Path, metavar="DIR", help="measure the disk of this directory too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show the diagnosis; 0 if there is no problem, else 1."""
    with remarks().status("measuring"):  # shown on a terminal only
        found = diagnose(arguments.disk)
    if arguments.json:
        print_json(asdict(found))
    else:
        _show(found, results())
    return 1 if found.problems else 0


def _show(found: Diagnosis, console: Console) -> None:
    console.print(", ".join(f"{name} {version}" for name, version in found.versions.items()), markup=False)
    for device in found.devices:
        memory = f", {format_size(device.nbytes)}" if device.nbytes is not None else ""
        console.print(f"device {device.name}{memory}: {'works' if device.works else 'does not work'}", markup=False)
    rows = [(backend.name, backend.target, backend.distribution, backend.problem or "ok") for backend in found.backends]
    console.print(table("backends", ("backend", "class", "from", "state"), rows, left=4))
    extras = [(extra.name, ", ".join(extra.missing) or "none", extra.command if extra.missing else "") for extra in found.extras]
    if extras:
        console.print(table("extras", ("extra", "missing packages", "brought by"), extras, left=3))
    limits = [
        (limit.name, "none" if limit.nbytes is None else format_size(limit.nbytes), _used(limit.used), limit.source)
        for limit in found.limits
    ]
    console.print(table("limits on memory", ("limit", "bytes", "used", "said by"), limits))
    least = least_memory(found.limits)
    console.print("no limit on memory is known" if least is None else f"the lowest of them is {format_size(least)}")
    if found.direct_io is not None:
        console.print(f"direct I/O: {'possible' if found.direct_io else 'refused'}")
    links = [(link.name, "-" if link.rate is None else f"{format_size(int(link.rate))}/s", link.remark) for link in found.links]
    console.print(table("links", ("link", "bandwidth", "remark"), links))
    for problem in found.problems:
        console.print(f"problem: {problem}", markup=False)


def _used(nbytes: int | None) -> str:
    return "-" if nbytes is None else format_size(nbytes)
