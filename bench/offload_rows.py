"""The rows of `cpu_offload.py`: what was measured for one budget and number of tokens, and the tables made of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from turns import interval


@dataclass
class Row:
    """What was measured for one budget and one number of tokens."""

    percent: int
    tokens: int
    budget: int
    touched: int
    digest: str
    raw: list[float] = field(default_factory=list)
    passes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    fates: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Bytes that a pass must read, whatever was kept: transfer volume's lower bound."""
        return max(0, self.touched - self.budget)

    @property
    def plain(self) -> float:
        return self.seconds("plain")

    @property
    def disk(self) -> float:
        return self.missing / statistics.median(self.raw)

    @property
    def bound(self) -> float:
        return max(self.plain, self.disk)

    def bounds(self) -> list[float]:
        """Return what the bound was in each round: how long that took which is the longer of the two as a rule."""
        if self.plain >= self.disk:
            return [told["seconds"] for told in self.passes["plain"]]
        return [self.missing / speed for speed in self.raw]

    def sure(self, name: str) -> str:
        """Return between which figures a contender's median time over the bound is, as one can be sure of in nine cases of ten."""
        times = [told["seconds"] for told in self.passes.get(name, ())]
        bounds = self.bounds()
        if name in self.fates or len(times) != len(bounds):
            return "-"
        return interval(sorted(time / bound for time, bound in zip(times, bounds, strict=True)))

    @property
    def disturbance(self) -> str:
        """Say so if the plain passes differ too much for the row to mean anything; else empty."""
        times = [told["seconds"] for told in self.passes["plain"]]
        if max(times) <= 1.5 * min(times):
            return ""
        took = f"the plain pass took {min(times):.3f} to {max(times):.3f} s"
        return f"disturbed: {self.percent} %, {self.tokens} tokens: {took}; do not trust this row"

    def seconds(self, name: str) -> float:
        return statistics.median(told["seconds"] for told in self.passes[name])

    def ratio(self, name: str, base: str) -> str:
        """Return how many times as long as `base` a contender takes."""
        if any(who in self.fates or not self.passes.get(who) for who in (name, base)):
            return "-"
        return f"{self.seconds(name) / self.seconds(base):.2f}"

    def cell(self, name: str) -> str:
        """Return a contender's median time over the bound, marked if any output was not that of plain; or why there is none."""
        if name in self.fates:
            return self.fates[name]
        wrong = any(told["digest"] != self.digest for told in self.passes[name])
        return f"{self.seconds(name) / self.bound:.2f}{' WRONG' if wrong else ''}"

    def read_cell(self, name: str) -> str:
        if name in self.fates:
            return self.fates[name]
        return gib(statistics.median(told["read"] for told in self.passes[name]))

    def peak_cell(self, name: str) -> str:
        return " / ".join(gib(size) for size in self.peaks[name]) if name in self.peaks else self.fates.get(name, "-")


def gib(size: float) -> str:
    return f"{size / (1 << 30):.2f}"


def new_table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column.replace("-", "-\n"), justify="right")
    return table


def time_table(rows: list[Row], names: list[str]) -> Table:
    columns = ["budget", "tokens", "plain s", "disk GB/s", "missing GiB", "disk s", "bound s", *names]
    columns += ["tierstore 90 % sure", "tierstore / accelerate-disk", "tierstore / accelerate-max"]
    table = new_table("time of a pass / bound", columns)
    for row in rows:
        speed = statistics.median(row.raw) / 1e9
        head = [f"{row.percent} %", str(row.tokens), f"{row.plain:.3f}", f"{speed:.2f}", gib(row.missing), f"{row.disk:.3f}"]
        against = [row.sure("tierstore")] + [row.ratio("tierstore", base) for base in ("accelerate-disk", "accelerate-max")]
        table.add_row(*head, f"{row.bound:.3f}", *(row.cell(name) for name in names), *against)
    return table


def read_table(rows: list[Row], names: list[str]) -> Table:
    table = new_table("GiB read from the disk in a pass", ["budget", "tokens", "missing", *names])
    for row in rows:
        table.add_row(f"{row.percent} %", str(row.tokens), gib(row.missing), *(row.read_cell(name) for name in names))
    return table


def peak_table(rows: list[Row], names: list[str]) -> Table:
    table = new_table("peak of the cgroup in GiB, page cache included / of it anonymous", ["budget", "tokens", "budget GiB", *names])
    for row in rows:
        table.add_row(f"{row.percent} %", str(row.tokens), gib(row.budget), *(row.peak_cell(name) for name in names))
    return table


TABLES = (time_table, read_table, peak_table)
