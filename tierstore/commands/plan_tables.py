"""A plan for a checkpoint as tables, and as what becomes JSON."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from rich.console import Console

from tierstore.commands.showing import table
from tierstore.outlook.forecast import DISK, Forecast
from tierstore.outlook.planned import Outlook
from tierstore.sizes import format_size
from tierstore.spec import dtype_name

GROUPINGS = ("group", "block", "tensor")
_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")

Row = tuple[str, int, dict[str, int]]


def as_json(outlook: Outlook, by: str) -> dict[str, Any]:
    """Return everything in an outlook as JSON has it, sizes in bytes and times in seconds."""
    weights = outlook.weights
    return {
        "order": weights.order,
        "weights": {"count": len(weights.by_name), "bytes": weights.nbytes, "dtype": dtype_name(weights.largest().spec.dtype)},
        "plan": _forecast_json(outlook.forecast),
        "groups": [{"name": name, "weights": count, "bytes": nbytes} for name, count, nbytes in groups(outlook, by)],
        "smallest": asdict(outlook.smallest),
        "bandwidths": {**outlook.speeds.links, "computing": outlook.speeds.computing},
        "choices": [_forecast_json(choice) for choice in outlook.choices],
        "notes": list(outlook.notes),
    }


def _forecast_json(made: Forecast) -> dict[str, Any]:
    return {
        "budgets": dict(made.rooms.nbytes),
        "tiers": made.tiers,
        "rings": dict(made.rings),
        "links": {link: asdict(use) for link, use in made.links.items()},
        "row_bytes": made.row_bytes,
        "computing_seconds": made.computing,
        "seconds": made.seconds,
        "limit": made.limit,
    }


def groups(outlook: Outlook, by: str) -> list[Row]:
    """Return rows: a name, how many weights, and bytes by tier, in the order of the model."""
    made = outlook.forecast
    rows: dict[str, tuple[int, dict[str, int]]] = {}
    blocks: dict[str, set[str]] = {}
    for name in outlook.weights.by_name:
        group, number = _group(name, by)
        blocks.setdefault(group, set()).update(number)
        count, nbytes = rows.get(group, (0, {}))
        rows[group] = count + 1, {tier: nbytes.get(tier, 0) + made.rest[name].get(tier, 0) for tier in made.rooms.names}
    return [(f"{group} ({len(blocks[group])} blocks)" if blocks[group] else group, *row) for group, row in rows.items()]


def _group(name: str, by: str) -> tuple[str, list[str]]:
    """Return the group of a weight, and the number of its block where that stands for several: blocks have numbers in their paths."""
    number = _NUMBER.search(name)
    if by == "tensor":
        return name, []
    if number is None:
        return name.rpartition(".")[0] or name, []
    return (f"{name[: number.start()]}.*", [number[1]]) if by == "group" else (name[: number.end()], [])


def show(outlook: Outlook, by: str, place: str, console: Console) -> None:
    """Print an outlook on the checkpoint called `place`."""
    weights, made = outlook.weights, outlook.forecast
    kind = dtype_name(weights.largest().spec.dtype)
    console.print(f"{place}: {len(weights.by_name)} weights, {format_size(weights.nbytes)}, mostly {kind}", markup=False)
    console.print(f"order of use: {weights.order}", markup=False)
    found: list[Row] = [*groups(outlook, by), ("all", len(weights.by_name), made.tiers)]
    rows = [(name, str(count), *(_size(nbytes[tier]) for tier in made.rooms.names)) for name, count, nbytes in found]
    heads = tuple(f"{tier} {format_size(made.rooms.nbytes[tier])}" if tier != DISK else "left on disk" for tier in made.rooms.names)
    console.print(table("what rests where", ("weights of", "count", *heads), rows))
    _show_links(outlook, console)
    _show_smallest(outlook, console)
    columns = (*made.rooms.nbytes, *made.links, "seconds", "limited by")
    other = [_choice(choice, made) for choice in outlook.choices]
    console.print(table("what other budgets would do (* as asked for)", columns, other, len(made.rooms.nbytes)))
    for note in outlook.notes:
        console.print(f"note: {note}", markup=False)


def _show_links(outlook: Outlook, console: Console) -> None:
    made, speeds = outlook.forecast, outlook.speeds
    rows = [
        (link, _size(use.nbytes), _size(use.file_bytes), str(use.copies), _rate(speeds.links[link]), _seconds(use.seconds))
        for link, use in made.links.items()
    ]
    rows.append(("computing", "-", "-", "-", _rate(speeds.computing), _seconds(made.computing)))
    console.print(table("each token", ("link", "bytes", "bytes read", "copies", "bandwidth", "seconds"), rows))
    if made.row_bytes:
        console.print(f"and {_size(made.row_bytes)} of rows that a token looks up")
    if made.seconds:
        console.print(f"at least {made.seconds:.3g} s per token, at most {1 / made.seconds:.3g} tokens/s, limited by {made.limit}")
    else:
        console.print("seconds per token: nothing moves" if made.seconds is not None else "seconds per token: not known, see the notes")


def _show_smallest(outlook: Outlook, console: Console) -> None:
    fast, least = outlook.forecast.rooms.names[0], outlook.smallest
    module = least.module or "the model"
    for line in (
        f"smallest budget of {fast}: below {format_size(least.starts)} a session is refused (the largest weight, {least.weight})",
        f"  from {format_size(least.runs)} on it runs: all that {module} owns, used at once",
        f"  from {format_size(least.ahead)} on the next weight can come while computing goes on",
    ):
        console.print(line, markup=False)


def _choice(other: Forecast, asked: Forecast) -> tuple[str, ...]:
    mark = " *" if other.rooms == asked.rooms else ""
    *sizes, last = [format_size(nbytes) for nbytes in other.rooms.nbytes.values()]
    return (*sizes, last + mark, *(_size(use.nbytes) for use in other.links.values()), _seconds(other.seconds), other.limit or "-")


def _size(nbytes: int) -> str:
    return format_size(nbytes) if nbytes else "-"


def _rate(rate: float | None) -> str:
    return "?" if rate is None else f"{format_size(int(rate))}/s"


def _seconds(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:.3g}"
