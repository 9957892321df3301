"""A coverage-guided fuzzer (atheris, libFuzzer) over the targets: `python -m tests.fuzz --inputs 1000000`, in a few minutes.

Each target has a process of its own, which ends with the number of inputs that it was to take, or at the first failure; then
the input is written to a file whose name is printed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

import tierstore.errors  # noqa: F401  (what is there before the targets are imported is not watched for branches)

with atheris.instrument_imports(include=["tierstore.backends"], enable_loader_override=False):
    from tests.disk.conftest import MEMORY
    from tests.fuzz.targets import TARGETS, folder_for

_SLOWEST = 20  # seconds for one input, after which it counts as a hang
_LONGEST = 65536  # bytes


def fuzz(name: str, inputs: int, seed: int, base: str) -> None:
    """Fuzz one target in this process; does not return."""
    folder = Path(base)
    target = TARGETS[name](folder_for(folder, "target"))
    corpus = folder_for(folder, "corpus")
    for number, data in enumerate(target.seeds()):
        (corpus / str(number)).write_bytes(data)
    options = (f"-runs={inputs}", f"-seed={seed}", f"-timeout={_SLOWEST}", f"-max_len={_LONGEST}", "-rss_limit_mb=2048", "-verbosity=1")
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={Path.cwd()}/fuzz-{target.name.replace(' ', '-')}-", str(corpus)], target)
    tracemalloc.start()
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        fuzz(arguments.targets[0], arguments.inputs, arguments.seed, arguments.child)
    whole = sum(TARGETS[name].share for name in arguments.targets)
    counts = {name: -(-arguments.inputs * TARGETS[name].share // whole) for name in arguments.targets}
    print("| target | inputs | branches reached | seconds | outcome |\n|---|---|---|---|---|", flush=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = list(pool.map(lambda name: _run(name, counts[name], arguments.seed), counts))
    print(f"{sum(done)} of {len(done)} targets failed")
    return min(1, sum(done))


def _run(name: str, inputs: int, seed: int) -> bool:
    """Fuzz one target in a child process and print its row; True if it failed."""
    started = time.perf_counter()
    with TemporaryDirectory(dir=MEMORY) as base:
        command = [sys.executable, "-m", "tests.fuzz", "--child", base, "--targets", name, "--inputs", str(inputs), "--seed", str(seed)]
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    ended = re.search(r"Done (\d+) runs", child.stderr)
    reached = re.findall(r"cov: (\d+)", child.stderr)
    failed = child.returncode != 0 or ended is None
    printed = (child.stdout, child.stderr)  # what was raised goes to the one, libFuzzer's log to the other
    tail = "; ".join(line for text in printed for line in text.strip().splitlines()[-12:])
    outcome = f"exit {child.returncode}: {tail}" if failed else "no failure"
    seconds = time.perf_counter() - started
    print(f"| {name} | {ended[1] if ended else '?'} | {reached[-1] if reached else '?'} | {seconds:.0f} | {outcome} |", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
