"""What a model would do under budgets, before anything is loaded: a pure function of its weights, budgets and speeds.

[Note: what it predicts]
The steady state of `policy="auto"` when one pass after the other uses every weight once, as the steps of decoding do: the
plan that the store itself would make. Prefill, activations, and what computing takes beside the reading of weights are not
in it, nor that rows are looked up one by one beyond the bytes of one row. Seconds are the least that a pass can take: the
busiest link, or computing, if everything else is hidden behind that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tierstore.outlook.weights import Part, Weight, Weights
from tierstore.patch.attach import SHARE_OF_SMALL, SMALL
from tierstore.patch.room import check_largest, smallest
from tierstore.pieces import parts_per_piece
from tierstore.planning.cycle import Cycle
from tierstore.planning.plan import Cost, Plan, plan
from tierstore.planning.schedule import FROM_FILES, TO_DEVICE

DISK = "disk"


@dataclass(frozen=True, slots=True)
class Rooms:
    """The memory to plan for: bytes of each tier above the disk, fastest first. `divided`: the fast one is RAM of the CPU."""

    nbytes: Mapping[str, int]
    divided: bool

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.nbytes, DISK)

    @property
    def links(self) -> tuple[str, ...]:
        return tuple(f"{below}->{above}" for above, below in zip(self.names, self.names[1:], strict=False))


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes per second of each link, and of weights through computing; None where that is not known."""

    links: Mapping[str, float | None]
    computing: float | None


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What a link carries in one pass: `nbytes` as they are in memory, `file_bytes` as they are read, and how long at least."""

    nbytes: int
    file_bytes: int
    copies: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Smallest:
    """Which fast tiers are enough, in bytes.

    Below `starts` (the largest weight) a session is refused. From `runs` on (all that one module owns, if it is used at
    once) every operation on the weights of one module has room. From `ahead` on the weight that is used next, or a piece of
    it, has room beside these, so that it can come while computing goes on. Activations on an accelerator come on top.
    """

    starts: int
    weight: str
    runs: int
    module: str
    ahead: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """One pass under `rooms`. `rest`: bytes of each weight by the tier that they stay in, or come from each time (the disk).

    `row_bytes`: read besides for the rows that one token looks up. `seconds`: at least; None if the speed of a link is not
    known, and without computing if that is not. `limit`: what takes that long, a link or "computing".
    """

    rooms: Rooms
    rest: Mapping[str, Mapping[str, int]]
    links: Mapping[str, LinkUse]
    rings: Mapping[str, int]
    row_bytes: int
    computing: float | None
    seconds: float | None
    limit: str | None

    @property
    def tiers(self) -> dict[str, int]:
        """Bytes by the tier in which they rest."""
        return {name: sum(by_tier.get(name, 0) for by_tier in self.rest.values()) for name in self.rooms.names}


def forecast(weights: Weights, rooms: Rooms, speeds: Speeds) -> Forecast:
    """Return what one pass costs. Raises `BudgetError` for a fast tier in which a session cannot start."""
    check_start(weights, rooms)
    budget = next(iter(rooms.nbytes.values()))
    held = {weight.name: weight.nbytes for weight in _held(weights, budget)}
    trace = [name for name in weights.trace if name not in held]
    divided = parts_per_piece(weights.part_bytes, budget, weights.nbytes) if rooms.divided and weights.nbytes > budget else None
    parts = {name: _pieces(weight, divided) for name, weight in weights.by_name.items()}
    cost = FROM_FILES if rooms.divided else TO_DEVICE
    made = _plan(trace, parts, [budget - sum(held.values()), *list(rooms.nbytes.values())[1:], None], speeds, cost)
    links = {link: _use(level, made, parts, rooms, speeds) for level, link in enumerate(rooms.links)}
    computing = None if speeds.computing is None else sum(weights.by_name[name].nbytes for name in weights.trace) / speeds.computing
    known = {link: use.seconds for link, use in links.items() if use.seconds is not None}
    whole = len(known) == len(links)
    known |= {} if computing is None else {"computing": computing}
    return Forecast(
        rooms=rooms,
        rest={name: _rest(parts[name], made, rooms, held=name in held) for name in weights.by_name},
        links=links,
        rings=dict(zip(rooms.nbytes, made.ring_bytes, strict=True)),
        row_bytes=sum(weight.row_bytes for weight in weights.by_name.values()) if weights.nbytes > budget else 0,
        computing=computing,
        seconds=max(known.values()) if whole else None,
        limit=max(known, key=lambda name: known[name]) if whole else None,
    )


def check_start(weights: Weights, rooms: Rooms) -> None:
    """Raise `BudgetError` for a fast tier in which a session cannot start."""
    check_largest(weights.by_name.values(), *next(iter(rooms.nbytes.items())))


def smallest_rooms(weights: Weights, *, divided: bool) -> Smallest:
    """Return which fast tiers are enough for a model."""
    largest, (module, owned) = weights.largest(), weights.largest_owner()
    finest = 1 if divided else None
    used = [(part, weights.by_name[name].owners[0]) for name in weights.trace for part in _pieces(weights.by_name[name], finest)]
    parts, together = [part for part, _ in used], {part.key: owner for part, owner in used}
    cycle = Cycle([part.key for part in parts], [0.0] * len(parts), {part.key: part.nbytes for part in parts}, together)
    return Smallest(largest.nbytes, largest.name, owned, module, max(owned, cycle.ring(frozenset(), 2)))


def _held(weights: Weights, budget: int) -> list[Weight]:
    """Return the weights that a session keeps in the fast tier for good: all of them if they fit, else small ones."""
    if weights.nbytes <= budget:
        return list(weights.by_name.values())
    room = min(budget // SHARE_OF_SMALL, budget - 2 * weights.largest_owner()[1])
    return smallest(weights.by_name.values(), room, SMALL)


def _pieces(weight: Weight, parts: int | None) -> tuple[Part, ...]:
    return weight.whole if parts is None else weight.pieces(parts)


def _plan(trace: Sequence[str], parts: Mapping[str, Sequence[Part]], budgets: list[int | None], speeds: Speeds, cost: Cost) -> Plan:
    """Make the plan that the store would make of this order."""
    sizes = {part.key: part.nbytes for some in parts.values() for part in some}
    together = {part.key: name for name, some in parts.items() if len(some) > 1 for part in some}
    keys = [part.key for name in trace for part in parts[name]]
    durations = [sizes[key] / (speeds.computing or 1e9) for key in keys]
    return plan(keys, sizes, budgets, durations, cost=cost, together=together)


def _use(level: int, made: Plan, parts: Mapping[str, Sequence[Part]], rooms: Rooms, speeds: Speeds) -> LinkUse:
    link = rooms.links[level]
    read = {part.key: part.file_bytes for some in parts.values() for part in some}
    file_bytes = sum(read[key] for key in made.order[level]) if link.startswith(DISK) else made.link_bytes[level]
    rate = speeds.links.get(link)
    seconds = file_bytes / rate if rate else (None if file_bytes else 0.0)
    return LinkUse(made.link_bytes[level], file_bytes, len(made.order[level]), seconds)


def _rest(parts: Sequence[Part], made: Plan, rooms: Rooms, *, held: bool) -> dict[str, int]:
    """Return where the parts of a weight rest: those of which the plan does not speak are in the fast tier, or only looked up."""
    found: dict[str, int] = {}
    for part in parts:
        name = rooms.names[0] if held else rooms.names[made.rest.get(part.key, len(rooms.names) - 1)]
        found[name] = found.get(name, 0) + part.nbytes
    return found
