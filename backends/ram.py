"""RAM in which the CPU computes: values may lie in pieces that come and go by themselves."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from tierstore.backend import DivisibleBackend, FileExtent
from tierstore.backends._spans import UNIT, Place, Spans, System, addresses
from tierstore.backends.memory import DeviceBackend
from tierstore.open_file import PAGE, OpenFile
from tierstore.spec import TensorSpec, typed_view

_WASTE = 32  # the last huge page of a divided value may stand for one in so many of its bytes


class RamBackend(DeviceBackend, DivisibleBackend):
    """Keeps tensors in RAM. What is live and what is kept for later is never more than the most that was ever live at once."""

    piece_bytes = 8 << 20

    def __init__(self) -> None:
        super().__init__("cpu")
        self._spans = Spans()
        self._places: dict[str, Place] = {}
        self._pieces: dict[int, list[str]] = {}  # their keys, by the address of the whole
        self._owners = weakref.WeakValueDictionary[int, npt.NDArray[np.uint8]]()  # what lives as long as the whole, by its address
        self._most = 0

    def divides(self, nbytes: int) -> bool:
        return nbytes >= UNIT and (-nbytes % UNIT) * _WASTE <= nbytes

    def reserve(self, nbytes: int, phase: int = 0) -> torch.Tensor:
        owner = addresses(nbytes, phase)
        memory = torch.from_numpy(owner)
        self._owners[memory.data_ptr()] = owner
        return memory

    def place(self, memory: torch.Tensor, pieces: Mapping[str, int]) -> None:
        start, array = 0, self._owners[memory.data_ptr()]  # not `memory.numpy()`, a tensor more of those that are counted
        for key, nbytes in pieces.items():
            self._places[key] = Place(array, start, nbytes)
            start += nbytes
        self._pieces[memory.data_ptr()] = list(pieces)

    def release(self, keys: Iterable[str]) -> None:
        for key in keys:
            place = self._places.pop(key, None)
            if place is not None:
                self._pieces.pop(place.address - place.start, None)

    def complete(self, memory: torch.Tensor, parts: Mapping[int, FileExtent | torch.Tensor]) -> None:
        for key in self._pieces.pop(memory.data_ptr(), ()):
            self._spans.hand_over(self._places.pop(key))
        for start, part in parts.items():
            nbytes = part.nbytes
            place = Place(memory.numpy(), start, nbytes)
            if isinstance(part, torch.Tensor):
                memory[start : start + nbytes].copy_(part)
            else:
                _show_file(place, part, self._owners[memory.data_ptr()])

    def allocate(self, key: str, spec: TensorSpec, phase: int = 0) -> torch.Tensor:
        place = self._places.get(key)
        if place is None:
            self._spans.collect()
            self._arena.limit(self._most - self._spans.held)
            tensor = super().allocate(key, spec, phase)
        else:
            memory = self._spans.fill(place)
            tensor = memory if spec.is_bytes else typed_view(memory, spec)
        self._most = max(self._most, self._arena.live_bytes + self._spans.live)
        if self._arena.held_bytes + self._spans.held > self._most:
            self._arena.limit(self._most - self._spans.held)
            self._spans.cool(self._arena.held_bytes + self._spans.held - self._most)
        return tensor

    def adopt(self, key: str, tensor: torch.Tensor) -> None:
        if key in self._places and tensor.data_ptr() != self._places[key].address:
            self.put(key, tensor)
        else:
            super().adopt(key, tensor)

    def trim(self) -> None:
        super().trim()
        self._spans.cool(self._spans.held)
        self._most = self._arena.live_bytes + self._spans.live

    def close(self) -> None:
        super().close()
        self._spans.cool(self._spans.held)


def _show_file(place: Place, extent: FileExtent, owner: npt.NDArray[np.uint8]) -> None:
    """Map a part of a file where a piece would lie, or read it where the file has it at another offset within a page.

    The file is told that it is mapped until `owner` dies. What has a checksum is read once to be checked. What is left of the
    first and the last page of a whole belongs to nobody else.
    """
    file = OpenFile.of(extent.path, extent.file)
    try:
        extent.prove(file)
        before = extent.offset % PAGE
        if before == place.address % PAGE:
            weakref.finalize(owner, file.keep()).atexit = False
            System().map(place.address - before, place.nbytes + before, file.fileno(), extent.offset - before)
        else:
            file.read(place.memory[place.start : place.start + place.nbytes].data, extent.offset)
    finally:
        file.close()
