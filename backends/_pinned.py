"""Page-locked memory for values of any size: exact where torch's own rounds up to powers of two, and given back in whole regions.

[Note: regions]
Locking pages takes the driver a tenth of a second for each GiB, and longer by far where it has to fault them in itself, so
memory is mapped, touched by several threads and registered in large steps, and ranges that come back are used again. A
region can only be unlocked as a whole: it goes when nothing in it is used and the rest of the arena has a step's worth of
free memory without it. So free memory is at most one step, apart from gaps between values that are in use.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tierstore.backends._arena import HUGE, PAGE, Region
from tierstore.backends._intervals import Intervals

_STEP = 256 << 20  # bytes
_MOST_THREADS = 8  # that touch pages: the system's own work on them does not get faster with more


class PageLockError(OSError):
    """Memory that the driver refuses to lock."""


@dataclass(frozen=True, slots=True)
class Locking:
    """How to lock the pages from an address on (bytes; returns an error code, 0 for none), and how to unlock them."""

    lock: Callable[[int, int], int]
    unlock: Callable[[int], object]


class PinnedArena:
    """Hands out page-locked memory as tensors and takes it back when a tensor's storage is gone, every view of it included.

    It grows by `step` bytes, or by what one value needs. One lock guards all; it is held while a region is made, which
    takes a tenth of a second or more. A storage may die anywhere, so its end is only noted, and seen by the next call.
    Tensors outlive the arena.
    """

    def __init__(self, locking: Locking, step: int = _STEP) -> None:
        self._locking = locking
        self._step = step
        self._lock = threading.Lock()
        self._ranges = Intervals()
        self._regions: list[_LockedRegion] = []
        self._returned: deque[int] = deque()

    def allocate(self, nbytes: int, phase: int = 0) -> torch.Tensor:
        """Return a uint8 tensor of `nbytes` with a storage of its own, in whole pages, `phase` bytes after the border of one.

        Its contents are undefined.
        Raises `PageLockError`, with nothing changed, if no more memory can be locked.
        """
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        with self._lock:
            self._collect()
            start = self._take(-(-(phase + nbytes) // PAGE) * PAGE)
            region = next(region for region in self._regions if region.start <= start < region.stop)
            # from_numpy's storage keeps this array until it dies, and nothing else knows it: it ends when the storage does
            token = region.array(start + phase, nbytes)
            weakref.finalize(token, _note_end, weakref.ref(self._returned), region, start).atexit = False
            self._shrink(self._step)
        return torch.from_numpy(token)

    def trim(self) -> None:
        """Unlock every region in which nothing is used, and give it back to the system."""
        with self._lock:
            self._collect()
            self._shrink(0)

    @property
    def held_bytes(self) -> int:
        """Bytes that are locked."""
        return sum(region.stop - region.start for region in self._regions)

    @property
    def free_bytes(self) -> int:
        """Bytes of them that nobody uses, or used when it was last looked at."""
        return self.held_bytes - self._ranges.live

    def _collect(self) -> None:
        while self._returned:
            self._ranges.give(self._returned.popleft())

    def _take(self, nbytes: int) -> int:
        start = self._ranges.take(nbytes)
        if start is None:
            self._grow(nbytes)
            start = self._ranges.take(nbytes)
            assert start is not None
        return start

    def _grow(self, nbytes: int) -> None:
        """Add a region that holds `nbytes` and makes a step's worth of free memory, or just `nbytes` if that is refused."""
        try:
            region = _LockedRegion(self._locking, nbytes, self._step - self.free_bytes)
        except PageLockError:
            self._shrink(0)
            region = _LockedRegion(self._locking, nbytes, nbytes)
        self._regions.append(region)
        self._ranges.add(region.start, region.stop)

    def _shrink(self, allowed: int) -> None:
        """Give regions back in which nothing is used until no more than `allowed` bytes are free, or none is left."""
        for region in sorted(self._regions, key=lambda region: region.stop - region.start, reverse=True):
            if self.free_bytes > allowed and self._ranges.remove(region.start, region.stop):
                self._regions.remove(region)


class _LockedRegion:
    """Memory that is locked for as long as anything refers to this; `start` and `stop` are its addresses."""

    def __init__(self, locking: Locking, nbytes: int, wished: int) -> None:
        self._region = Region.map(nbytes, max(wished, 0))
        self.start = self._region.start
        self.stop = self._region.stop
        _touch(self.array(self.start, self.stop - self.start))
        error = locking.lock(self.start, self.stop - self.start)
        if error:
            raise PageLockError(error, f"{self.stop - self.start} bytes of memory cannot be page-locked (error {error} of the driver)")
        weakref.finalize(self, locking.unlock, self.start).atexit = False  # runs before the map is gone

    def array(self, start: int, nbytes: int) -> npt.NDArray[np.uint8]:
        return self._region.array(start, nbytes)


def _touch(memory: npt.NDArray[np.uint8]) -> None:
    """Have the system put memory behind all addresses, with several threads."""
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    part = -(-len(memory) // threads // HUGE) * HUGE
    with ThreadPoolExecutor(threads, thread_name_prefix="tierstore-touch") as pool:
        list(pool.map(lambda start: memory[start : start + part : PAGE].fill(0), range(0, len(memory), part)))


def _note_end(listener: weakref.ref[deque[int]], region: _LockedRegion, start: int) -> None:
    """Tell the arena that a storage has died; if it has died too, the region goes with its last storage.

    Takes no lock: this runs in any thread at any moment, also inside the garbage collector.
    """
    returned = listener()
    if returned is not None:
        returned.append(start)


# -- CUDA -----------------------------------------------------------------------------------------------------------------


def cuda_locking() -> Locking:
    """Return how CUDA locks pages, for all its devices and contexts."""
    return Locking(_register, _unregister)


def _register(address: int, nbytes: int) -> int:
    error = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 1))  # type: ignore[no-untyped-call]  # 1: for every context
    if error:
        _clear_error()
    return error


def _unregister(address: int) -> None:
    if int(torch.cuda.cudart().cudaHostUnregister(address)):  # type: ignore[no-untyped-call]
        _clear_error()


def _clear_error() -> None:
    """Have CUDA forget an error that was met: the next kernel would report it as its own."""
    try:
        torch.full((1,), 1, device="cuda")
    except RuntimeError:
        return
