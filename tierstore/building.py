"""Makes the tiers that a user asks for by size, out of the backends that are installed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tierstore.backend import Backend
from tierstore.checksum import Verify
from tierstore.devices import compute_device, working_accelerator
from tierstore.errors import BackendError, SizeError
from tierstore.registry import backend_class, open_backend, open_url
from tierstore.sizes import Size, parse_size
from tierstore.tier import Tier

Disk = str | os.PathLike[str] | Backend | tuple[str | os.PathLike[str] | Backend, Size]
GpuSize = Size | Mapping[int, Size]
"""The bytes of the tier "gpu", or of that of each device, by its index, in the order of the layers that they get."""


@dataclass(frozen=True, slots=True)
class FastTier:
    """The memory of one of several devices: `nbytes` of it, in a tier called `name`."""

    name: str
    device: torch.device
    nbytes: int


def choose_device(device: str | torch.device | None, gpu: Size | None) -> torch.device:
    """Return the device that computes; raise `BackendError` if a `gpu` tier is asked for where there is none."""
    if device is None and gpu is not None and working_accelerator() is None:
        raise BackendError('gpu= needs an accelerator, and none works here; leave gpu= out, or give device="cpu" to keep that tier in RAM')
    return compute_device(device)


def choose_devices(device: str | torch.device | None, gpu: Mapping[int, Size]) -> tuple[FastTier, ...]:
    """Return the fast tiers of several devices, in the order given; `device` may say of which type, or be the CPU for all of them.

    Raises `BackendError` for an index that is none, or that no device has, and `SizeError` for a size.
    """
    if not gpu:
        raise BackendError('gpu={} names no device; give {0: "8GiB", 1: "8GiB"}, one size, or leave gpu= out')
    for index in gpu:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise BackendError(f'gpu= has the key {index!r}, which is no index of a device; give {{0: "8GiB", 1: "8GiB"}}')
    sizes = {index: _size_of(index, size) for index, size in gpu.items()}
    kind = _kind_of_all(device)
    return tuple(FastTier(f"gpu:{index}", _device_at(kind, index), nbytes) for index, nbytes in sizes.items())


def _size_of(index: int, size: Size) -> int:
    try:
        nbytes = parse_size(size)
    except SizeError as error:
        raise SizeError(f"gpu[{index}]: {error}") from error
    if not nbytes:
        raise SizeError(f"gpu[{index}] is 0 bytes, and every operation needs some; leave device {index} out")
    return nbytes


def _kind_of_all(device: str | torch.device | None) -> str:
    """Return the type of device that all of several are of."""
    chosen = choose_device(None, 1) if device is None else torch.device(device)
    if device is not None and chosen.index is not None and chosen.type != "cpu":
        raise BackendError(
            f"device={str(device)!r} is one device, and gpu= names several by their indices; give device={chosen.type!r} or none"
        )
    return chosen.type


def _device_at(kind: str, index: int) -> torch.device:
    if kind in ("cpu", "meta"):
        return compute_device(kind)
    try:
        count = int(torch.get_device_module(kind).device_count())
    except (RuntimeError, AttributeError) as error:
        raise BackendError(f'device={kind!r} has no devices with indices here ({error}); give device="cpu" or one that works') from error
    if index >= count:
        raise BackendError(f"gpu= names device {index}, and there are {count} of type {kind!r} here; give indices below {count}")
    return compute_device(torch.device(kind, index))


def disk_tier(disk: Disk) -> Tier:
    """Return the tier for what `disk=` says: a directory for scratch files, a URL or a backend, maybe with a size."""
    place, size = disk if isinstance(disk, tuple) else (disk, None)
    budget = None if size is None else parse_size(size)
    if isinstance(place, Backend):
        return Tier("disk", place, budget)
    text = os.fspath(place)
    if "://" not in text:
        return Tier("disk", backend_class("disk").scratch(Path(text)), budget)  # type: ignore[attr-defined]
    return Tier("disk", open_url(text), budget)


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


@contextmanager
def closing_on_failure(backend: Backend) -> Iterator[None]:
    """Close `backend` if what is done with it fails."""
    try:
        yield
    except BaseException:
        backend.close()
        raise
