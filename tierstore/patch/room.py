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
    def name(self) -> str: ...
    @property
    def spec(self) -> TensorSpec: ...


S = TypeVar("S", bound=_Sized)


def check_largest(weights: Iterable[_Sized], tier: str, budget: int | None, hint: str = "") -> None:
    """Raise `BudgetError` if one of `weights` has no room in the fastest tier: no operation on it could run."""
    largest = max(weights, key=lambda weight: weight.spec.nbytes, default=None)
    if budget is not None and largest is not None and largest.spec.nbytes > budget:
        operation = f"any operation on {largest.name!r}"
        raise BudgetError(operation, tier=tier, required_bytes=largest.spec.nbytes, budget_bytes=budget, hint=hint)


def check_room(tiers: Sequence[Tier], regions: Sequence[Region]) -> None:
    """Raise `BudgetError` before anything moves if one tensor, or all of them, can never fit."""
    fastest = tiers[0]
    check_largest(regions, fastest.name, fastest.ledger.budget)
    budgets = [tier.ledger.budget for tier in tiers]
    total = sum(region.spec.nbytes for region in regions)
    if None not in budgets and total > (room := sum(b for b in budgets if b is not None)):
        names = "+".join(tier.name for tier in tiers)
        raise BudgetError("the model", tier=names, required_bytes=total, budget_bytes=room, hint="raise a budget, or add disk=PATH")


def largest_owner(regions: Iterable[Region]) -> int:
    """Return the most bytes that one module owns directly."""
    owners = (({name.rpartition(".")[0] for b in region.bindings for name in b.names}, region.spec.nbytes) for region in regions)
    return most_owned((owner, nbytes) for names, nbytes in owners for owner in names)[1]


def most_owned(owned: Iterable[tuple[str, int]]) -> tuple[str, int]:
    """Return the module that owns the most bytes, and these bytes, from pairs of a module and what it owns."""
    totals: dict[str, int] = {}
    for owner, nbytes in owned:
        totals[owner] = totals.get(owner, 0) + nbytes
    return max(totals.items(), key=lambda item: item[1], default=("", 0))


def smallest(regions: Iterable[S], room: int, most: int) -> list[S]:
    """Return the smallest of `regions`, none larger than `most` bytes, as many as `room` bytes hold together."""
    found = []
    for region in sorted(regions, key=lambda region: region.spec.nbytes):
        room -= region.spec.nbytes
        if region.spec.nbytes > most or room < 0:
            break
        found.append(region)
    return found
