"""What accelerate calls devices: an accelerator by its index or name, "cpu", or "disk"; and how much of each may be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from tierstore.devices import working_accelerator
from tierstore.errors import BackendError, TierStoreError
from tierstore.machine.limits import available_ram
from tierstore.sizes import Size, parse_size

Name = int | str | torch.device
Place = torch.device | str
"""An accelerator, or one of the two below."""

CPU = "cpu"
DISK = "disk"
_SHARE_FOR_WEIGHTS = 0.9  # of an accelerator's free memory where nobody says how much; activations need the rest


def place_of(name: Name) -> Place:
    """Return the place that `name` means; `BackendError` naming the accepted forms if it means none."""
    if name in (CPU, DISK):
        return str(name)
    try:
        device = torch.device("meta") if isinstance(name, bool) else _named(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type == CPU:
        return CPU
    if device.type == "meta":
        raise BackendError(f'{name!r} is no place for weights; give the index of an accelerator, its name ("cuda:0"), "cpu" or "disk"')
    return device if device.index is not None else torch.device(device.type, 0)


def device_of(name: Name) -> torch.device:
    """Return the device that `name` means; `BackendError` for "disk", where nothing computes."""
    place = place_of(name)
    if place == DISK:
        raise BackendError('nothing computes on "disk"; give the index or name of an accelerator, or "cpu"')
    return torch.device(place)


def accelerators(places: Iterable[Place]) -> list[torch.device]:
    """Return the accelerators among `places`, in their order; `TierStoreError` if they are of several types."""
    found = list(dict.fromkeys(place for place in places if isinstance(place, torch.device)))
    if len({place.type for place in found}) > 1:
        raise TierStoreError(f"accelerators of several types ({', '.join(map(str, found))}) cannot share a model; name those of one type")
    return found


def read_max_memory(max_memory: Mapping[Name, Size] | None) -> dict[Name, int]:
    """Return the bytes that each place may take, by the names that the caller gave: accelerators first, then RAM, then disk.

    Without `max_memory`, nine tenths of what is free on the accelerator that works, and the RAM that is available.
    """
    if max_memory is None:
        return _free_memory()
    places = {name: place_of(name) for name in max_memory}
    accelerators(places.values())
    sizes = {name: parse_size(size) for name, size in max_memory.items()}
    order = {CPU: 1, DISK: 2}
    return {name: sizes[name] for name in sorted(sizes, key=lambda name: order.get(str(places[name]), 0))}


def _free_memory() -> dict[Name, int]:
    accelerator = working_accelerator()
    sizes: dict[Name, int] = {CPU: available_ram()}
    if accelerator is None:
        return sizes
    free = torch.accelerator.get_memory_info(accelerator)[0]
    index = accelerator.index if accelerator.index is not None else torch.accelerator.current_device_index()
    return {index: int(free * _SHARE_FOR_WEIGHTS), **sizes}


def _named(name: Name) -> torch.device:
    if not isinstance(name, int):
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cuda" if accelerator is None else accelerator.type, name)
