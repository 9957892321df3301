"""`dispatch_model` and `load_checkpoint_and_dispatch`: a model over several places, as accelerate has them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle

from tierstore.checkpoint.source import open_source
from tierstore.compat.device_map import Casts, DeviceMap, Sizes, bytes_by_place, check_device_map, fill_in_order, ram_for
from tierstore.compat.hooks import Dispatch, align
from tierstore.compat.inferring import dtype_of
from tierstore.compat.places import CPU, DISK, Name, Place, accelerators, device_of, place_of, read_max_memory
from tierstore.compat.values import take_values
from tierstore.devices import compute_device
from tierstore.errors import CheckpointError, ModelError, TierStoreError
from tierstore.patch.regions import check_modules
from tierstore.patch.watch import refuse_attached
from tierstore.session import tiered
from tierstore.sizes import Size

_WORDS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True, slots=True)
class Room:
    """Where a model computes, and the bytes of each tier above the disk; None leaves a tier out, or without limit where it computes.

    `gpu`: of several accelerators, by their indices.
    """

    device: torch.device
    gpu: int | dict[int, int] | None
    cpu: int | None

    @property
    def place(self) -> str:
        """What `tiered` takes as `device`."""
        return self.device.type if isinstance(self.gpu, dict) else str(self.device)

    def hooks(self, model: torch.nn.Module, skip: str | Sequence[str] | None) -> list[RemovableHandle]:
        """Let the model be called with tensors from anywhere; a session over several devices does that itself."""
        return [] if isinstance(self.gpu, dict) else align(model, self.device, back=True, skip=skip)


def dispatch_model(
    model: torch.nn.Module,
    device_map: DeviceMap,
    main_device: Name | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    offload_index: Mapping[str, object] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
) -> torch.nn.Module:
    """Run `model` with as much of it on the accelerator, in RAM and on disk as `device_map` says, and return it.

    `device_map` maps names of modules or tensors ("" is all) to an accelerator, "cpu" or "disk". What counts is how many
    bytes each of them gets: these are the budgets, and which weights are where within them follows from use. The place that
    computes gets room beside for what passes through, two of the largest layers, and RAM, if nothing is on disk, as much as
    is available. `model.hf_device_map` is the map as it was given; `model.tiered.tier_map` says where each tensor is now.

    `main_device`: where to compute; by default the accelerator in the map, else the CPU. With `main_device="cpu"`, what the map
    gives to an accelerator is RAM too. `offload_dir`: needed for "disk"; the file there has no name and goes with the session.
    `state_dict`: values that the model takes first. `skip_keys`: keyword arguments of the model's call that are not moved to the
    device. A map with one place other than "disk" moves the model there and starts no session, unless `force_hooks`.
    `offload_index` and `preload_module_classes` have no effect: values are the model's own, and any use of a weight is seen.

    Several accelerators each get consecutive layers, in proportion to these budgets, which may differ from the map's by some
    layers. Then tensors cross by themselves, results come back to where the inputs were, and `main_device`, unless it is the
    CPU, and `skip_keys` have no effect.

    Raises `ModelError` for a map that names what is not in the model or leaves something out, `TierStoreError` for a
    `main_device` that is not in it, `BackendError` for a device that does not work, all before anything changes.
    """
    check_modules({"": model})
    refuse_attached({"": model})
    places = check_device_map(model, device_map)
    _need_folder(places, offload_dir)
    device = _main_device(places.values(), main_device)
    single = set(places.values()) if len(set(places.values())) == 1 and DISK not in places.values() else set()
    if single and not force_hooks:
        take_values(model, state_dict or {})
        model.to(compute_device(device_of(single.pop())))
    else:
        sizes = Sizes(model, Casts())
        take_values(model, state_dict or {})
        room = room_by_map(sizes, places, device, ram_for(model), offload_buffers=offload_buffers)
        disk = offload_dir if DISK in places.values() else None
        session = tiered(model, gpu=room.gpu, cpu=room.cpu, disk=disk, device=room.place)
        Dispatch(model, session, room.hooks(model, skip_keys))
    model.hf_device_map = dict(device_map)  # type: ignore[assignment]
    return model


def load_checkpoint_and_dispatch(
    model: torch.nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: str | DeviceMap | None = None,
    max_memory: Mapping[Name, Size] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
    *,
    main_device: Name | None = None,
) -> torch.nn.Module:
    """Run `model` with its weights in `checkpoint`, which is the disk tier, and return it; nothing is read before it is used.

    So the checkpoint has to stay where it is, unchanged, as long as the session runs.

    `checkpoint`: a directory, a file of weights or the index of shards, as for `tiered(checkpoint=...)`; `dtype` casts on the way
    up. `device_map`: None loads the weights and starts no session; a map as for `dispatch_model`; or "auto", "balanced",
    "balanced_low_0" or "sequential", which all mean that `max_memory` gives the budgets (by default what
    is free), and `model.hf_device_map` is what `infer_auto_device_map` returns. What is written to weights goes to
    `offload_folder`, or beside the checkpoint, and vanishes with the session. `main_device`, `skip_keys`: as for
    `dispatch_model`; there is a session for every `device_map`.

    What the checkpoint lacks is an error for parameters on the meta device, and with `strict` for all; what the model lacks is
    a warning, or with `strict` an error. No effect have `no_split_module_classes`, `preload_module_classes` and `force_hooks`,
    since any use of a weight is seen; `offload_state_dict`, since no state dict is made; `full_state_dict`, since tensors
    are whole. Raises `CheckpointError` and what `dispatch_model` raises, before anything changes.
    """
    if broadcast_from_rank0:
        raise ModelError("broadcast_from_rank0=True needs several processes, which tierstore has no part in; leave it out")
    if isinstance(device_map, str) and device_map not in _WORDS:
        raise ModelError(f"device_map={device_map!r} is not known; give one of {', '.join(_WORDS)}, a map, or None")
    check_modules({"": model})
    refuse_attached({"": model})
    kind = dtype_of(dtype)
    if strict:
        _check_names(model, checkpoint)
    if device_map is None:
        with tiered(model, checkpoint=checkpoint, dtype=kind, disk=offload_folder, device="cpu"):
            return model
    sizes = Sizes(model, Casts(kind))
    if isinstance(device_map, str):
        memory = read_max_memory(max_memory)
        device = _main_device(map(place_of, memory), main_device)
        room = room_by_memory(sizes, memory, device)
        shown = fill_in_order(model, sizes, memory, offload_buffers=offload_buffers)
    else:
        places = check_device_map(model, device_map)
        device = _main_device(places.values(), main_device)
        room = room_by_map(sizes, places, device, sizes.total, offload_buffers=offload_buffers)
        shown = dict(device_map)
    session = tiered(model, gpu=room.gpu, cpu=room.cpu, disk=offload_folder, checkpoint=checkpoint, dtype=kind, device=room.place)
    Dispatch(model, session, room.hooks(model, skip_keys))
    model.hf_device_map = shown  # type: ignore[assignment]
    return model


# -- budgets ----------------------------------------------------------------------------------------------------------


def room_by_map(sizes: Sizes, places: Mapping[str, Place], device: torch.device, ram: int, *, offload_buffers: bool) -> Room:
    """Return budgets that hold what a device map gives to each place, and what passes through the one that computes.

    `ram`: what RAM may hold where nothing is on disk.
    """
    given = bytes_by_place(sizes, places)
    found = accelerators(given)
    fast: Place = found[0] if found else CPU
    passes = 0 if given.keys() == {fast} else sizes.passing(offload_buffers=offload_buffers)
    if not found and device.type == CPU:
        return Room(device, None, min(given.get(fast, 0) + passes, sizes.total))
    if DISK in given:
        ram = given.get(CPU, 0)
    below = (ram or None) if CPU in given else None
    if len(found) > 1:  # shares end between layers, the map's parts maybe elsewhere: a layer's room on each device lets them differ
        passes = sizes.largest if given.keys() == set(found) else passes
        return Room(device, {place.index or 0: min(given[place] + passes, sizes.total) for place in found}, below)
    return Room(device, min(given.get(fast, 0) + passes, sizes.total), below)


def room_by_memory(sizes: Sizes, memory: Mapping[Name, int], device: torch.device) -> Room:
    """Return the budgets that `max_memory` gives; RAM not more than the model takes."""
    by_place = {place_of(name): nbytes for name, nbytes in memory.items()}
    found = accelerators(by_place)
    ram = min(by_place[CPU], sizes.total) if CPU in by_place else None
    if len(found) > 1:
        return Room(device, {place.index or 0: by_place[place] for place in found}, ram)
    fast = found[0] if found else device
    return Room(device, None, ram) if not found and device.type == CPU else Room(device, by_place.get(fast), ram)


def _main_device(places: Iterable[Place], main_device: Name | None) -> torch.device:
    """Return the device that computes, of several the first, after checking that it works and is one of those named."""
    found = accelerators(places)
    device = found[0] if found else torch.device(CPU)
    if main_device is not None:
        device = device_of(main_device)
        if device.type != CPU and found and device not in found:
            names = ", ".join(map(str, found))
            raise TierStoreError(f"main_device={main_device!r} is not among the accelerators that get weights ({names}); name one of them")
    return compute_device(device)


def _need_folder(places: Mapping[str, Place], offload_dir: str | os.PathLike[str] | None) -> None:
    on_disk = [key for key, place in places.items() if place == DISK]
    if on_disk and offload_dir is None:
        raise ModelError(
            f"device_map puts {', '.join(key or 'everything' for key in on_disk[:5])} on disk; give offload_dir=, a directory for it"
        )


def _check_names(model: torch.nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` unless the checkpoint has exactly the tensors of the model's state dict, one name of tied ones at least."""
    source = open_source(checkpoint, None)
    try:
        names = set(source.tensors())
    finally:
        source.close()
    state = model.state_dict(keep_vars=True)
    found = {id(tensor) for name, tensor in state.items() if name in names}
    missing = [name for name, tensor in state.items() if id(tensor) not in found]
    unexpected = sorted(names - state.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"strict=True, and {checkpoint} does not match {type(model).__name__}: "
            f"missing {missing[:20]}, not in the model {unexpected[:20]}",
            missing=missing,
            unexpected=unexpected,
        )
