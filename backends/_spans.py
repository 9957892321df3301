"""Addresses for values that lie in pieces: each piece comes and goes by itself, and all of them lie side by side.

[Note: memory that moves]
An operation wants its weight in one row of addresses, also while a part of it streams. So a value gets addresses for all of
it, which cost nothing, and memory only behind the pieces that are there. A piece that leaves takes its memory out of its
addresses, and a piece that comes needs memory in others: the kernel can move it (mremap; 8 us for 8 MiB of huge pages),
which is 60 times faster than giving it back and getting fresh pages, which have to be zeroed. Where the kernel cannot do
that without a moment in which the old addresses belong to nobody (before Linux 5.7), pages are given back and got anew.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from tierstore.backends._units import Units

UNIT = 2 << 20  # bytes; a huge page, which moves as a whole

_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0) | getattr(mmap, "MAP_NORESERVE", 0)
_ADVICE_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_MAP_FIXED = 0x10
_MAY_MOVE, _FIXED, _DO_NOT_UNMAP = 1, 2, 4  # of mremap(2)


def reserve(nbytes: int, phase: int = 0) -> torch.Tensor:
    """Return a uint8 tensor over addresses from `phase` bytes after the border of a huge page on, without memory.

    The addresses stay as long as a tensor over them lives. Raises `MemoryError` if the system refuses so many.
    """
    return torch.from_numpy(addresses(nbytes, phase))


def addresses(nbytes: int, phase: int = 0) -> npt.NDArray[np.uint8]:
    """Return what `reserve` makes its tensor of, and what lives as long as any tensor over it."""
    size = -(-(phase + nbytes) // UNIT) * UNIT
    try:
        region = mmap.mmap(-1, size + UNIT, flags=_PRIVATE)
    except OSError as error:
        raise MemoryError(f"the system refuses {nbytes} bytes of addresses: {error}") from error
    if _ADVICE_HUGE is not None:
        region.madvise(_ADVICE_HUGE)
    base = np.frombuffer(region, np.uint8, 1).ctypes.data
    return np.frombuffer(region, np.uint8, nbytes, -base % UNIT + phase)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a piece lies: `nbytes` from `start` on in `memory`, the array behind what `reserve` returned.

    It begins and ends at borders of huge pages, unless the piece is the first or the last one of a whole.
    """

    memory: npt.NDArray[np.uint8]
    start: int
    nbytes: int

    @cached_property
    def address(self) -> int:
        return int(self.memory.ctypes.data) + self.start

    @cached_property
    def units(self) -> tuple[int, int]:
        """The addresses of its huge pages, first and last."""
        stop = self.address + self.nbytes
        return self.address - self.address % UNIT, stop + -stop % UNIT


class Spans:
    """Memory for places. `live` and `held` count bytes, in whole huge pages.

    One lock guards all; it is held around system calls that take microseconds. A tensor may die anywhere, with any lock
    held, so its end is only noted, and seen by the next call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._units = Units(UNIT)
        self._ends: dict[int, weakref.finalize[[tuple[int, int, object]], object]] = {}  # by the address of each live tensor
        self._ended: deque[tuple[int, int, object]] = deque()
        self._system = System()

    @property
    def live(self) -> int:
        """Bytes behind tensors that are alive, or were when it was last looked at."""
        return self._units.live

    @property
    def held(self) -> int:
        """Bytes behind tensors, and free ones that are kept for later."""
        return self._units.live + self._units.warm

    def fill(self, place: Place) -> torch.Tensor:
        """Return a place as a uint8 tensor with memory behind it, whose contents are undefined.

        When the tensor has died, the memory may go elsewhere at once, also if other tensors over the same addresses live.
        """
        start, stop = place.units
        with self._lock:
            self._collect()
            for move in self._units.take(start, stop):
                self._system.move(move.source, move.target, move.nbytes)
        part = place.memory[place.start : place.start + place.nbytes]
        end = self._ends[start] = weakref.finalize(part, self._ended.append, (start, stop, place.memory))
        end.atexit = False
        return torch.from_numpy(part)

    def hand_over(self, place: Place) -> None:
        """Forget a place, which is not ours any more, and the memory in it: whoever has the addresses has that too."""
        start, stop = place.units
        with self._lock:
            self._collect()
            end = self._ends.pop(start, None)
            if end is not None and end.detach() is not None:
                self._units.live -= stop - start
            self._units.forget(start, stop)

    def collect(self) -> None:
        """See which tensors have died."""
        with self._lock:
            self._collect()

    def cool(self, excess: int) -> None:
        """Give at least `excess` bytes of free memory back to the system, as far as there are any."""
        with self._lock:
            self._collect()
            for move in self._units.cool(excess):
                self._system.discard(move.source, move.nbytes)

    def _collect(self) -> None:
        while self._ended:
            start, stop, owner = self._ended.popleft()
            self._ends.pop(start, None)
            self._units.give(start, stop, owner)


class System:
    """The system calls. Where memory cannot be moved, what was there is given back instead."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self._mmap = library.mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        self._madvise = library.madvise
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._mremap = getattr(library, "mremap", None) if sys.platform == "linux" else None
        if self._mremap is not None:
            self._mremap.restype = ctypes.c_void_p
            self._mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]

    def move(self, source: int, target: int, nbytes: int) -> None:
        """Put the memory behind one range of addresses behind another one."""
        flags = _MAY_MOVE | _FIXED | _DO_NOT_UNMAP
        if self._mremap is None or self._mremap(source, nbytes, nbytes, flags, target) != target:
            self.discard(source, nbytes)

    def discard(self, start: int, nbytes: int) -> None:
        """Give the memory behind a range back to the system; the addresses stay."""
        self._madvise(start, nbytes, mmap.MADV_DONTNEED)

    def map(self, start: int, nbytes: int, descriptor: int, offset: int) -> None:
        """Put a private map of a part of a file at addresses that are ours; `start` and `offset` are multiples of a page."""
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
        if self._mmap(start, nbytes, protection, flags, descriptor, offset) != start:
            raise OSError(ctypes.get_errno(), f"{nbytes} bytes of a file cannot be mapped")
