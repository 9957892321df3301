"""Sums over the tensors of a model: whether it can be placed at all, what one module needs, and what is small."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from tierstore.errors import BudgetError
from tierstore.patch.regions import Region
from tierstore.spec import TensorSpec
from tierstore.tier import Tier


class _Sized(Protocol):
    @property
    def spec(self) -> TensorSpec: ...


S = TypeVar("S", bound=_Sized)


def check_room(tiers: Sequence[Tier], regions: Sequence[Region]) -> None:
    """Raise `BudgetError` before anything moves if one tensor, or all of them, can never fit."""
    fastest = tiers[0]
    budget = fastest.ledger.budget
    largest = max(regions, key=lambda region: region.spec.nbytes, default=None)
    if budget is not None and largest is not None and largest.spec.nbytes > budget:
        raise BudgetError(f"any operation on {largest.name!r}", tier=fastest.name, required_bytes=largest.spec.nbytes, budget_bytes=budget)
    budgets = [tier.ledger.budget for tier in tiers]
    total = sum(region.spec.nbytes for region in regions)
    if None not in budgets and total > (room := sum(b for b in budgets if b is not None)):
        names = "+".join(tier.name for tier in tiers)
        raise BudgetError("the model", tier=names, required_bytes=total, budget_bytes=room, hint="raise a budget, or add disk=PATH")


def largest_owner(regions: Iterable[Region]) -> int:
    """Return the most bytes that one module owns directly."""
    owned: dict[str, int] = {}
    for region in regions:
        for owner in {name.rpartition(".")[0] for binding in region.bindings for name in binding.names}:
            owned[owner] = owned.get(owner, 0) + region.spec.nbytes
    return max(owned.values(), default=0)


def smallest(regions: Iterable[S], room: int, most: int) -> list[S]:
    """Return the smallest of `regions`, none larger than `most` bytes, as many as `room` bytes hold together."""
    found = []
    for region in sorted(regions, key=lambda region: region.spec.nbytes):
        room -= region.spec.nbytes
        if region.spec.nbytes > most or room < 0:
            break
        found.append(region)
    return found
