"""Which device has which part of a model: consecutive modules in their order of registration, cut between modules.

A cut goes to the border of modules that is nearest to where the budgets would have it. Of a module that a border lies in,
the ends serve if they are near enough; else the search goes on inside. The elements of a list of alike modules, such as the
blocks of a transformer, are kept whole unless one of them alone is most of a share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from tierstore.errors import BudgetError
from tierstore.patch.regions import Region
from tierstore.patch.room import check_largest

_NEAR = 16  # an end of a module is near enough within one of so many parts of a share
_NEAR_BLOCK = 2  # the same for the ends of one of many alike modules
_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)
_MANY = 3  # children of one class that are taken for alike, where they do not stand in a list


@dataclass(eq=False, slots=True)
class Share:
    """What one device has. A module is where its own tensors are, or, without any, between its neighbours."""

    regions: list[Region] = field(default_factory=list)
    modules: list[torch.nn.Module] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(region.spec.nbytes for region in self.regions)


@dataclass(eq=False, slots=True)
class Shares:
    """One share for each device, and by module the devices, as positions, of all the weights in it; none for one without weights."""

    parts: list[Share]
    places: dict[torch.nn.Module, tuple[int, ...]]

    def lacking(self, budgets: Sequence[int]) -> list[int]:
        """Return how many bytes of each share have no room on its device."""
        return [max(part.nbytes - budget, 0) for part, budget in zip(self.parts, budgets, strict=True)]


@dataclass(eq=False, slots=True)
class _Node:
    """A module at its first place in the tree, `start` to `stop` in the order of all modules; its own tensors come first."""

    module: torch.nn.Module | None
    start: int
    stop: int = 0
    block: bool = False
    children: list[_Node] = field(default_factory=list)


def share_out(roots: Mapping[str, torch.nn.Module], regions: Sequence[Region], budgets: Sequence[int]) -> Shares:
    """Divide a model among devices with these budgets of bytes, in proportion, or so that each part fits where that can be.

    Tensors that share memory are in one share, with the first of them. What a module owns is in one share, unless it is
    tied to several.
    """
    tree = _Tree(roots, regions)
    cuts = tree.fitting(budgets) if tree.total <= sum(budgets) else None
    return tree.cut(tree.proportional(budgets) if cuts is None else cuts, len(budgets))


def check_shares(shares: Shares, tiers: Sequence[str], budgets: Sequence[int], below: int | None, names: str) -> None:
    """Raise `BudgetError` if a tensor is larger than its device's budget, or a share than that and the tiers below together.

    `below`: the bytes of those, None without limit; `names` is what to call them.
    """
    for part, tier, budget in zip(shares.parts, tiers, budgets, strict=True):
        check_largest(part.regions, tier, budget, f"raise the budget of {tier!r}, or give the devices in another order")
    over = shares.lacking(budgets)
    if below is not None and sum(over) > below:
        worst = max(range(len(over)), key=over.__getitem__)
        regions = shares.parts[worst].regions
        raise BudgetError(
            f"the part of the model from {regions[0].name!r} to {regions[-1].name!r}", tier=tiers[worst] + names,
            required_bytes=shares.parts[worst].nbytes, budget_bytes=budgets[worst] + below,
            hint=f"raise the budget of {tiers[worst]!r} or one below it, or add disk=PATH",
        )  # fmt: skip


class _Tree:
    """The modules of a model in order, each with the bytes of those of its own tensors that no module before it has."""

    def __init__(self, roots: Mapping[str, torch.nn.Module], regions: Sequence[Region]) -> None:
        self._region_of = {id(binding.tensor): region for region in regions for binding in region.bindings}
        self._order: list[torch.nn.Module | None] = [None]
        self._seen: set[torch.nn.Module] = set()
        self.root = _Node(None, 0)
        for module in roots.values():
            self._add(self.root, module)
        self.root.stop = len(self._order)
        self._firsts = list(self._new_regions())
        self.own = [sum(region.spec.nbytes for region in first) for first in self._firsts]
        self.before = [0, *accumulate(self.own)]
        self.total = self.before[-1]

    def _add(self, parent: _Node, module: torch.nn.Module) -> None:
        if module in self._seen:
            return
        self._seen.add(module)
        node = _Node(module, len(self._order))
        self._order.append(module)
        parent.children.append(node)
        for child in module.children():
            self._add(node, child)
        node.stop = len(self._order)
        kinds = Counter(type(inner.module) for inner in node.children if inner.children)
        enough = 2 if isinstance(module, _LISTS) else _MANY
        for inner in node.children:
            inner.block = kinds[type(inner.module)] >= enough

    def _tensors(self, module: torch.nn.Module | None) -> Iterator[torch.Tensor]:
        if module is not None:
            yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)

    def _owned(self, module: torch.nn.Module | None) -> list[Region]:
        """Return the regions of a module's own tensors; what autograd computed has none."""
        found = (self._region_of.get(id(tensor)) for tensor in self._tensors(module))
        return list(dict.fromkeys(region for region in found if region is not None))

    def _new_regions(self) -> Iterator[list[Region]]:
        seen: set[Region] = set()
        for module in self._order:
            new = [region for region in self._owned(module) if region not in seen]
            seen.update(new)
            yield new

    # -- where to cut: positions in the order of modules, each the first one of the next share ------------------------

    def proportional(self, budgets: Sequence[int]) -> list[int]:
        """Return the cuts that come nearest to shares in proportion to the budgets."""
        borders = [self.total * part // sum(budgets) for part in accumulate(budgets)][:-1]
        share = self.total * min(budgets) // sum(budgets)
        cuts: list[int] = []
        for border in borders:
            cuts.append(max(self._nearest(self.root, border, share), cuts[-1] if cuts else 0))
        return cuts

    def _nearest(self, node: _Node, border: int, share: int) -> int:
        """Return the best place for a cut inside a node that contains `border`, a number of bytes from the beginning."""
        for child in node.children:
            first, last = self.before[child.start], self.before[child.stop]
            if not first <= border <= last:
                continue
            near = share // (_NEAR_BLOCK if child.block else _NEAR)
            if min(border - first, last - border) <= near or not child.children:
                return child.start if border - first < last - border else child.stop
            return self._nearest(child, border, share)
        return node.start if node.start == self.root.start else node.start + 1  # the border lies in its own tensors

    def fitting(self, budgets: Sequence[int]) -> list[int] | None:
        """Return cuts with which every share is within its budget, if possible without one inside a block; None if there are none."""
        cuts = self.proportional(budgets)
        if self._fits(cuts, budgets):
            return cuts
        for whole in (True, False):
            cuts = self._filled(self._pieces(self.root, whole=whole), budgets)
            if self._fits(cuts, budgets):
                return cuts
        return None

    def _fits(self, cuts: Sequence[int], budgets: Sequence[int]) -> bool:
        borders = [0, *cuts, len(self._order)]
        shares = (self.before[stop] - self.before[start] for start, stop in pairwise(borders))
        return all(share <= budget for share, budget in zip(shares, budgets, strict=True))

    def _pieces(self, node: _Node, *, whole: bool) -> Iterator[tuple[int, int]]:
        """Yield the stretches of modules that stay together: blocks if they are to stay `whole`, else single modules."""
        if whole and node.block:
            yield node.start, node.stop
            return
        yield node.start, node.start + 1
        for child in node.children:
            yield from self._pieces(child, whole=whole)

    def _filled(self, pieces: Iterator[tuple[int, int]], budgets: Sequence[int]) -> list[int]:
        """Return the cuts that fill one device after the other."""
        cuts: list[int] = []
        begun = 0
        for start, stop in pieces:
            if len(cuts) < len(budgets) - 1 and self.before[stop] - self.before[begun] > budgets[len(cuts)]:
                cuts.append(start)
                begun = start
        return cuts + [len(self._order)] * (len(budgets) - 1 - len(cuts))

    # -- the shares ----------------------------------------------------------------------------------------------

    def cut(self, cuts: Sequence[int], count: int) -> Shares:
        """Return the shares: modules by their positions, but what is tied to an earlier one is with that."""
        parts = [Share() for _ in range(count)]
        home: dict[Region, int] = {}
        for position, module in enumerate(self._order):
            owned = self._owned(module)
            part = next((home[region] for region in owned if region in home), sum(position >= cut for cut in cuts))
            for region in owned:
                if region not in home:
                    home[region] = part
                    parts[part].regions.append(region)
            if module is not None:
                parts[part].modules.append(module)
        places: dict[torch.nn.Module, tuple[int, ...]] = {}
        for module in self._order:
            if module is not None:
                found = {home[region] for inner in module.modules() for region in self._owned(inner)}
                places[module] = tuple(sorted(found))
        return Shares(parts, places)
