"""The tables of `gpu_offload.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gpu_ceilings import Ceilings
from gpu_rows import MOST_BYTES, MOST_OF_BOUND, MOST_OF_RESIDENT, Row, TierRow
from rich.console import Console
from rich.table import Table

from tierstore import format_size

MODEL_COLUMNS = (
    "budget", "tokens", "contender", "s", "time / bound", "time / resident", "moved", "bytes / ((N-C)+ring)", "peak", "output",
    "faster than best peer",
)  # fmt: skip
TIER_COLUMNS = (
    "tokens", "s", "bound s", "set by", "time / bound", "to the GPU", "bytes / ((N-C)+ring)", "from disk", "bytes / ((N-C-R)+ring)",
    "output",
)  # fmt: skip


def new_table(title: str, columns: Sequence[str], caption: str = "") -> Table:
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("contender", "output", "set by") else "right")
    return table


def size(nbytes: float) -> str:
    return "-" if math.isnan(nbytes) else format_size(int(nbytes))


def number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def judged(text: str, met: bool) -> str:
    """Return a figure that has a target, with a sign for whether it is met."""
    return text if text == "-" else f"[green]{text} ok[/]" if met else f"[red]{text} missed[/]"


def ceiling_table(found: Ceilings) -> Table:
    table = new_table("ceilings, GB/s", ["chunk", "host to device", "device to host", "each, both at once"])
    for (chunk, to), (_, fro), (_, both) in zip(found.h2d, found.d2h, found.both, strict=True):
        table.add_row(f"{chunk >> 20} MiB", *(f"{rate / 1e9:.2f}" for rate in (to, fro, both)))
    return table


def model_table(model: str, rows: Sequence[Row], names: Sequence[str]) -> Table:
    targets = f"targets: bytes at most {MOST_BYTES} (N-C) + ring; time at most {MOST_OF_BOUND} of the bound where the link sets it, "
    targets += f"at most {MOST_OF_RESIDENT} of resident where computing does; faster than every peer"
    table = new_table(f"{model}: one forward", MODEL_COLUMNS, targets)
    for row in rows:
        for name in names:
            table.add_row(*line(row, name))
        table.add_section()
    return table


def line(row: Row, name: str) -> Iterator[str]:
    """Yield the cells of one contender in one row."""
    if name == "plain":
        yield from (f"{row.percent} %", str(row.tokens), f"plain; bound {number(row.bound, 4)} s: {row.limit}")
    else:
        yield from ("", "", name)
    if name in row.fates or not row.passes.get(name):
        yield from (row.fates.get(name, "-"), *[""] * (len(MODEL_COLUMNS) - 4))
        return
    seconds, ours = row.seconds(name), name == "tierstore"
    of_bound, of_resident = number(seconds / row.bound), number(seconds / row.resident)
    bytes_ratio = "-" if name == "plain" else number(row.byte_ratio(name))
    yield number(seconds, 4)
    yield judged(of_bound, row.time_met(name)) if ours and row.limit == "link" else of_bound
    yield judged(of_resident, row.time_met(name)) if ours and row.limit == "compute" else of_resident
    yield size(row.moved(name))
    yield judged(bytes_ratio, row.bytes_met(name)) if ours else bytes_ratio
    yield size(row.peak(name))
    yield judged(row.output(name), row.output(name) == "equal") if ours else row.output(name)
    yield rival_cell(row) if ours else ""


def rival_cell(row: Row) -> str:
    best = row.best_rival()
    return "-" if best is None else judged(f"{best[1]:.2f}x {best[0]}", best[1] > 1)


def tier_table(rows: Sequence[TierRow]) -> Table:
    first = rows[0]
    title = f"three tiers: {size(first.total)} of weights, gpu {size(first.gpu)}, cpu {size(first.cpu)}, the rest on disk"
    table = new_table(title, TIER_COLUMNS, "R: the budget of the RAM; bound: the longest of computing and of what each link must carry")
    for row in rows:
        if row.fate:
            table.add_row(str(row.tokens), row.fate)
            continue
        cells = [str(row.tokens), number(row.seconds, 3), number(row.bound, 3), row.limit, number(row.seconds / row.bound)]
        for link in ("cpu->gpu", "disk->cpu"):
            cells += [size(row.moved(link)), number(row.byte_ratio(link))]
        table.add_row(*cells, judged("equal", True) if row.equal else judged("WRONG", False))
    return table


def show_facts(console: Console, found: Ceilings) -> None:
    console.print("; ".join(f"{name}: {value}" for name, value in found.facts.items()), markup=False)


def show_ceilings(console: Console, found: Ceilings) -> None:
    show_facts(console, found)
    console.print(ceiling_table(found))
    if found.disk:
        console.print(f"disk, direct reads: {', '.join(f'{rate / 1e9:.2f}' for rate in found.disk)} GB/s", markup=False)
    elif found.trouble:
        console.print(found.trouble, markup=False, style="red")


def show_rows(console: Console, rows: Sequence[Row], names: Sequence[str]) -> None:
    for model in dict.fromkeys(row.model for row in rows):
        console.print(model_table(model, [row for row in rows if row.model == model], names))
        for row in rows:
            if row.model == model:
                sizes = f"N-C {size(row.missing)}, ring {size(row.ring)}, cap {size(row.cap)}"
                console.print(f"{row.percent} %, {row.tokens} tokens: {sizes}", markup=False, style="dim")
