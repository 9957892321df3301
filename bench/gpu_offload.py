"""Models that do not fit into a GPU's memory: tierstore against its peers and against the limits of the machine.

    python bench/gpu_offload.py --json gpu.json                       # all of it; a machine with one GPU
    python bench/gpu_offload.py --quick                               # the rows that matter most, in 9 minutes
    python bench/gpu_offload.py --only decoder --budgets 25 --tokens 1 --contenders mmgp flextensor
    python bench/gpu_offload.py --device cpu --tiny                   # the same logic on the CPU, which shows no speeds
    python bench/gpu_offload.py --show first.json second.json         # tables of earlier runs

First the ceilings: copies between page-locked RAM and the GPU, each way and both at once, and direct reads of the disk. Then a
decoder and a diffusion transformer, random weights in bfloat16, at budgets that are shares of their bytes. Every contender is a
process whose memory on the GPU is capped at the budget and an allowance for activations, measured with one layer. What each
one is told is in `gpu_contenders.py`; those that find no room with the whole budget are told less, and the notes say so:

- plain:            all weights on the GPU: the time of computing alone. A bound, no contender;
- tierstore:        `tiered(model, gpu=budget, cpu=the rest)`;
- accelerate-cpu:   `cpu_offload`, which keeps nothing; accelerate-max: `dispatch_model` with `max_memory`, which keeps what comes first;
- diffusers-block, diffusers-leaf: group offloading with a stream; keeps nothing. With `-record`: `record_stream=True`;
- mmgp:             `offload.all` with a budget;
- flextensor:       `offload` with a share of the GPU's memory.

The bound of a row is the longer of plain's pass and of copying what the budget cannot hold at the speed measured in the same
run. Figures are medians over turns that alternate between plain, tierstore and one peer; a turn is several passes in a row,
each waited for, after one that does not count. Last, three tiers at once: a decoder of 40 GB over GPU, RAM and disk.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from gpu_contenders import PEERS, QUICK, Task
from gpu_models import DecoderShape, DenoiserShape, Shape
from gpu_results import Results, ceilings_from
from gpu_study import Deadline, Plan, Study, told_once
from gpu_tables import show_ceilings, show_rows
from gpu_three import Tiers, run_tiers
from offload_children import Fate
from rich.console import Console

from tierstore import parse_size

PARTS = ("decoder", "dit", "tiers")
TIERS_SECONDS = 180.0  # kept back before the deadline for three tiers

FULL = {
    "only": list(PARTS), "budgets": [10, 25, 50, 75, 90], "tokens": [1, 64, 2048], "dit_tokens": [1024, 4096], "rounds": 5,
    "contenders": list(PEERS), "minutes": None,
    "decoder": (34, 4096, 32, 65536), "dit": (24, 3072, 24),
    "tiers_size": 40 * 10**9, "tiers_gpu": 8 << 30, "tiers_cpu": 16 << 30, "tiers_tokens": [1, 2048], "tiers_rounds": 3,
    "link_bytes": 1 << 30, "disk_bytes": 4 << 30,
}  # fmt: skip
FAST = {
    "only": ["decoder", "tiers"], "budgets": [50], "tokens": [1, 2048], "rounds": 3, "contenders": list(QUICK), "minutes": 9.0,
    "tiers_tokens": [1], "tiers_rounds": 2,
}  # fmt: skip
SMALL = {
    "budgets": [25, 50], "tokens": [1, 8], "dit_tokens": [16], "rounds": 2, "decoder": (6, 256, 4, 1024), "dit": (5, 256, 4),
    "tiers_size": 12 * 10**6, "tiers_gpu": 3 << 20, "tiers_cpu": 4 << 20, "tiers_tokens": [1, 8], "tiers_rounds": 1,
    "link_bytes": 16 << 20, "disk_bytes": 32 << 20,
}  # fmt: skip


class Bench:
    """One run: what was asked for, and what has been found out so far."""

    def __init__(self, options: argparse.Namespace, place: str, console: Console) -> None:
        self.options, self.place, self.console = options, place, console
        self.results = Results(["plain", "tierstore", *options.contenders])
        self.deadline = Deadline(options.minutes)
        self.started = time.monotonic()
        self.shown = 0  # rows

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        self.console.print(f"{minutes}:{seconds:02d} {text}", markup=False, style="dim")

    def save(self) -> None:
        if self.options.json:
            self.results.write(self.options.json)

    def run(self) -> None:
        self.measure_ceilings()
        if "decoder" in self.options.only:
            self.study(DecoderShape(*self.options.decoder), self.options.tokens)
        if "dit" in self.options.only:
            self.study(DenoiserShape(*self.options.dit), self.options.dit_tokens)
        if "tiers" in self.options.only:
            self.three_tiers()

    def measure_ceilings(self) -> None:
        options = self.options
        shape = DecoderShape(*options.decoder)
        disk = options.disk_bytes if "tiers" in options.only else 0
        task = Task("ceilings", "ceilings", shape, options.device, self.place, (), budget=options.link_bytes, ram=disk)
        self.results.ceilings = ceilings_from(told_once(task))
        show_ceilings(self.console, self.results.ceilings)
        self.save()

    def study(self, shape: Shape, tokens: list[int]) -> None:
        options = self.options
        plan = Plan(
            shape=shape,
            tokens=tuple(tokens),
            budgets=tuple(options.budgets),
            rounds=options.rounds,
            device=options.device,
            place=self.place,
            peers=tuple(options.contenders),
            reserve=TIERS_SECONDS if "tiers" in options.only else 0.0,
        )
        try:
            Study(plan, self.results, self.deadline, self.say, self.save).run()
        except Fate as fate:
            story = f"{shape.kind}: plain itself failed: {fate}; --decoder and --dit take smaller models"
            self.results.note(story)
            self.say(story)
        show_rows(self.console, self.results.rows[self.shown :], self.results.contenders)
        self.shown = len(self.results.rows)

    def three_tiers(self) -> None:
        options = self.options
        shape = DecoderShape(*options.decoder).of_bytes(options.tiers_size)
        assert isinstance(shape, DecoderShape)
        budgets = (options.tiers_gpu, options.tiers_cpu)
        tiers = Tiers(shape, *budgets, tuple(options.tiers_tokens), options.tiers_rounds, options.device, self.place, self.deadline)
        run_tiers(tiers, self.results, self.say, self.save)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; what is not given comes from the presets, the smallest one asked for first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, help="parts to run (default: all; the ceilings are always measured)")
    add("--budgets", type=int, nargs="+", help="percents of the weights' bytes (default: 10 25 50 75 90)")
    add("--tokens", type=int, nargs="+", help="tokens in a pass of the decoder (default: 1 64 2048)")
    add("--dit-tokens", type=int, nargs="+", help="tokens in a pass of the diffusion transformer (default: 1024 4096)")
    add("--rounds", type=int, help="turns of each contender in a row (default: 5)")
    add("--contenders", nargs="*", choices=PEERS, help="peers (default: all)")
    add("--minutes", type=float, help="start nothing new after so many minutes (default: no end)")
    add("--decoder", type=int, nargs=4, metavar=("LAYERS", "WIDTH", "HEADS", "VOCABULARY"), help="default: 34 4096 32 65536, 15.9 GB")
    add("--dit", type=int, nargs=3, metavar=("LAYERS", "WIDTH", "HEADS"), help="the diffusion transformer (default: 24 3072 24, 8.2 GB)")
    add("--tiers-size", type=parse_size, help="bytes of the decoder of three tiers (default: 40GB)")
    add("--tiers-gpu", type=parse_size, help="(default: 8GiB)")
    add("--tiers-cpu", type=parse_size, help="(default: 16GiB)")
    add("--tiers-tokens", type=int, nargs="+", help="(default: 1 2048)")
    add("--tiers-rounds", type=int, help="turns in a row of three tiers (default: 3)")
    add("--link-bytes", type=parse_size, help="bytes to copy for a ceiling (default: 1GiB)")
    add("--disk-bytes", type=parse_size, help="bytes of the file to read for a ceiling (default: 4GiB)")
    add("--device", default="cuda", help='"cpu" proves the logic where there is no GPU (default: %(default)s)')
    add("--scratch", default="/var/tmp", help="a directory on the disk to measure and to use (default: %(default)s)")
    add("--quick", action="store_true", help="half of the weights, 1 and 2048 tokens, three tiers, fewer peers; 9 minutes")
    add("--tiny", action="store_true", help="models of a few MB")
    add("--json", type=Path, help="write what is known so far to this file, again and again")
    add("--show", type=Path, nargs="+", metavar="FILE", help="run nothing; print the tables of these files of --json")
    options = parser.parse_args(arguments)
    for preset in (SMALL if options.tiny else {}, FAST if options.quick else {}, FULL):
        for name, value in preset.items():
            if getattr(options, name) is None:
                setattr(options, name, value)
    return options


def leave(number: int, frame: object) -> None:
    """Exit with all clean-up; a second signal, as a process group often gets, must not break that off."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # whoever is killed has printed what was measured
    console = Console(width=200, highlight=False)
    if options.show:
        for file in options.show:
            Results.read(file).show(console)
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    with tempfile.TemporaryDirectory(prefix="gpu-offload-", dir=options.scratch, ignore_cleanup_errors=True) as place:
        bench = Bench(options, place, console)
        try:
            bench.run()
        except Fate as fate:
            console.print(f"nothing can be measured here: {fate}", markup=False, style="red")
            return 1
        finally:
            with suppress(OSError):
                bench.save()
            bench.results.show(console, bench.shown)
    bench.say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
