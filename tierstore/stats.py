"""Counters of a store and the snapshot that users read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierStats:
    """Bytes of one tier; `budget_bytes` is None where there is no limit."""

    budget_bytes: int | None
    used_bytes: int
    peak_bytes: int
    entries: int


@dataclass(frozen=True, slots=True)
class LinkStats:
    """What one direction between two tiers has carried: bytes, and seconds spent copying."""

    bytes: int
    seconds: float
    copies: int


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
        self._links: dict[tuple[int, int], LinkStats] = {}

    def carried(self, source: int, target: int, nbytes: int, seconds: float) -> None:
        """Add one copy to the link from level `source` to level `target`."""
        link = self.link(source, target)
        self._links[source, target] = LinkStats(link.bytes + nbytes, link.seconds + seconds, link.copies + 1)

    def link(self, source: int, target: int) -> LinkStats:
        return self._links.get((source, target), LinkStats(0, 0.0, 0))
