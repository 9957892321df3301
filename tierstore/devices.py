"""Which device computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tierstore.errors import BackendError


def working_accelerator() -> torch.device | None:
    """Return the accelerator if it can allocate; a CUDA build on a machine without a GPU names one that cannot."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    try:
        torch.empty(1, device=accelerator)
    except (RuntimeError, AssertionError):
        return None
    return accelerator


def compute_device(device: str | torch.device | None) -> torch.device:
    """Return `device` with an index if it has several, after checking that it allocates; by default the accelerator, else the CPU."""
    try:
        chosen = torch.device(device) if device is not None else working_accelerator() or torch.device("cpu")
        place = torch.empty(1, device=chosen).device
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f'device {device} cannot be used here: {error}; give device="cpu" or a device that works') from error
    if place.type == "meta":
        raise BackendError('the meta device holds no data and cannot compute; give device="cpu" or a device that works')
    return place


def allocated_bytes(device: torch.device) -> Callable[[], int] | None:
    """Return what tells the bytes that tensors on `device` take; None for the CPU, whose memory torch does not count."""
    return None if device.type == "cpu" else partial(torch.accelerator.memory_allocated, device)


def release_cached(device: torch.device) -> None:
    """Give memory of `device` that torch keeps for later back to it."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def names_device(name: str | torch.device | int, device: torch.device) -> bool:
    """True if `name`, which may lack an index ("cuda"), means `device`."""
    asked = torch.device(name)
    if asked.type != device.type or asked.index == device.index or asked.type == "cpu":  # "cpu:0" is the CPU
        return asked.type == device.type
    return asked.index is None and device.index == torch.accelerator.current_device_index()
