"""What stays where and what streams: a pure function of a trace, sizes and budgets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tierstore.errors import BudgetError

_GIANTS = 8  # how many of the largest sizes are tried as "always resident"


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
    fixed_bytes: int = 0,
) -> Plan:
    """Plan one repetition of `trace` (keys in order of use; it starts again where it ends).

    `sizes` in bytes. `budgets`: bytes for these keys in each tier, fastest first (None: no limit); the last tier holds all of
    them. `durations`: seconds of computing after each access, by default in proportion to the bytes. `bandwidths`: bytes per
    second into each tier but the last, from the one below. `fixed_bytes`: what one transfer costs on top of its bytes,
    expressed in bytes; it lets small entries stay.

    Each tier keeps what is used most often per byte, spread evenly over the trace among equals, so that what streams has
    computing to hide behind (DESIGN: spread; Cao, Felten, Karlin and Li 1995 for the order of fetches). Tiers are exclusive:
    each key rests in one of them. Raises `BudgetError` if a single key exceeds the first tier.
    """
    _check(trace, sizes, budgets[0])
    durations = durations or [sizes[key] for key in trace]
    rest: dict[str, int] = {}
    rings, orders = [], []
    last = len(budgets) - 1
    for level in range(last):
        streamed = [(key, duration) for key, duration in zip(trace, durations, strict=True) if key not in rest]
        slots = 2 if level == 0 else 3  # two links in a row jostle each other: one slot more between them keeps both busy
        chosen = _choose(streamed, sizes, budgets[level], fixed_bytes, slots)
        rest |= dict.fromkeys(chosen, level)
        rings.append(ring_for(streamed, sizes, chosen, slots))
        orders.append(tuple(key for key, _ in streamed if key not in chosen))
    rest |= {key: last for key in trace if key not in rest}
    link_bytes = tuple(sum(sizes[key] for key in order) for order in orders)
    seconds = None
    if bandwidths is not None:
        seconds = max(sum(durations), *(nbytes / rate for nbytes, rate in zip(link_bytes, bandwidths, strict=True)))
    return Plan(rest, tuple(rings), tuple(orders), link_bytes, seconds)


def _check(trace: Iterable[str], sizes: Mapping[str, int], budget: int | None) -> None:
    largest = max(trace, key=sizes.__getitem__, default=None)
    if largest is not None and budget is not None and sizes[largest] > budget:
        raise BudgetError(f"planning for {largest!r}", tier="the fastest", required_bytes=sizes[largest], budget_bytes=budget)


def _choose(
    accesses: Sequence[tuple[str, float]], sizes: Mapping[str, int], budget: int | None, fixed_bytes: int, slots: int
) -> frozenset[str]:
    """Return the keys that stay in a tier of `budget` bytes.

    Large entries need a large ring if they stream, so keeping them may pay although smaller ones are used as often: a few
    thresholds above which everything stays are tried.
    """
    keys = dict.fromkeys(key for key, _ in accesses)
    if budget is None or sum(sizes[key] for key in keys) <= budget:
        return frozenset(keys)
    thresholds = sorted({sizes[key] for key in keys}, reverse=True)[:_GIANTS]
    best: frozenset[str] = frozenset()
    fewest = None
    for threshold in [None, *thresholds]:
        forced = frozenset(key for key in keys if threshold is not None and sizes[key] >= threshold)
        chosen = _fill(accesses, sizes, budget, fixed_bytes, forced, slots)
        if chosen is None:
            break
        moved = sum(sizes[key] for key, _ in accesses if key not in chosen)
        if fewest is None or moved < fewest:
            best, fewest = chosen, moved
    return best


def _fill(
    accesses: Sequence[tuple[str, float]], sizes: Mapping[str, int], budget: int, fixed_bytes: int, forced: frozenset[str], slots: int
) -> frozenset[str] | None:
    """Return `forced` and what else stays beside it and a ring for the rest; None if `forced` leaves no room for a ring."""
    chosen = set(forced)
    free = budget - sum(sizes[key] for key in forced) - ring_for(accesses, sizes, forced, slots)
    if free < 0:
        return None if forced else frozenset()
    for group in _by_worth(accesses, sizes, forced, fixed_bytes):
        total = sum(sizes[key] for key in group)
        if total <= free:
            chosen |= group
            free -= total
        else:
            part = _spread(accesses, sizes, group, free)
            chosen |= part
            free -= sum(sizes[key] for key in part)
    # what stays no longer needs the ring: its room may hold more
    free = budget - sum(sizes[key] for key in chosen) - ring_for(accesses, sizes, chosen, slots)
    for key in dict.fromkeys(key for key, _ in accesses):
        if key not in chosen and sizes[key] <= free:
            chosen.add(key)
            free -= sizes[key]
    return frozenset(chosen)


def ring_for(accesses: Sequence[tuple[str, float]], sizes: Mapping[str, int], resident: Collection[str], slots: int = 2) -> int:
    """Return the bytes that streaming needs to hold any `slots` entries in a row: with two, one is fetched while one is used."""
    streamed = [key for key, _ in accesses if key not in resident]
    around = streamed + streamed[: slots - 1]
    windows = (set(around[start : start + slots]) for start in range(len(streamed)))
    return max((sum(sizes[key] for key in window) for window in windows), default=0)


def _by_worth(accesses: Sequence[tuple[str, float]], sizes: Mapping[str, int], forced: frozenset[str], fixed_bytes: int) -> list[set[str]]:
    """Return groups of keys, the most used per byte first; those too small to be worth a transfer come before all."""
    uses: dict[str, int] = {}
    for key, _ in accesses:
        uses[key] = uses.get(key, 0) + 1
    groups: dict[tuple[int, int], set[str]] = {}
    for key, count in uses.items():
        if key not in forced:
            small = sizes[key] < fixed_bytes
            groups.setdefault((int(small), count), set()).add(key)
    return [groups[worth] for worth in sorted(groups, reverse=True)]


def _spread(accesses: Sequence[tuple[str, float]], sizes: Mapping[str, int], group: set[str], free: int) -> set[str]:
    """Return keys of `group` of at most `free` bytes, such that the rest is spread evenly over the time of computing.

    A walk along the trace saves up time at each access; an entry streams when enough has been saved to pay for it.
    """
    once = dict(reversed(accesses))  # the first use of each key counts: later ones repeat the same order
    walk = [(key, once[key]) for key in dict.fromkeys(key for key, _ in accesses)]
    streamed = sum(sizes[key] for key in group) - free
    price = (sum(duration for _, duration in walk) or 1.0) / streamed  # seconds of computing for each byte that streams
    chosen: set[str] = set()
    saved, left = 0.0, free
    for key, duration in walk:
        saved += duration
        if key not in group:
            continue
        cost = sizes[key] * price
        if 2 * saved >= cost or sizes[key] > left:
            saved -= cost
        else:
            chosen.add(key)
            left -= sizes[key]
    return chosen
