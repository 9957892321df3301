"""`python -m tierstore plan`: what a checkpoint's model would do under budgets, before anything is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tierstore.commands.plan_tables import GROUPINGS, as_json, show
from tierstore.commands.quiet import quiet_libraries
from tierstore.commands.showing import dtype, print_json, rate, remarks, results, size
from tierstore.errors import CheckpointError
from tierstore.outlook.forecast import Rooms
from tierstore.outlook.planned import plan_checkpoint
from tierstore.outlook.speeds import Told

_EPILOG = """\
Only headers and the config are read. The plan is the one that the library would make for a pass that uses every weight once,
as each step of decoding does; seconds are the least that such a step can take, with everything hidden behind the busiest
link or computing. Activations, and the filling of the caches, are not counted.

With --gpu the plan is for an accelerator, which need not be here if --gpu-bandwidth says how fast it is fed (--device cpu:
for a tier called gpu in RAM). Without it, the CPU computes in the tier cpu. Speeds that are not given are measured here.

example: tierstore plan /models/llama --gpu 8GiB --cpu 32GiB --dtype bfloat16
         tierstore plan /models/llama --gpu 24GiB --gpu-bandwidth 25GB --disk-bandwidth 3GB --json

exit code: 0 there is a plan, 2 there is none: a budget below the largest weight, or a checkpoint that cannot be used
"""


def add_command(commands: Any) -> None:
    """Add `plan` to the subparsers of `python -m tierstore`."""
    parser = commands.add_parser(
        "plan",
        help="what goes where, bytes and seconds per token, and what more memory would buy",
        description="Say what a checkpoint's model would do under budgets: what rests where, what moves, and how long that takes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="DIR", help="a Hugging Face directory, or safetensors or torch.save files")
    add("--gpu", type=size, metavar="SIZE", help="budget of the accelerator's memory for weights, such as 8GiB")
    add("--cpu", type=size, metavar="SIZE", help="budget of RAM, such as 32GiB")
    add("--disk", type=Path, metavar="DIR", help="measure the disk of this directory (default: that of the checkpoint)")
    add("--dtype", type=dtype, metavar="DTYPE", help="cast floating weights on the way up (default: as the config says)")
    add("--device", metavar="DEV", help="where to compute, such as cuda or cpu (default: an accelerator with --gpu, else the CPU)")
    add("--disk-bandwidth", type=rate, metavar="RATE", help="bytes per second from the disk, such as 3GB (default: measured)")
    add("--gpu-bandwidth", type=rate, metavar="RATE", help="bytes per second into the accelerator, such as 25GB (default: measured)")
    add("--by", choices=GROUPINGS, default="group", help="rows of the table (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show the plan; what cannot be planned raises."""
    rooms = _rooms(arguments)
    told = Told(arguments.disk_bandwidth, arguments.gpu_bandwidth, arguments.disk, arguments.device)
    with remarks().status("reading headers, measuring and planning"), quiet_libraries():
        outlook = plan_checkpoint(Path(arguments.checkpoint).expanduser(), rooms, told, arguments.dtype)
    if arguments.json:
        print_json({"checkpoint": arguments.checkpoint, **as_json(outlook, arguments.by)})
    else:
        show(outlook, arguments.by, arguments.checkpoint, results())
    return 0


def _rooms(arguments: argparse.Namespace) -> Rooms:
    sizes = {name: getattr(arguments, name) for name in ("gpu", "cpu") if getattr(arguments, name) is not None}
    if not sizes:
        raise CheckpointError("a plan needs a budget; give --gpu SIZE, --cpu SIZE, or both")
    if "gpu" not in sizes and arguments.device not in (None, "cpu"):
        raise CheckpointError(f"computing on {arguments.device} takes place in the tier gpu; give --gpu SIZE as well")
    return Rooms(sizes, "gpu" not in sizes or arguments.device == "cpu")
