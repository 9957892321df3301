"""`init_empty_weights` and `init_on_device`: where the tensors of a new model are made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tierstore.checkpoint.meta import on_device


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Put every parameter that is given to a module inside on the meta device, and with `include_buffers` every tensor made.

    By default buffers are real, or as the environment variable ACCELERATE_INIT_INCLUDE_BUFFERS says. Buffers that no
    checkpoint has must be real.
    """
    with init_on_device(torch.device("meta"), include_buffers):
        yield


@contextmanager
def init_on_device(device: torch.device | str | int, include_buffers: bool | None = None) -> Iterator[None]:
    """The same for any device: what is made inside by this thread is on `device` when it is given to a module."""
    if include_buffers is None:
        include_buffers = os.environ.get("ACCELERATE_INIT_INCLUDE_BUFFERS", "").lower() in ("1", "true", "yes", "on", "y", "t")
    with torch.device(device) if include_buffers else on_device(torch.device(device)):
        yield
