"""Gives a model the values of a state dict, also where it is on the meta device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tierstore.errors import ModelError
from tierstore.patch.prestored import make_plain
from tierstore.patch.regions import named_tensors


def take_values(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Put the values of `state_dict` into the parameters and buffers of these names; other names in it are ignored.

    Tensors on the meta device become those of the state dict, without a copy; real ones are written to. Raises `ModelError` for
    another shape, or for a tensor on the meta device that gets no value; nothing has changed then.
    """
    named = list(named_tensors({"": model}))
    values = {id(tensor): (name, state_dict[name]) for name, tensor in reversed(named) if name in state_dict}
    for name, tensor in named:
        if id(tensor) not in values:
            _refuse_meta(name, tensor)
            continue
        source, value = values[id(tensor)]
        if value.shape != tensor.shape:
            raise ModelError(f"state_dict has {source!r} of shape {tuple(value.shape)}, and the model of shape {tuple(tensor.shape)}")
        _refuse_meta(source, value)
    for _, tensor in named:
        found = values.pop(id(tensor), None)
        if found is not None:
            _take(tensor, found[1])


def _refuse_meta(name: str, tensor: torch.Tensor) -> None:
    if tensor.device.type == "meta":
        raise ModelError(
            f"{name!r} is on the meta device and has no data; give its value in state_dict=, "
            "or load_checkpoint_and_dispatch(model, checkpoint, ...) instead"
        )


def _take(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if tensor.device.type == "meta":
        make_plain(tensor, value.detach())
        return
    with torch.no_grad():
        tensor.copy_(value)
