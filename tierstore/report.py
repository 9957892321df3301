"""Statistics as a table that a person likes to read."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from tierstore.sizes import format_size
from tierstore.stats import Stats


def render(stats: Stats, *, holds_all: bool, device: str) -> str:
    """Return tables of tiers and links and a closing line, as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=100, no_color=True, highlight=False)
    console.print(_tiers(stats, device))
    links = _links(stats)
    console.print(links if links.row_count else "no bytes have moved between tiers")
    console.print(_summary(stats, holds_all))
    return out.getvalue().rstrip() + "\n"


def _tiers(stats: Stats, device: str) -> Table:
    table = Table(title=f"tiers (computing on {device})", title_justify="left")
    for name in ("tier", "budget", "used", "peak", "peak/budget", "entries"):
        table.add_column(name, justify="left" if name == "tier" else "right")
    for name, tier in stats.tiers.items():
        limited = tier.budget_bytes is not None
        budget = format_size(tier.budget_bytes or 0) if limited else "none"
        share = f"{tier.peak_bytes / tier.budget_bytes:.0%}" if tier.budget_bytes else "-"
        table.add_row(name, budget, format_size(tier.used_bytes), format_size(tier.peak_bytes), share, str(tier.entries))
    return table


def _links(stats: Stats) -> Table:
    table = Table(title="links", title_justify="left")
    for name in ("link", "bytes", "copies", "seconds", "per second"):
        table.add_column(name, justify="left" if name == "link" else "right")
    for name, link in stats.links.items():
        if link.copies:
            rate = f"{format_size(int(link.bytes / link.seconds))}/s" if link.seconds else "-"
            table.add_row(name, format_size(link.bytes), str(link.copies), f"{link.seconds:.3f}", rate)
    return table


def _summary(stats: Stats, holds_all: bool) -> str:
    if holds_all:
        return "everything fits into the fast tier and stays there as plain tensors; accesses are not counted"
    asked = stats.hits + stats.misses
    rate = f"{stats.hits / asked:.1%}" if asked else "-"
    return f"{asked} accesses, {rate} hits, {stats.evictions} evictions, {stats.stall_seconds:.3f} s waited for bytes"
