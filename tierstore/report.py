"""Statistics as a table that a person likes to read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tierstore.planning.policy import Foresight
from tierstore.sizes import format_size
from tierstore.stats import Stats
from tierstore.store import TieredStore

_MORE = 1.25  # the larger budget that a report tells about


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a plan says, in bytes for one repetition, and what was measured, in seconds since `seconds` ago.

    `link`: into the fastest tier, the busiest one.
    """

    seconds: float
    accesses: int
    planned_bytes: int
    ring_bytes: int
    kept_bytes: int
    larger_budget: int
    larger_bytes: int | None
    link: str


def forecast_of(store: TieredStore, since: float) -> Forecast | None:
    """Return what the policy of `store` expects; None if it makes no plans, or has none yet."""
    tier, made = store.tiers[0], store.plan
    if made is None or not made.order or tier.ledger.budget is None or not isinstance(tier.policy, Foresight):
        return None
    with store.moves.lock:
        kept = sum(store.moves.entries[key].nbytes for key, level in made.rest.items() if level == 0 and key in store.moves.entries)
        larger = int(tier.ledger.budget * _MORE)
        more = tier.policy.would_move(larger - tier.ledger.aside)
        seconds = store.moves.engine.now() - since
    links = {name: link.bytes for name, link in store.stats().links.items() if name.endswith(f"->{tier.name}")}
    link = max(links, key=lambda name: links[name])
    return Forecast(seconds, len(made.order[0]), made.link_bytes[0], made.ring_bytes[0], kept, larger, more, link)


def render(stats: Stats, forecast: Forecast | None = None, *, holds_all: bool, device: str) -> str:
    """Return tables of tiers and links and a closing line, as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=100, no_color=True, highlight=False)
    console.print(_tiers(stats, device))
    links = _links(stats)
    console.print(links if links.row_count else "no bytes have moved between tiers")
    console.print(_summary(stats, holds_all))
    if forecast is not None and not holds_all:
        for line in outlook(stats, forecast):
            console.print(line)
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
    tiers = stats.tiers.items()
    left = "".join(f"; {format_size(tier.aside_bytes)} of {name} are left to activations" for name, tier in tiers if tier.aside_bytes)
    asked = stats.hits + stats.misses
    rate = f"{stats.hits / asked:.1%}" if asked else "-"
    return f"{asked} accesses, {rate} hits, {stats.evictions} evictions, {stats.stall_seconds:.3f} s waited for bytes{left}"


def outlook(stats: Stats, forecast: Forecast) -> Iterator[str]:
    """Yield prediction beside measurement, what limits the run, and what more memory would buy."""
    link = stats.links[forecast.link]
    rate = link.bytes / link.seconds if link.seconds else 0.0
    expected = f", {forecast.planned_bytes / rate:.3f} s at the speed measured" if rate else ""
    yield (
        f"plan: keeps {format_size(forecast.kept_bytes)}; each repetition fetches {format_size(forecast.planned_bytes)} "
        f"in {forecast.accesses} copies{expected}, through a ring of {format_size(forecast.ring_bytes)}"
    )
    waited, busy = (seconds / forecast.seconds if forecast.seconds else 0.0 for seconds in (stats.stall_seconds, link.seconds))
    if waited < 0.05:
        yield f"limit: computing; {waited:.0%} of the time was spent waiting for bytes"
    else:
        yield f"limit: {forecast.link}, busy {busy:.0%} of the time; {waited:.0%} of the time was spent waiting for bytes"
    if forecast.larger_bytes is not None and forecast.larger_bytes < forecast.planned_bytes:
        yield f"a budget of {format_size(forecast.larger_budget)} would fetch {format_size(forecast.larger_bytes)} each time"
