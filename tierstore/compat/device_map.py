"""Device maps: which part of a model counts for which place. They are made, checked and turned into budgets here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from tierstore.compat.places import CPU, DISK, Name, Place, accelerators, place_of
from tierstore.errors import ModelError, listed
from tierstore.machine.limits import available_ram
from tierstore.patch.regions import find_regions, named_tensors
from tierstore.patch.room import most_owned

DeviceMap = Mapping[str, Name]
_AT_ONCE = 4  # as many of the largest layers may be in the fast tier where it is not known how much there is
_SHOWN = 20  # names in a message


@dataclass(frozen=True, slots=True)
class Casts:
    """What weights become when they are loaded: floating ones `dtype`, those that `special` names another one."""

    dtype: torch.dtype | None = None
    special: Mapping[str, torch.dtype] | None = None

    def nbytes(self, name: str, tensor: torch.Tensor) -> int:
        """Return the bytes of a tensor after that."""
        dtype = (self.special or {}).get(name) or (self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype)
        return tensor.numel() * dtype.itemsize


class Sizes:
    """The bytes of a model's parameters and buffers; what is tied counts once, for the name that comes first."""

    def __init__(self, model: torch.nn.Module, casts: Casts) -> None:
        self.nbytes: dict[str, int] = {}
        self.first: dict[str, str] = {}  # by each name the first one of the same tensor
        owned: list[tuple[str, int]] = []
        names: dict[int, str] = {}
        for name, tensor in named_tensors({"": model}):
            first = self.first[name] = names.setdefault(id(tensor), name)
            if first == name:
                self.nbytes[name] = casts.nbytes(name, tensor)
            owned.append((name.rpartition(".")[0], self.nbytes[first]))
        self.largest = most_owned(owned)[1]
        self.total = sum(self.nbytes.values())
        self.buffers = sum(self.nbytes.get(name, 0) for name, _ in model.named_buffers())

    def passing(self, *, offload_buffers: bool) -> int:
        """Return the bytes of the place that computes through which what is not resident passes: two of the largest layers.

        One computes while the next one comes. And, if they are not to be offloaded, room for buffers.
        """
        return min(self.total, 2 * self.largest + (0 if offload_buffers else self.buffers))

    def generous(self, *, offload_buffers: bool) -> int:
        """Return the same where nobody says how much: four of the largest layers, if that is not more than half of the model."""
        more = min(_AT_ONCE * self.largest, self.total // 2) + (0 if offload_buffers else self.buffers)
        return max(self.passing(offload_buffers=offload_buffers), min(more, self.total))


def memory_of(model: torch.nn.Module) -> int:
    """Return the bytes that a store needs for all of a model: tensors that share memory count once."""
    return sum(region.spec.nbytes for region in find_regions(named_tensors({"": model})))


def ram_for(model: torch.nn.Module) -> int:
    """Return a budget of RAM for a model that has nothing below it: what is available, or what it takes already if that is more."""
    return max(memory_of(model), available_ram())


def covers(key: str, name: str) -> bool:
    """True if the key of a device map stands for the tensor or module called `name`."""
    return key in ("", name) or name.startswith(f"{key}.")


def check_device_map(model: torch.nn.Module, device_map: DeviceMap) -> dict[str, Place]:
    """Return the place of each key; `ModelError` if a key is not in the model, or a parameter or buffer of its state dict has none."""
    if not isinstance(device_map, Mapping):
        raise ModelError(
            f"device_map must map names of modules to places, got {device_map!r}; infer_auto_device_map(model, max_memory=...) makes one"
        )
    tensors = dict.fromkeys(name for name, _ in named_tensors({"": model}))
    known = {*tensors, *(name for name, _ in model.named_modules(remove_duplicate=False))}
    unknown = [key for key in device_map if key not in known]
    if unknown:
        names = listed(unknown, _SHOWN)
        raise ModelError(f"device_map names what is not in {type(model).__name__}: {names}; the keys are names of modules")
    lacking = [name for name in model.state_dict(keep_vars=True) if not any(covers(key, name) for key in device_map)]
    if lacking:
        names = listed(lacking, _SHOWN)
        raise ModelError(f"device_map gives no device for {names}; add these, a module that contains them, or the key '' for all")
    places = {key: place_of(name) for key, name in device_map.items()}
    accelerators(places.values())
    return places


def bytes_by_place(sizes: Sizes, places: Mapping[str, Place]) -> dict[Place, int]:
    """Return how many bytes the keys of a map give to each place; the longest key that covers a tensor counts."""
    found: dict[Place, int] = dict.fromkeys(places.values(), 0)
    for tensor, nbytes in sizes.nbytes.items():
        key = max((key for key in places if covers(key, tensor)), key=len, default=None)
        if key is not None:
            found[places[key]] += nbytes
    return found


class Filling:
    """Gives the modules of a model to places in order, and goes on to the next place where one is full.

    `rooms`: the bytes of each place by its name, the last one without limit.
    """

    def __init__(self, sizes: Sizes, rooms: Mapping[Name, int | None], *, merge: bool) -> None:
        self._sizes = sizes
        self._left = list(rooms.items())
        self._merge = merge
        self._given: dict[str, Name] = {}  # by the name of a tensor

    def fill(self, name: str, part: torch.nn.Module | torch.Tensor) -> dict[str, Name]:
        """Return a map for `part` of the model, which is called `name`."""
        tensors = self._tensors(name, part)
        new = {first for _, first in tensors if first not in self._given}
        nbytes = sum(self._sizes.nbytes[first] for first in new)
        place, room = self._left[0]
        children = list(_children(name, part))
        if room is not None and nbytes > room and children:
            found = {key: value for child, inner in children for key, value in self.fill(child, inner).items()}
            return {name: next(iter(found.values()))} if self._merge and len(set(found.values())) == 1 else found
        while room is not None and nbytes > room:
            self._left.pop(0)
            place, room = self._left[0]
        if room is not None:
            self._left[0] = place, room - nbytes
        if tensors and not new:
            place = self._given[tensors[0][1]]  # tied to what has its place
        self._given.update(dict.fromkeys(new, place))
        return {name: place}

    def _tensors(self, name: str, part: torch.nn.Module | torch.Tensor) -> list[tuple[str, str]]:
        return [(tensor, first) for tensor, first in self._sizes.first.items() if covers(name, tensor)]


def _children(name: str, part: torch.nn.Module | torch.Tensor) -> Iterator[tuple[str, torch.nn.Module | torch.Tensor]]:
    """Yield what a module is split into where it has modules inside: these, and its own tensors."""
    if isinstance(part, torch.Tensor) or not any(True for _ in part.children()):
        return
    prefix = f"{name}." if name else ""
    for key, tensor in (*part._parameters.items(), *part._buffers.items()):
        if tensor is not None:
            yield prefix + key, tensor
    for key, module in part.named_children():
        yield prefix + key, module


def rooms_for(sizes: Sizes, memory: Mapping[Name, int], *, offload_buffers: bool) -> dict[Name, int | None]:
    """Return the bytes of each place that modules can be given to: the place that computes keeps room for what passes through."""
    rooms: dict[Name, int | None] = {name: nbytes for name, nbytes in memory.items() if place_of(name) != DISK}
    first = next(iter(rooms), CPU)
    if first in memory and sizes.total > memory[first]:
        rooms[first] = max(memory[first] - sizes.passing(offload_buffers=offload_buffers), 0)
    return {**rooms, DISK: None}


def fill_in_order(
    model: torch.nn.Module, sizes: Sizes, memory: Mapping[Name, int], *, offload_buffers: bool, merge: bool = True
) -> dict[str, Name]:
    """Return a device map for `memory`, the bytes of each place by its name; what has no room anywhere goes to the disk."""
    return Filling(sizes, rooms_for(sizes, memory, offload_buffers=offload_buffers), merge=merge).fill("", model)
