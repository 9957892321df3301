"""Private maps of ranges of files as tensors, which hold no descriptor and outlive everything they were made from."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable

import numpy as np
import torch

from tierstore.file_system import FileSystem


class _Window:
    """Mapped memory for numpy to look at; the map ends with the last array or tensor over it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


def map_range(system: FileSystem, descriptor: int, offset: int, nbytes: int, ended: Callable[[], None] | None = None) -> torch.Tensor:
    """Return a uint8 tensor over `nbytes` (not 0) of a file; writes to it stay private. `ended` is called when the last view is gone.

    Not with `mmap.mmap`, of whose maps each holds a descriptor before Python 3.13, nor with `torch.from_file`, which maps
    from the start of a file only. `ended` may be called in any thread at any moment, also inside the garbage collector:
    it takes no lock.
    """
    before = offset % mmap.ALLOCATIONGRANULARITY
    address = system.map(descriptor, offset - before, before + nbytes)
    window = _Window(address + before, nbytes)
    weakref.finalize(window, _end, system, address, before + nbytes, ended).atexit = False
    return torch.from_numpy(np.asarray(window))


def _end(system: FileSystem, address: int, nbytes: int, ended: Callable[[], None] | None) -> None:
    system.unmap(address, nbytes)
    if ended is not None:
        ended()
