"""Counters of a store and the snapshot that users read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierStats:
    """Bytes of one tier; `budget_bytes` is None where there is no limit. `aside_bytes` of the budget are left to activations."""

    budget_bytes: int | None
    used_bytes: int
    peak_bytes: int
    entries: int
    aside_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LinkStats:
    """What one direction between two tiers has carried: bytes, and seconds in which it was copying."""

    bytes: int
    seconds: float
    copies: int

    def __add__(self, other: LinkStats) -> LinkStats:
        return LinkStats(self.bytes + other.bytes, self.seconds + other.seconds, self.copies + other.copies)


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot. `hits` and `misses` count entries asked for; `stall_seconds` is the time their askers waited."""

    tiers: dict[str, TierStats]
    links: dict[str, LinkStats]
    hits: int
    misses: int
    evictions: int
    stall_seconds: float


class Counters:
    """Running totals; changed under the store's lock."""

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.evictions = 0
        self.stall_seconds = 0.0
        self._busy: dict[tuple[int, int], tuple[int, float]] = {}  # copies under way, and since when the link was not accounted for
        self._links: dict[tuple[int, int], LinkStats] = {}

    def link_busy(self, source: int, target: int, now: float) -> None:
        """A copy from level `source` to level `target` begins."""
        count, since = self._busy.get((source, target), (0, now))
        self._busy[source, target] = (count + 1, since)

    def link_idle(self, source: int, target: int, now: float, nbytes: int) -> None:
        """A copy that `link_busy` announced has ended and carried `nbytes` (none if it failed)."""
        count, since = self._busy.pop((source, target))
        if count > 1:
            self._busy[source, target] = (count - 1, now)
        link = self.link(source, target)
        self._links[source, target] = LinkStats(link.bytes + nbytes, link.seconds + now - since, link.copies + bool(nbytes))

    def link(self, source: int, target: int) -> LinkStats:
        return self._links.get((source, target), LinkStats(0, 0.0, 0))
