"""Builds models without memory for their weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary


@contextmanager
def on_meta() -> Iterator[None]:
    """Put every parameter that this thread gives to a module inside on the meta device; buffers stay real.

    So a model that is larger than memory can be built, for `tiered(model, checkpoint=DIR)` to find its weights. A parameter
    set in several places stays one. What a module computes its buffers from must not be one of its own parameters.
    """
    thread = threading.get_ident()
    known = WeakTensorKeyDictionary()

    def to_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        if parameter is None or threading.get_ident() != thread:
            return None
        if parameter.device.type == "meta" or torch.nn.parameter.is_lazy(parameter):
            return None
        if parameter not in known:
            known[parameter] = _meta_like(parameter)
        return cast(torch.nn.Parameter, known[parameter])

    handle = register_module_parameter_registration_hook(cast(Callable[..., None], to_meta))  # it may return a parameter
    try:
        yield
    finally:
        handle.remove()


def _meta_like(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    meta = torch.Tensor._make_subclass(type(parameter), parameter.detach().to("meta"), parameter.requires_grad)
    meta.__dict__.update(parameter.__dict__)
    return meta
