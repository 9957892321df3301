"""Writing around the page cache, from memory of any alignment, whatever the file system lacks."""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from tierstore.checksum import PIECE
from tierstore.file_system import FileSystem
from tierstore.open_file import PAGE

_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
_FLAGS = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)


class Slabs:
    """Aligned memory of one piece for whoever has data that direct I/O does not take; one slab is kept for the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: mmap.mmap | None = None

    @contextmanager
    def borrow(self) -> Iterator[memoryview]:
        """Lend a writable view of `PIECE` bytes at a page's border."""
        with self._lock:
            slab, self._spare = self._spare, None
        if slab is None:
            slab = mmap.mmap(-1, PIECE, flags=_FLAGS)
        try:
            yield memoryview(slab)
        finally:
            with self._lock:
                self._spare = slab


class DirectWriter:
    """Writes to one open file around the page cache; through it where the file system refuses that.

    Safe to call from several threads for different ranges. `slabs` is memory shared by all writers of a backend.
    """

    def __init__(self, system: FileSystem, descriptor: int, slabs: Slabs) -> None:
        self.descriptor = descriptor
        self._system = system
        self._slabs = slabs
        with suppress(OSError):
            system.set_direct(descriptor, direct=True)

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` from `offset` on, a multiple of `PAGE`, and zeros up to the end of its last page."""
        whole = len(data) // PAGE * PAGE if _aligned(data) else 0
        for start in range(0, whole, PIECE):
            self._write_pages(data[start : min(start + PIECE, whole)], offset + start)
        for start in range(whole, len(data), PIECE):
            self._write_copied(data[start : start + PIECE], offset + start)

    def write_together(self, head: bytes, data: memoryview, offset: int) -> None:
        """Write a head of whole pages and behind it `data` at one go; both fit into a piece."""
        with self._slabs.borrow() as slab:
            slab[: len(head)] = head
            self._write_pages(_padded(slab, data, len(head)), offset)

    def _write_copied(self, data: memoryview, offset: int) -> None:
        with self._slabs.borrow() as slab:
            self._write_pages(_padded(slab, data, 0), offset)

    def _write_pages(self, data: memoryview, offset: int) -> None:
        """Write whole aligned pages, going on after short writes: signals, quotas and network file systems make them."""
        done, refused = 0, False
        while done < len(data):
            try:
                count = self._system.write(self.descriptor, data[done:], offset + done)
            except OSError as error:
                if refused or error.errno not in _REFUSALS:
                    raise
                refused = True
                self._system.set_direct(self.descriptor, direct=False)
                continue
            if count == 0:
                raise OSError(errno.EIO, f"the device takes none of {len(data) - done} bytes")
            done += self._whole_pages(count, done, len(data))

    def _whole_pages(self, count: int, done: int, total: int) -> int:
        """Return how many of the `count` bytes just written need not be written again: direct I/O goes on at a page's border."""
        rest = (done + count) % PAGE
        if not rest or done + count == total:
            return count
        if count > rest:
            return count - rest
        self._system.set_direct(self.descriptor, direct=False)
        return count


def _aligned(data: memoryview) -> bool:
    return len(data) > 0 and np.frombuffer(data, np.uint8, 1).ctypes.data % PAGE == 0


def _padded(slab: memoryview, data: memoryview, start: int) -> memoryview:
    """Copy `data` into a slab from `start` on, and return the slab up to the end of the last page, zeros behind the data."""
    end = start + len(data)
    stop = end + -end % PAGE
    if len(data):  # through numpy, which lets other threads run meanwhile
        np.copyto(np.frombuffer(slab, np.uint8)[start:end], np.frombuffer(data, np.uint8))
    slab[end:stop] = bytes(stop - end)
    return slab[:stop]
