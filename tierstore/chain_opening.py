"""Opens the stores of several devices, each over its own fast tier and what is common, and starts the session over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tierstore.backend import SourceBackend
from tierstore.building import Disk, FastTier, closing_on_failure, disk_tier, memory_tier
from tierstore.chain import Chain, ChainTiered, Models
from tierstore.checkpoint.binding import Bound
from tierstore.checkpoint.dividing import present_to_all
from tierstore.patch.regions import Region, find_regions, named_tensors
from tierstore.patch.shares import Share, Shares, check_shares, share_out
from tierstore.planning.policy import PolicyFactory
from tierstore.registry import open_backend
from tierstore.running import Tiered
from tierstore.sharing import Common, divided
from tierstore.sizes import Size, parse_size
from tierstore.store import TieredStore
from tierstore.tier import Tier


class Rows(NamedTuple):
    """The tiers of each store, fastest first, and those among them that are common."""

    tiers: list[list[Tier]]
    commons: list[Common]


@dataclass(frozen=True, slots=True)
class Below:
    """What is below the fast tiers: `ram` bytes of memory, and the last tier with, for each store, the keys that it finds there."""

    ram: int | None
    last: Tier | None
    finds: Sequence[Callable[[str], bool]] = ()


def tiered_in_chain(
    models: Models, fast: Sequence[FastTier], cpu: Size | None, disk: Disk | None, policy: str | PolicyFactory, holders: Iterable[object]
) -> Tiered:
    """Start a session of `models` on several devices, as `tiered` describes it."""
    ram = None if cpu is None else parse_size(cpu)
    shares = _shares(models, find_regions(named_tensors(models)), fast, ram, _disk_bytes(disk))
    tops = [memory_tier(tier.name, tier.device, tier.nbytes) for tier in fast]
    if disk is None:
        return ChainTiered(models, _started(fast, shares, _rows(shares, tops, Below(ram, None)), policy), holders=holders)
    last = disk_tier(disk)
    with closing_on_failure(last.backend):
        found = frozenset(key for key, _ in last.entries())
        rows = _rows(shares, tops, Below(ram, last, [found.__contains__, *(frozenset[str]().__contains__ for _ in fast[1:])]))
    return ChainTiered(models, _started(fast, shares, rows, policy), others=found, holders=holders)


def over_checkpoint_in_chain(
    models: Models,
    source: SourceBackend,
    bound: Bound,
    fast: Sequence[FastTier],
    cpu: Size | None,
    policy: str | PolicyFactory,
    holders: Iterable[object],
) -> Tiered:
    """The same for a model whose weights `source` has; it is closed with the session, and if this fails."""
    with closing_on_failure(source):
        regions = find_regions(named_tensors(models))
        for region in regions:
            for binding in region.bindings:
                if id(binding.tensor) in bound.names:
                    region.spec = bound.recipes[bound.names[id(binding.tensor)]].spec  # as it will be, after casts
        ram = None if cpu is None else parse_size(cpu)
        shares = _shares(models, regions, fast, ram, None)
        tops = [memory_tier(tier.name, tier.device, tier.nbytes) for tier in fast]
        recipes = [{name: bound.recipes[name] for name in _names(part, bound)} for part in shares.parts]
        values = present_to_all(source, list(zip(recipes, tops, strict=True)))
        keys = [frozenset(key for value in found.values() for key in value.keys) for found in values]
        rows = _rows(shares, tops, Below(ram, Tier("disk", source), [own.__contains__ for own in keys]))
    stored = {name: value for found in values for name, value in found.items()}
    by_identity = {identity: stored[name] for identity, name in bound.names.items() if name in stored}
    return ChainTiered(models, _started(fast, shares, rows, policy), by_identity, holders=holders)


def _names(part: Share, bound: Bound) -> list[str]:
    ids = (id(binding.tensor) for region in part.regions for binding in region.bindings)
    return list(dict.fromkeys(bound.names[identity] for identity in ids if identity in bound.names))


def _disk_bytes(disk: Disk | None) -> int | None:
    """Return what the last tier may hold; None without limit."""
    if disk is None:
        return 0
    return parse_size(disk[1]) if isinstance(disk, tuple) else None


def _shares(models: Models, regions: Sequence[Region], fast: Sequence[FastTier], ram: int | None, disk: int | None) -> Shares:
    """Divide the model; `BudgetError` if a part of it has no room. `disk`: the bytes of the last tier, None without limit."""
    budgets = [tier.nbytes for tier in fast]
    shares = share_out(models, regions, budgets)
    names = ("+cpu" if ram is not None else "") + ("+disk" if disk else "")
    check_shares(shares, [tier.name for tier in fast], budgets, None if disk is None else (ram or 0) + disk, names)
    return shares


def _rows(shares: Shares, tops: Sequence[Tier], below: Below) -> Rows:
    """Return the tiers of each store, and those of them that are common."""
    rows = [[top] for top in tops]
    commons: list[Common] = []
    if below.ram is not None:
        commons.append(Common("cpu", open_backend("pinned"), below.ram))
        needs = shares.lacking([top.ledger.budget or 0 for top in tops])
        for row, part in zip(rows, divided(below.ram, needs, [part.nbytes for part in shares.parts]), strict=True):
            row.append(commons[-1].tier(part))
    if below.last is not None:
        commons.append(Common(below.last.name, below.last.backend, below.last.ledger.budget))
        for row, finds in zip(rows, below.finds, strict=True):
            row.append(commons[-1].tier(None, finds))
    return Rows(rows, commons)


def _started(fast: Sequence[FastTier], shares: Shares, rows: Rows, policy: str | PolicyFactory) -> Chain:
    """Open the stores; every tier is closed if one of them fails."""
    stores: list[TieredStore] = []
    try:
        for row in rows.tiers:
            stores.append(TieredStore(row, policy))  # noqa: PERF401  (what was opened has to be known when the next one fails)
    except BaseException:
        for store in stores:
            store.close(flush=False)
        for row in rows.tiers[len(stores) + 1 :]:  # the one that failed has closed its own
            for tier in row:
                tier.close()
        raise
    return Chain(stores, [tier.device for tier in fast], rows.commons, shares)
