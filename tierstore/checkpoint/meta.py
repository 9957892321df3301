"""Builds models without memory for their weights, or with their weights on a given device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary

from tierstore.devices import names_device


@contextmanager
def on_meta() -> Iterator[None]:
    """Put every parameter that this thread gives to a module inside on the meta device; buffers stay real.

    So a model that is larger than memory can be built, for `tiered(model, checkpoint=DIR)` to find its weights. A parameter
    set in several places stays one. What a module computes its buffers from must not be one of its own parameters.
    """
    with on_device(torch.device("meta")):
        yield


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Put every parameter that this thread gives to a module inside on `device`; buffers stay where they are."""
    thread = threading.get_ident()
    known = WeakTensorKeyDictionary()

    def moved(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        if parameter is None or threading.get_ident() != thread:
            return None
        if names_device(device, parameter.device) or torch.nn.parameter.is_lazy(parameter):
            return None
        if parameter not in known:
            known[parameter] = _on(device, parameter)
        return cast(torch.nn.Parameter, known[parameter])

    handle = register_module_parameter_registration_hook(cast(Callable[..., None], moved))  # it may return a parameter
    try:
        yield
    finally:
        handle.remove()


def _on(device: torch.device, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    copy = torch.Tensor._make_subclass(type(parameter), parameter.detach().to(device), parameter.requires_grad)
    copy.__dict__.update(parameter.__dict__)
    return copy
