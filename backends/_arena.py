"""CPU memory for large values: recycled huge pages, so that reading into it faults and zeroes nothing.

[Note: real memory]
A fresh page costs more than what is read into it (2.1 against 0.4 GB/s for the same reads), so ranges that come back stay
warm: the system's memory is left behind them for the next allocation. What is live and what is warm is never more than
the most that was ever live at once, so the arena needs to know no budget and still takes no more memory than its tier's
values did at their peak. Two things are not counted, because the system hides them: a huge page that is touched in part
is there as a whole (2 MiB at most at each border between warm and cold), and one that is given back in part is only
reclaimed when memory runs short.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tierstore.backends._intervals import Intervals

PAGE = max(4096, mmap.PAGESIZE)  # bytes; direct I/O needs addresses of this alignment
HUGE = 2 << 20  # bytes
_STEP = 1 << 30  # bytes of address space to ask for at least; without a page touched they cost nothing

_FLAGS = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)  # without them the map is shared: no huge pages
_DISCARD: int | None = getattr(mmap, "MADV_DONTNEED", None)
_HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)


class Arena:
    """Hands out memory as tensors and takes it back when a tensor's storage is gone, every view of it included.

    One lock guards all; it is held around system calls that take microseconds. A storage may die anywhere, with any lock
    held, so its end is only noted, and seen by the next call. Tensors outlive the arena.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranges = Intervals(grain=HUGE)
        self._regions: list[Region] = []
        self._returned: deque[int] = deque()

    def allocate(self, nbytes: int, phase: int = 0) -> torch.Tensor:
        """Return a uint8 tensor of `nbytes` with a storage of its own, `phase` (below 4096) bytes after a multiple of 4096.

        Its contents are undefined.
        """
        if not nbytes or _DISCARD is None:  # a system that cannot take memory back while the addresses stay
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        with self._lock:
            self._collect()
            start = self._take(-(-(phase + nbytes) // PAGE) * PAGE)
            region = self._region_at(start)
            # from_numpy's storage keeps this array until it dies, and nothing else knows it: it ends when the storage does
            token = region.array(start + phase, nbytes)
            weakref.finalize(token, _note_end, weakref.ref(self._returned), region, start, phase + nbytes).atexit = False
            self._cool()
        return torch.from_numpy(token)

    def limit(self, nbytes: int) -> None:
        """Let what is live and what is kept for later be `nbytes` at most, or as much as is live."""
        with self._lock:
            self._collect()
            self._ranges.peak = max(nbytes, self._ranges.live)
            self._cool()

    def trim(self) -> None:
        """Give all free memory back to the system, and allow only as much as is live now until more is."""
        with self._lock:
            self._collect()
            self._ranges.peak = self._ranges.live
            self._cool()
            self._regions = [region for region in self._regions if not self._ranges.remove(region.start, region.stop)]

    @property
    def live_bytes(self) -> int:
        """Bytes that are live."""
        with self._lock:
            self._collect()
            return self._ranges.live

    @property
    def held_bytes(self) -> int:
        """Bytes of memory behind what is live and what is kept for later."""
        return self._ranges.live + self._ranges.warm

    def _collect(self) -> None:
        while self._returned:
            self._ranges.give(self._returned.popleft())

    def _take(self, nbytes: int) -> int:
        start = self._ranges.take(nbytes)
        if start is None:
            # doubling: few maps, and none that is far larger than what the machine can be expected to grant
            region = Region.map(nbytes, max(_STEP, sum(region.stop - region.start for region in self._regions)))
            self._regions.append(region)
            self._ranges.add(region.start, region.stop)
            start = self._ranges.take(nbytes)
            assert start is not None
        return start

    def _cool(self) -> None:
        for start, stop in self._ranges.cool():
            self._region_at(start).discard(start, stop)

    def _region_at(self, address: int) -> Region:
        return next(region for region in self._regions if region.start <= address < region.stop)


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One anonymous private map; `start` to `stop` are the addresses in use, whole huge pages with a gap to any other region."""

    memory: mmap.mmap
    base: int
    start: int
    stop: int

    @classmethod
    def map(cls, nbytes: int, wished: int) -> Region:
        """Map `wished` bytes, or as few as hold `nbytes` where the system refuses more; raise `MemoryError` if it refuses these too."""
        needed = -(-nbytes // HUGE) * HUGE
        size = max(needed, wished // HUGE * HUGE)
        try:
            memory = mmap.mmap(-1, size + HUGE, flags=_FLAGS)
        except OSError as error:
            if size == needed:
                raise MemoryError(f"the system refuses {nbytes} bytes of memory: {error}") from error
            return cls.map(nbytes, 0)
        if _HUGE_PAGES is not None:
            with suppress(OSError):  # a kernel built without huge pages; ordinary ones are only slower
                memory.madvise(_HUGE_PAGES)
        base = np.frombuffer(memory, np.uint8, 1).ctypes.data
        start = -(-base // HUGE) * HUGE
        return cls(memory, base, start, start + size)

    def array(self, start: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return the memory from the address `start` on; it keeps the map alive."""
        return np.frombuffer(self.memory, np.uint8, nbytes, start - self.base)

    def discard(self, start: int, stop: int) -> None:
        """Give the memory between two addresses back to the system; the addresses stay."""
        if _DISCARD is not None:
            self.memory.madvise(_DISCARD, start - self.base, stop - start)


def _note_end(listener: weakref.ref[deque[int]], region: Region, start: int, nbytes: int) -> None:
    """Tell the arena that a storage has died; if it has died too, nobody will use the memory again.

    Takes no lock and allocates little: this runs in any thread at any moment, also inside the garbage collector.
    """
    returned = listener()
    if returned is None:
        region.discard(start, start + nbytes)
    else:
        returned.append(start)
