"""Which value of a checkpoint belongs to which tensor of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tierstore.backend import SourceBackend
from tierstore.checkpoint.fit import Fit
from tierstore.checkpoint.lazy import CheckpointTensor, unread_tensors
from tierstore.checkpoint.library import load_as_its_library
from tierstore.patch.prestored import plain_like
from tierstore.patch.regions import named_tensors
from tierstore.patch.swap import replace_content
from tierstore.recipe import Recipe

Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Bound:
    """Which values a model's tensors on the meta device have: `names` by the ids of the tensors, `recipes` by these names."""

    names: Mapping[int, str]
    recipes: Mapping[str, Recipe]


def bind(model: torch.nn.Module, source: SourceBackend, dtype: torch.dtype | None) -> Bound:
    """Find a value for each tensor of `model` in a checkpoint.

    Floating weights are cast to `dtype`, or else to the dtype that they have
    in the model. Tensors that are real already get their values at once, like those that take no part in checkpoints.
    Raises `CheckpointError` naming everything that is missing or has another shape, and warns of what the checkpoint has
    too much of; nothing has changed then.
    """
    values, fit = load_as_its_library(model, source, dtype) or by_name(model, source, dtype)
    named = list(named_tensors({"": model}))
    found = {id(tensor): name for name, tensor in reversed(named) if name in values}
    fit.lacking([(name, tensor) for name, tensor in named if tensor.device.type == "meta" and id(tensor) not in found])
    fit.report()
    names: dict[int, str] = {}
    for _, tensor in named:
        name = found.pop(id(tensor), None)
        if name is not None and _waits(tensor, values[name]):
            names[id(tensor)] = name
    return Bound(names, {name: values[name].recipe for name in names.values()})  # type: ignore[attr-defined]


def _waits(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """True if a tensor is to be bound to an unread value; otherwise it has its value now."""
    if tensor.device.type == "meta":
        if not isinstance(value, CheckpointTensor):
            replace_content(tensor, plain_like(type(tensor), value, requires_grad=tensor.requires_grad))
        return isinstance(value, CheckpointTensor)
    if isinstance(value, CheckpointTensor):
        with torch.no_grad():
            if tensor.dtype != value.dtype:
                tensor.data = tensor.data.to(value.dtype)
            tensor.copy_(value.plain())
    return False


def by_name(model: torch.nn.Module, source: SourceBackend, dtype: torch.dtype | None) -> tuple[Values, Fit]:
    """Find values by the exact names of tensors, as `load_state_dict` does; tied tensors need one of their names."""
    unread = unread_tensors(source)
    fit = Fit(type(model).__name__, source)
    saved = model.state_dict(keep_vars=True)
    values: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors({"": model}):
        value = unread.pop(name, None) if name in saved or tensor.device.type == "meta" else None
        if value is None:
            continue
        if value.shape != tensor.shape:
            fit.mismatched(name, value.shape, tensor.shape)
        values[name] = value.to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
    fit.unexpected.extend(unread)
    return values, fit
