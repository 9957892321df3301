"""Runs the contenders of `gpu_offload.py` on one model: plain and tierstore take turns with one peer after another.

All at once would need the RAM and the GPU of all together. So for each budget tierstore stays, and peers come one at a
time; each of the figures that are compared comes from turns that alternated. Who waits is stopped by a signal, so that it
can neither copy ahead nor compute. Plain stays all the time where the device has room for it, else it is measured first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caps import Cap
from gpu_contenders import CONTENDERS, Task
from gpu_models import Shape
from gpu_results import Results
from gpu_rows import ALONE, Row
from offload_children import Child, Fate
from turns import turned

from tierstore import format_size

MARGIN = 128 << 20  # bytes beside what one layer was seen to need: blocks that the allocator cannot join
CONTEXT = 1 << 30  # bytes that a process takes of the device before it allocates anything
DISAGREEMENT = 0.02  # of two counts of the same bytes

LATE = Fate("no time", "left out: the time was up (--minutes)")

Say = Callable[[str], None]


class GpuChild(Child):
    """A child process that runs `gpu_child.py`. It ends by a signal: to take a model apart kindly may take a minute.

    `patience`: seconds to wait for an answer.
    """

    program = Path(__file__).with_name("gpu_child.py")
    killed = "killed by the kernel, most likely for want of RAM"

    def __init__(self, task: Task, patience: float = 300.0) -> None:
        super().__init__(task, Cap())
        self.patience = patience

    def close(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()


def told_once(task: Task) -> dict[str, Any]:
    """Return the first answer of a child, which ends."""
    child = GpuChild(task)
    try:
        return child.answer()
    finally:
        child.close()


class Deadline:
    """`minutes` from now on, or no end."""

    def __init__(self, minutes: float | None) -> None:
        self._until = None if minutes is None else time.monotonic() + 60 * minutes

    def passed(self, reserve: float = 0.0) -> bool:
        """True if fewer than `reserve` seconds are left."""
        return self._until is not None and time.monotonic() + reserve > self._until


@dataclass(frozen=True)
class Plan:
    """What is asked of a study; `reserve`: seconds before the deadline that it must leave to others."""

    shape: Shape
    tokens: tuple[int, ...]
    budgets: tuple[int, ...]
    rounds: int
    device: str
    place: str
    peers: tuple[str, ...]
    reserve: float = 0.0


class Study:
    """One model. `save` is called whenever something new is known."""

    def __init__(self, plan: Plan, results: Results, deadline: Deadline, say: Say, save: Callable[[], None]) -> None:
        self.plan, self.results, self.deadline, self.say, self.save = plan, results, deadline, say, save
        self.living: dict[str, GpuChild] = {}
        self.allowances: dict[int, int] = {}
        self.digests: dict[int, str] = {}
        self.resident: dict[int, list[dict[str, Any]]] = {}

    def run(self) -> None:
        """Measure all; raise `Fate` if plain itself does not run."""
        try:
            self.calibrate()
            self.run_plain()
            for percent in self.plan.budgets:
                if self.deadline.passed(self.plan.reserve):
                    self.results.note(f"{self.plan.shape.kind}, {percent} %: left out: the time was up (--minutes)")
                else:
                    self.run_budget(percent)
        finally:
            for name in list(self.living):
                self.end(name)

    def task(self, action: str, name: str, **more: Any) -> Task:
        plan = self.plan
        told: dict[str, Any] = {"tokens": plan.tokens, "allowances": self.allowances} | more
        return Task(action, name, plan.shape, plan.device, plan.place, **told)

    def calibrate(self) -> None:
        needs = told_once(self.task("calibrate", "plain"))["needs"]
        self.allowances = {tokens: need + MARGIN for tokens, need in zip(self.plan.tokens, needs, strict=True)}
        for tokens, allowance in self.allowances.items():
            self.results.allowances[f"{self.plan.shape.kind}, {tokens} tokens"] = allowance

    # -- plain ----------------------------------------------------------------------------------------------------------

    def run_plain(self) -> None:
        """Take plain's outputs and times; it stays if there is room for it beside two others."""
        self.living["plain"] = child = GpuChild(self.task("run", "plain"))
        child.answer()
        for tokens in self.plan.tokens:
            child.ask(f"warm {tokens}")
            self.digests[tokens] = child.ask(f"expect {tokens}")["digest"]
            self.resident[tokens] = [child.ask(f"turn {tokens}") | {"beside": ALONE} for _ in range(self.plan.rounds)]
            seconds = min(told["seconds"] for told in self.resident[tokens])
            self.say(f"{self.plan.shape.kind}, {tokens} tokens: resident {seconds:.4f} s")
        if not self.room_for_all():
            self.results.note(f"{self.plan.shape.kind}: plain was measured first and alone, as the device has no room for it beside others")
            self.end("plain")

    def room_for_all(self) -> bool:
        free, size = self.results.ceilings.free, self.plan.shape.bytes
        caps = 2 * (size * max(self.plan.budgets) // 100 + max(self.allowances.values()))
        return free == 0 or size + max(self.allowances.values()) + caps + 3 * CONTEXT <= free

    # -- one budget -----------------------------------------------------------------------------------------------------

    def run_budget(self, percent: int) -> None:
        rows = [self.row(percent, tokens) for tokens in self.plan.tokens]
        self.results.rows += rows
        self.launch("tierstore", rows)
        self.duel(rows, ALONE)
        for peer in self.plan.peers:
            groups = [[row] for row in rows] if CONTENDERS[peer].lone else [rows]
            for group in groups:
                self.run_peer(peer, group)
        self.see_traffic("tierstore", rows)
        self.compare_counts(rows)
        self.end("tierstore")

    def row(self, percent: int, tokens: int) -> Row:
        shape, budget = self.plan.shape, self.plan.shape.bytes * percent // 100
        row = Row(
            model=f"{shape.kind}, {format_size(shape.bytes)}",
            percent=percent,
            tokens=tokens,
            budget=budget,
            cap=budget + self.allowances[tokens],
            touched=shape.touched(tokens),
            pair=shape.pair,
            rate=self.results.ceilings.best,
            digest=self.digests[tokens],
        )
        if "plain" not in self.living:
            row.passes["plain"] = self.resident[tokens]
        return row

    def run_peer(self, peer: str, rows: list[Row]) -> None:
        if self.deadline.passed(self.plan.reserve):
            self.doom(peer, rows, LATE)
            return
        self.launch(peer, rows)
        if peer in self.living:
            self.duel(rows, peer)
            self.see_traffic(peer, rows)
            self.end(peer)
        self.save()

    def launch(self, name: str, rows: list[Row]) -> None:
        """Start a contender in the first way in which it stays within the most demanding row's cap; its fate is told if there is none."""
        kind = CONTENDERS[name]
        missing = kind.missing(self.plan.device)
        if missing:
            self.doom(name, rows, Fate(missing.partition(":")[0], missing))
            return
        tokens = tuple(row.tokens for row in rows)
        for number, way in enumerate(kind.ways):
            task = self.task("run", name, budget=rows[0].budget, way=number, tokens=tokens)
            try:
                self.living[name] = GpuChild(task)
                self.living[name].answer()
                self.living[name].ask(f"warm {max(tokens, key=self.allowances.__getitem__)}")
            except Fate as fate:
                self.end(name)
                if fate.short != "OOM" or number == len(kind.ways) - 1:
                    self.doom(name, rows, fate)
                    return
                self.results.note(f"{name}, {rows[0].percent} %: out of memory when {way.story}")
            else:
                for row in rows:
                    row.ways[name] = way.story
                return

    def doom(self, name: str, rows: list[Row], fate: Fate) -> None:
        """Write down why a contender has no figures."""
        for row in rows:
            row.fates.setdefault(name, fate.short)
        when = f"{rows[0].model}, {rows[0].percent} %" + (f", {rows[0].tokens} tokens" if len(rows) == 1 else "")
        self.results.note(f"{name}: {fate}" if fate.short in ("not installed", "needs CUDA") else f"{name}, {when}: {fate}")
        self.say(f"{when}: {name}: {fate.short}")
        self.save()

    def end(self, name: str) -> None:
        child = self.living.pop(name, None)
        if child is not None:
            child.close()

    # -- turns ----------------------------------------------------------------------------------------------------------

    def duel(self, rows: list[Row], peer: str) -> None:
        """Let all that live take turns in each row."""
        for row in rows:
            if peer != ALONE and self.deadline.passed(self.plan.reserve):
                self.doom(peer, [row], LATE)
                continue
            for name in {"tierstore", peer or "tierstore"} - self.living.keys() - row.passes.keys():
                row.fates.setdefault(name, "failed before")
            names = [name for name in self.living if name not in row.fates]
            for name in names:
                self.attempt(name, row, "warm")
            for number in range(self.plan.rounds):
                for name in turned(names, number):
                    told = self.attempt(name, row, "turn")
                    if told is not None:
                        row.passes.setdefault(name, []).append(told | {"beside": peer})
            for name in names:
                self.check(name, row)
            self.say(self.story(row, [name for name in names if name != "plain"]))
            self.save()

    def attempt(self, name: str, row: Row, wish: str) -> dict[str, Any] | None:
        """Ask one that lives; if it fails it is out for the rest of this budget."""
        if name not in self.living:
            return None
        try:
            return self.living[name].ask(f"{wish} {row.tokens}")
        except Fate as fate:
            if name == "plain":
                raise
            self.end(name)
            self.doom(name, [row], fate)
            return None

    def check(self, name: str, row: Row) -> None:
        """Find out how wrong wrong outputs are."""
        if name in self.living and name not in row.differences and row.output(name) not in ("equal", "-"):
            told = self.attempt(name, row, "differ")
            if told is not None:
                row.differences[name] = told["difference"]
                self.results.note(f"{name}, {row.model}, {row.percent} %, {row.tokens} tokens: output {row.output(name)}")

    def story(self, row: Row, names: list[str]) -> str:
        cells = [f"{n} {row.fates[n]}" if n in row.fates else f"{n} {row.seconds(n) / row.bound:.2f} {row.output(n)}" for n in names]
        head = f"{row.model}, {row.percent} %, {row.tokens} tokens: bound {row.bound:.4f} s ({row.limit})"
        return f"{head}; times over it: {', '.join(cells)}"

    def see_traffic(self, name: str, rows: list[Row]) -> None:
        """Count a contender's bytes with the profiler, last of all, as that may slow it down."""
        for row in rows:
            if name in self.living and name not in row.fates:
                try:
                    row.traffic[name] = self.living[name].ask(f"traffic {row.tokens}")
                except Fate as fate:
                    self.end(name)
                    self.results.note(f"{name}, {row.percent} %, {row.tokens} tokens: bytes could not be counted: {fate}")

    def compare_counts(self, rows: list[Row]) -> None:
        """Say so if tierstore counts other bytes than the profiler."""
        for row in rows:
            seen, own = row.traffic.get("tierstore", {}).get("h2d"), row.moved("tierstore")
            if seen is not None and abs(seen - own) > max(DISAGREEMENT * seen, row.ring):
                where = f"{row.model}, {row.percent} %, {row.tokens} tokens"
                self.results.note(f"{where}: tierstore counts {own / 1e9:.3f} GB to the device, the profiler {seen / 1e9:.3f} GB")
