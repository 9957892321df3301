"""Tensors on the meta device whose values the store has already: they are wrapped around them, or loaded, without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from tierstore.entry import Entry
from tierstore.errors import BudgetError, ModelError
from tierstore.patch.ops import Geometry
from tierstore.patch.regions import Region, StoredValue
from tierstore.patch.swap import replace_content
from tierstore.spec import raw_bytes
from tierstore.writing import Moves


def find_stored(regions: Iterable[Region], stored: Mapping[int, StoredValue]) -> None:
    """Note in each region where the store has its bytes, if `stored` says so of its tensors, by their ids."""
    for region in regions:
        found = {stored.get(id(binding.tensor)) for binding in region.bindings}
        value = found.pop()
        if found:
            names = [name for binding in region.bindings for name in binding.names]
            raise ModelError(f"{names} share memory on the meta device, but not one value; make them separate parameters first")
        if value is None:
            continue
        region.stored, region.base, region.spec = value, None, value.spec
        for binding in region.bindings:
            binding.geometry = Geometry(region.spec, 0)
            binding.device = torch.device("cpu")  # where a checkpoint is, and where its maps will be


def load_and_hold(moves: Moves, regions: Iterable[Region]) -> dict[Region, Entry]:
    """Make stored regions plain and resident for good; none of them if they do not fit together."""
    values = {region: region.stored for region in regions}
    entries = {region: moves.entries[value.keys[0]] for region, value in values.items() if value is not None and value.memory is None}
    with moves.lock:
        try:
            moves.acquire(list(entries.values()), "loading")
        except BudgetError:
            return {}
        for entry in entries.values():
            moves.hold(entry)
        moves.release(list(entries.values()))
    for region, entry in entries.items():
        for binding in region.bindings:
            assert entry.tensor is not None
            replace_content(binding.tensor, plain_like(binding.kind, entry.tensor, requires_grad=binding.tensor.requires_grad))
    return entries


def plain_like(kind: type[torch.Tensor], value: torch.Tensor, *, requires_grad: bool) -> torch.Tensor:
    """Return a tensor of class `kind` over the memory of `value`; what is written to one is counted as written to the other."""
    with torch.inference_mode(False), torch.no_grad():
        if issubclass(kind, torch.nn.Parameter):
            return torch.Tensor._make_subclass(kind, value, requires_grad)
        return value.detach().requires_grad_(requires_grad)


def make_plain(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Let `tensor`, of whatever class, be a plain tensor or parameter over the memory of `value`; it needs gradients as before."""
    kind = torch.nn.Parameter if isinstance(tensor, torch.nn.Parameter) else torch.Tensor
    replace_content(tensor, plain_like(kind, value, requires_grad=tensor.requires_grad))


def note_writes(moves: Moves, entry: Entry) -> None:
    """Find out whether a value that was plain for a while is still what lower tiers have: writes through `.data` leave no trace."""
    with moves.lock:
        below = [level for level in sorted(entry.tiers) if level > 0]
    if not below:
        return
    home = moves.tiers[below[0]].backend.get(entry.key)
    assert entry.tensor is not None
    if not torch.equal(raw_bytes(home), raw_bytes(entry.tensor).to(home.device)):
        with moves.lock:
            moves.outdate(entry)
