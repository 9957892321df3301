"""What stays where and what streams: a pure function of a trace, sizes and budgets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log2

from tierstore.errors import BudgetError
from tierstore.planning.cycle import Cycle

_GIANTS = 8  # how many of the largest sizes are tried as "always resident"
_STEPS_TO_DOUBLE = 8  # of worth
_AHEAD_SHARE = 8  # one of so many parts of a budget may be on its way
_ROUNDS = 6  # what stays changes the ring, and that changes how much can stay


@dataclass(frozen=True, slots=True)
class Cost:
    """What transfers take on top of their bytes.

    `fixed_bytes`: what each of them does, expressed in bytes; it lets small entries stay, and large ones stream.
    `ahead_bytes`: how much has to be on its way for a link to be busy; a ring has room for them, where they are no more than an
    eighth of the budget.
    """

    fixed_bytes: int = 0
    ahead_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Where entries rest while a trace repeats, and what that costs each time.

    `rest`: key -> level of the tier it stays in, for every key of the trace; a key of the last level streams through the
    faster ones each time it is used. `ring_bytes`: per level but the last, what streaming needs there. `order`: per level
    but the last, the keys that are fetched into it, in order of use, once for each use. `link_bytes`: per level but the last,
    bytes that come into it from below in one repetition. `seconds`: the least time that one repetition can take, None
    without bandwidths.
    """

    rest: Mapping[str, int]
    ring_bytes: tuple[int, ...]
    order: tuple[tuple[str, ...], ...]
    link_bytes: tuple[int, ...]
    seconds: float | None


def plan(
    trace: Sequence[str],
    sizes: Mapping[str, int],
    budgets: Sequence[int | None],
    durations: Sequence[float] | None = None,
    bandwidths: Sequence[float] | None = None,
    *,
    cost: Cost = Cost(),
    together: Mapping[str, str] | None = None,
) -> Plan:
    """Plan one repetition of `trace` (keys in order of use; it starts again where it ends).

    `sizes` in bytes. `budgets`: bytes for these keys in each tier, fastest first (None: no limit); the last tier holds all of
    them. `durations`: seconds of computing after each access, by default in proportion to the bytes. `bandwidths`: bytes per
    second into each tier but the last, from the one below. `cost`: of transfers, beside their bytes. `together`: keys that
    are used at once, such as the pieces of one value, have the same value in it.

    Each tier keeps what is used most often per byte, spread evenly over the trace among equals, so that what streams has
    computing to hide behind (DESIGN: spread; Cao, Felten, Karlin and Li 1995 for the order of fetches). Tiers are exclusive:
    each key rests in one of them. Raises `BudgetError` if a single key exceeds the first tier.
    """
    _check(trace, sizes, budgets[0])
    cycle = Cycle(trace, durations or [sizes[key] for key in trace], sizes, together or {})
    computing = sum(cycle.durations)
    rest: dict[str, int] = {}
    rings, orders = [], []
    last = len(budgets) - 1
    for level in range(last):
        slots = 2 if level == 0 else 3  # two links in a row jostle each other: one slot more between them keeps both busy
        ahead = min(cost.ahead_bytes, (budgets[level] or 0) // _AHEAD_SHARE)
        chosen, slots = _Choice(cycle, budgets[level], cost.fixed_bytes, slots, ahead).best()
        rest |= dict.fromkeys(chosen, level)
        rings.append(cycle.ring(chosen, slots, ahead))
        cycle = cycle.without(chosen)
        orders.append(tuple(cycle.keys))
    rest |= {key: last for key in trace if key not in rest}
    link_bytes = tuple(sum(sizes[key] for key in order) for order in orders)
    seconds = None
    if bandwidths is not None:
        seconds = max(computing, *(nbytes / rate for nbytes, rate in zip(link_bytes, bandwidths, strict=True)))
    return Plan(rest, tuple(rings), tuple(orders), link_bytes, seconds)


def _check(trace: Iterable[str], sizes: Mapping[str, int], budget: int | None) -> None:
    largest = max(trace, key=sizes.__getitem__, default=None)
    if largest is not None and budget is not None and sizes[largest] > budget:
        raise BudgetError(f"planning for {largest!r}", tier="the fastest", required_bytes=sizes[largest], budget_bytes=budget)


@dataclass
class _Choice:
    """Which keys of `cycle` stay in a tier of `budget` bytes."""

    cycle: Cycle
    budget: int | None
    fixed_bytes: int
    slots: int
    ahead: int
    keys: dict[str, None] = field(init=False)
    uses: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = dict.fromkeys(self.cycle.keys)
        self.uses = dict.fromkeys(self.keys, 0)
        for key in self.cycle.keys:
            self.uses[key] += 1

    def best(self) -> tuple[frozenset[str], int]:
        """Return what stays, and how many slots the ring for the rest has.

        What is large, with all that is used at once with it, needs a large ring if it streams, so keeping it may pay although
        others are used as often: a few thresholds above which everything stays are tried. One slot takes less than several,
        but nothing comes in while what it holds is computed with: it is for where no more have room, or where little streams
        and one transfer keeps the link busy.
        """
        if self.budget is None or self.cycle.bytes(self.keys) <= self.budget:
            return frozenset(self.keys), self.slots
        sizes = self.cycle.at_once(self.keys)
        thresholds = sorted(set(sizes.values()), reverse=True)[:_GIANTS]
        best, cheapest = (frozenset[str](), 1), None
        for slots in (self.slots, 1):
            if cheapest is not None and self.ahead:  # several have to be on their way for the link to be busy
                break
            for threshold in [None, *thresholds]:
                forced = frozenset(key for key in self.keys if threshold is not None and sizes[key] >= threshold)
                chosen = self._beside(forced, self.budget, slots)
                if chosen is None:
                    break
                cost = self.cycle.moved(chosen, self.fixed_bytes) * (1 + (self.cycle.share(chosen) if slots == 1 else 0))
                if cheapest is None or cost < cheapest:
                    best, cheapest = (chosen, slots), cost
        return best

    def _beside(self, forced: frozenset[str], budget: int, slots: int) -> frozenset[str] | None:
        """Return `forced` and what else stays beside it and a ring for the rest; None if `forced` leaves it no room."""
        room, ring = budget - self.cycle.bytes(forced), self.cycle.ring(forced, slots, self.ahead)
        if ring > room:
            return None
        chosen = forced
        for _ in range(_ROUNDS):
            reckoned, more = ring, forced | self._select(forced, max(0, room - ring), ring)
            ring = self.cycle.ring(more, slots, self.ahead)
            if self.cycle.bytes(more) + ring <= budget:
                chosen = max(chosen, more, key=self.cycle.bytes)
            elif chosen is not forced:
                break
            if ring == reckoned:  # the next round would be the same
                break
        return self._topped_up(chosen, budget, slots)

    def _topped_up(self, chosen: frozenset[str], budget: int, slots: int) -> frozenset[str]:
        """Return `chosen` and what fits into the room that is left, when what stays no longer needs a place in the ring."""
        free = budget - self._needed(chosen, slots)
        more: list[str] = []
        for key in sorted((key for key in self.keys if key not in chosen), key=self._worth, reverse=True):
            if self.cycle.sizes[key] <= free:
                more.append(key)
                free -= self.cycle.sizes[key]
        while more and self._needed(chosen.union(more), slots) > budget:
            del more[len(more) // 2 :]  # larger ones follow each other now, and need a larger ring
        return chosen.union(more)

    def _needed(self, stays: frozenset[str], slots: int) -> int:
        """Return the bytes that `stays` and a ring for the rest take."""
        return self.cycle.bytes(stays) + self.cycle.ring(stays, slots, self.ahead)

    def _worth(self, key: str) -> float:
        """Return what a byte of an entry saves if it stays, in bytes."""
        return self.uses[key] * (1 + self.fixed_bytes / max(1, self.cycle.sizes[key]))

    def _select(self, forced: frozenset[str], free: int, ring: int) -> set[str]:
        """Return keys of at most `free` bytes, the most used per byte, and spread where not all of equal worth fit."""
        chosen: set[str] = set()
        for group in self._by_worth(forced):
            total = self.cycle.bytes(group)
            part = group if total <= free else self.cycle.spread(group, free, ring)
            chosen |= part
            free -= self.cycle.bytes(part)
        return chosen

    def _by_worth(self, forced: frozenset[str]) -> list[set[str]]:
        """Return groups of keys, first those of which a byte saves most; what differs by less than a tenth is in one group."""
        groups: dict[int, set[str]] = {}
        for key in self.keys:
            if key not in forced:
                groups.setdefault(round(_STEPS_TO_DOUBLE * log2(self._worth(key))), set()).add(key)
        return [groups[step] for step in sorted(groups, reverse=True)]
