"""Makes the tiers that a user asks for by size, out of the backends that are installed."""

from __future__ import annotations

import os

import torch

from tierstore.checksum import Verify
from tierstore.devices import compute_device, working_accelerator
from tierstore.errors import BackendError
from tierstore.registry import open_backend
from tierstore.sizes import Size, parse_size
from tierstore.tier import Tier


def choose_device(device: str | torch.device | None, gpu: Size | None) -> torch.device:
    """Return the device that computes; raise `BackendError` if a `gpu` tier is asked for where there is none."""
    if device is None and gpu is not None and working_accelerator() is None:
        raise BackendError('gpu= needs an accelerator, and none works here; leave gpu= out, or give device="cpu" to keep that tier in RAM')
    return compute_device(device)


def memory_tiers(device: torch.device, gpu: Size | None, cpu: Size | None) -> list[Tier]:
    """Return the tiers of memory, fastest first: one on an accelerator always, the others if they have a size."""
    gpu_size = None if gpu is None else parse_size(gpu)
    cpu_size = None if cpu is None else parse_size(cpu)
    on_device = gpu is not None or device.type != "cpu"
    tiers = [memory_tier("gpu", device, gpu_size)] if on_device else []
    if cpu is not None and on_device:
        tiers.append(Tier("cpu", open_backend("pinned"), cpu_size))
    elif cpu is not None:
        tiers.append(memory_tier("cpu", device, cpu_size))
    return tiers


def durable_tiers(
    path: str | os.PathLike[str], gpu: Size | None, cpu: Size | None, device: str | torch.device | None, verify: Verify
) -> list[Tier]:
    """Return the tiers of memory that have a size, and below them the disk store at `path`."""
    compute = torch.device("cpu") if gpu is None and device is None else choose_device(device, gpu)
    memory = memory_tiers(compute, gpu, cpu)  # first, since a bad size leaves nothing open then
    return [*memory, Tier("disk", open_backend("disk", path, verify=verify))]


def memory_tier(name: str, device: torch.device, size: Size | None) -> Tier:
    """Return a tier in the memory of `device`."""
    return Tier(name, open_backend("ram") if device.type == "cpu" else open_backend("device", device), size)
