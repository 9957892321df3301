"""Private maps of ranges of files, as tensors.

`mmap.mmap` keeps a descriptor for each of its maps (before Python 3.13), of which a process has 1024, and `torch.from_file`
maps files from their beginning only: so the system's own function is called.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import weakref
from typing import Any

import numpy as np
import torch

_FAILED = ctypes.c_void_p(-1).value


@functools.cache
def _system() -> tuple[Any, Any]:
    """Return the system's `mmap` and `munmap`."""
    library = ctypes.CDLL(None, use_errno=True)
    place, size, number, offset = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (place, size, number, number, number, offset)
    library.munmap.argtypes = (place, size)
    return library.mmap, library.munmap


def map_privately(path: str, descriptor: int, offset: int, nbytes: int) -> torch.Tensor:
    """Return a uint8 tensor over `nbytes` of an open file from `offset` on, copied on write; the map lasts as long as its storage.

    Raises `OSError` naming `path` if the system refuses. The file must not shrink while it is mapped.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset + nbytes - start
    do_map, unmap = _system()
    address = do_map(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, descriptor, start)
    if address == _FAILED:
        code = ctypes.get_errno() or errno.ENOMEM
        raise OSError(code, f"cannot be mapped ({os.strerror(code)})", path)
    memory = (ctypes.c_uint8 * nbytes).from_address(address + offset - start)
    array = np.ctypeslib.as_array(memory)
    weakref.finalize(memory, unmap, address, length).atexit = False  # the array keeps `memory`, and the storage the array
    return torch.from_numpy(array)
