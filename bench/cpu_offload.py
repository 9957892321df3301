"""A decoder whose weights do not fit into memory, on the CPU: tierstore against its peers and against the machine's limits.

    python bench/cpu_offload.py                                                          # 2 GiB of weights; as root
    python bench/cpu_offload.py --size 256MiB --budgets 25 75 --tokens 1 --rounds 2      # quick
    python bench/cpu_offload.py --contenders tierstore accelerate-max mmap --json raw.json

Each contender is a process in a memory cgroup of its own, which counts page cache. Its cap is the budget, that is a share of
the weights' bytes, plus an allowance for interpreter, libraries and activations, measured once for each family of contenders.
The contenders take turns: round r runs one pass of each before round r + 1 begins, a different one first each time. Who
waits is stopped by a signal, so it cannot read ahead. In every round the disk is read once without any of them.

- plain:            all weights in memory, no cap: the time of the arithmetic alone. A bound, no contender;
- unmanaged:        the same while threads read, around the page cache, the bytes that cannot be there; neither waits for the other,
                    nothing is kept in order, no cap. No contender: what doing both at once costs on this machine;
- tierstore:        `tiered(model, cpu=budget, disk=...)`;
- accelerate-disk:  `disk_offload`, which keeps nothing;
- accelerate-max:   `infer_auto_device_map(max_memory={"cpu": budget})` and `dispatch_model`: keeps what fits. Where
                    it is killed when told the whole budget, it is told less, and the notes say so;
- diffusers-leaf:   `apply_group_offloading` to disk, layer by layer; keeps nothing. `diffusers-block`, a block at a time, has to
                    be asked for, to keep the default run short;
- airllm:           a layer after the other, the next one read in a thread; keeps nothing;
- mmap:             the plain model over a map of a safetensors file: what the page cache keeps.

The bound of a row is the longer of the plain pass and of reading the bytes that cannot be there yet, the touched weights less
the budget, at the speed of O_DIRECT reads measured in the same row. Cells are medians over rounds, divided by the bound. "90 %
sure" is where the median of ever so many rounds would be, each divided by the bound in that round, in nine cases of ten.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offload_children import Child, Fate, allowance_of, available_bytes, forget_pages, once, refuse_missing, start, survives
from offload_contenders import CONTENDERS, Task
from offload_model import Shape
from offload_rows import TABLES, Row
from raw_speed import RawReader
from rich.console import Console
from turns import turned

from tierstore import format_size, parse_size

FIRST_WARM_UPS, LATER_WARM_UPS = 2, 1


class Bench:
    """One run: what was asked for, the files, and what has been found out so far."""

    def __init__(self, options: argparse.Namespace, place: Path, console: Console) -> None:
        self.options, self.place, self.console = options, place, console
        self.shape = Shape.of(options.size)
        self.names = ["plain", *(name for name in CONTENDERS if name in options.contenders and name != "plain")]
        self.digests: dict[int, str] = {}
        self.allowances: dict[str, int] = {}
        self.out: dict[str, str] = {}
        self.notes: dict[str, None] = {}
        self.rows: list[Row] = []

    def task(self, action: str, name: str, budget: int = 0) -> Task:
        return Task(action, name, self.shape, budget, str(self.place), tuple(self.options.tokens))

    def note(self, name: str, fate: Fate, when: str) -> str:
        """Keep a fate's story for the notes below the tables; return its short form."""
        self.notes[f"{name}, {when}: {fate.story}"] = None
        return fate.short

    def prepare(self) -> None:
        """Write the files of every contender, and measure the allowance of every family."""
        for name in self.names:
            self.console.print(f"preparing {name}", style="dim")
            try:
                refuse_missing(name)
                digests = once(self.task("prepare", name), None)[0]["digests"]
                self.digests = self.digests or dict(zip(self.options.tokens, digests, strict=True))
                family = CONTENDERS[name].family
                if CONTENDERS[name].capped and family not in self.allowances:
                    self.allowances[family] = allowance_of(self.task("calibrate", name))
            except Fate as fate:
                if name == "plain":
                    raise
                self.out[name] = self.note(name, fate, "preparing")

    def limit(self, name: str, budget: int) -> int | None:
        kind = CONTENDERS[name]
        return budget + self.allowances[kind.family] if kind.capped else None

    @contextmanager
    def children(self, budget: int, when: str, fates: dict[str, str]) -> Iterator[dict[str, Child]]:
        """Start all contenders; those that fail get a fate."""
        names = [name for name in self.names if name not in fates]
        tasks = {name: self.affordable(name, budget, when) for name in names}
        self.warn_of_memory(names, budget)
        forget_pages(self.place)
        with ExitStack() as stack:
            living = {}
            for name, task in tasks.items():
                living[name] = child = start(task, self.limit(name, budget))
                stack.callback(child.close)
                try:
                    child.answer()
                except Fate as fate:
                    if name == "plain":
                        raise
                    fates[name] = self.note(name, fate, f"{when}, setting up")
                    del living[name]
            forget_pages(self.place)
            yield living

    def affordable(self, name: str, budget: int, when: str) -> Task:
        """Return a contender's task with as much of the budget as it can be told without being killed; tried where it has a choice."""
        shares = CONTENDERS[name].shares
        for share in shares:
            task = self.task("run", name, int(budget * share))
            if len(shares) == 1 or survives(task, self.limit(name, budget)):
                break
        if share < 1:
            story = f"killed when told the whole budget, so it is told {share:.0%} of it"
            self.note(name, Fate("less", story), when)
        return task

    def warn_of_memory(self, names: list[str], budget: int) -> None:
        need = sum(self.limit(name, budget) or self.shape.bytes for name in names)
        if need > available_bytes():
            text = f"warning: all caps together are {format_size(need)}, but {format_size(available_bytes())} are available: the kernel may"
            self.console.print(f"{text} take memory from contenders within their caps; run fewer at a time (--contenders)", style="red")

    def run(self) -> None:
        """Measure every row; contenders stay alive through the rows of one budget."""
        for percent in self.options.budgets:
            budget = self.shape.bytes * percent // 100
            fates = dict(self.out)
            with RawReader(self.task("run", "plain").source) as disk, self.children(budget, f"{percent} %", fates) as living:
                for tokens in self.options.tokens:
                    row = Row(percent, tokens, budget, self.shape.touched(tokens), self.digests[tokens], fates=fates.copy())
                    self.run_row(row, living, disk, FIRST_WARM_UPS if tokens == self.options.tokens[0] else LATER_WARM_UPS)
                    fates |= row.fates
                    self.rows.append(row)

    def run_row(self, row: Row, living: dict[str, Child], disk: RawReader, warm_ups: int) -> None:
        for number in range(-warm_ups, self.options.rounds):
            if number == 0:
                for child in living.values():
                    child.cap.restart()
            if number >= 0:
                row.raw.append(disk.measure())
            for name in turned(list(living), number):
                told = self.attempt(name, row, living, f"pass {row.tokens}")
                if told and number >= 0:
                    row.passes.setdefault(name, []).append(told)
        row.peaks |= {name: (child.cap.peak, child.cap.anonymous) for name, child in living.items()}
        self.check(row, living)
        figures = ", ".join(f"{name} {row.cell(name)}" for name in self.names)
        self.console.print(f"{row.percent} %, {row.tokens} tokens: bound {row.bound:.3f} s; {figures}", style="dim")

    def check(self, row: Row, living: dict[str, Child]) -> None:
        """Find out how wrong wrong outputs are."""
        for name in list(living):
            if any(told["digest"] != row.digest for told in row.passes[name]):
                told = self.attempt(name, row, living, f"differ {row.tokens}")
                if told:
                    text = f"differs from plain by up to {told['difference']:.3g} with {row.tokens} tokens"
                    self.note(name, Fate("WRONG", text), f"{row.percent} %")

    def attempt(self, name: str, row: Row, living: dict[str, Child], wish: str) -> dict[str, Any] | None:
        """Ask a child; if it dies or fails it is out for the rest of this budget."""
        try:
            return living[name].ask(wish)
        except Fate as fate:
            if name == "plain":
                raise
            row.fates[name] = self.note(name, fate, f"{row.percent} %, {row.tokens} tokens")
            del living[name]
            return None

    def as_json(self) -> dict[str, Any]:
        return {
            "shape": asdict(self.shape),
            "bytes": self.shape.bytes,
            "warm_ups": [FIRST_WARM_UPS, LATER_WARM_UPS],
            "allowances": self.allowances,
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
        }


# -- what is printed ----------------------------------------------------------------------------------------------------


def show(bench: Bench) -> None:
    contenders = [name for name in bench.names if name != "plain"]
    for make in TABLES:
        bench.console.print(make(bench.rows, contenders))
    shape = bench.shape
    bench.console.print(f"{format_size(shape.bytes)} of bfloat16 weights: {shape.layers} layers of width {shape.width}")
    warm_ups = f"{FIRST_WARM_UPS} warm-up passes at the first number of tokens of a budget, {LATER_WARM_UPS} at each other"
    bench.console.print(f"medians of {bench.options.rounds} rounds, after {warm_ups}")
    for row in bench.rows:
        if row.disturbance:
            bench.console.print(row.disturbance, style="red")
    allowed = ", ".join(f"{family} {format_size(size)}" for family, size in bench.allowances.items())
    bench.console.print(f"cap = budget + allowance: {allowed}")
    for note in bench.notes:
        bench.console.print(f"- {note}", markup=False)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="2GiB", help="bytes of all weights, about (default: %(default)s)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 25, 50, 75, 90], help="percents of the weights' bytes")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512], help="tokens in a pass")
    parser.add_argument("--rounds", type=int, default=3, help="measured passes of each contender in a row (default: %(default)s)")
    names = [name for name in CONTENDERS if name != "plain"]
    default = [name for name in names if name != "diffusers-block"]
    parser.add_argument("--contenders", nargs="+", choices=names, default=default, help="default: all but diffusers-block")
    parser.add_argument("--scratch", default="/var/tmp", help="a directory on the disk to measure (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the raw figures to this file")
    return parser.parse_args()


def leave(number: int, frame: object) -> None:
    """Exit with all clean-up; a second signal, as a process group often gets, must not break that off."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    options = parse_options()
    console = Console(width=200, highlight=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cpu-offload-", dir=options.scratch) as place:
        bench = Bench(options, Path(place), console)
        try:
            bench.prepare()
            bench.run()
        finally:
            if options.json:
                options.json.write_text(json.dumps(bench.as_json(), indent=1))
        show(bench)
    console.print(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
