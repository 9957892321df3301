"""Writing around the page cache, from memory of any alignment, whatever the file system lacks."""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import numpy as np

from tierstore.checksum import PIECE
from tierstore.file_system import FileSystem
from tierstore.open_file import PAGE

SLAB = 2 << 20  # bytes: a huge page

_THREADS = 4
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
_FLAGS = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)

T = TypeVar("T")


class WritePool:
    """Threads that write the pieces of large values, and aligned memory for data that direct I/O does not take as it lies.

    For all writers of a backend, and safe to call from several threads. Threads start when there is something for them to
    do, and end with `close`; one slab for each is kept for the next, whose memory the system may have when it is short of any.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tierstore-write")
        self._lock = threading.Lock()
        self._spare: list[mmap.mmap] = []

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    @contextmanager
    def running(self, *acts: Callable[[], T]) -> Iterator[list[Callable[[], T]]]:
        """Run these in other threads for the length of a `with`, at whose end each has ended, or will never begin.

        So what they work on, memory and descriptors, is free again, also after an error. Call what is yielded for the result
        of each: that runs here what no thread has had time for.
        """
        pending: list[Future[T]] = []
        try:
            pending.extend(self._threads.submit(act) for act in acts)
            yield [partial(_result, future, act) for future, act in zip(pending, acts, strict=True)]
        finally:
            for future in [future for future in pending if not future.cancel()]:
                future.exception()

    @contextmanager
    def slab(self) -> Iterator[memoryview]:
        """Lend a writable view of `SLAB` bytes at a page's border."""
        with self._lock:
            slab = self._spare.pop() if self._spare else None
        if slab is None:
            slab = mmap.mmap(-1, SLAB, flags=_FLAGS)
            with suppress(AttributeError, OSError):  # the device takes many small pages at half the speed, and works all the same
                slab.madvise(mmap.MADV_HUGEPAGE)
        try:
            yield memoryview(slab)
        finally:
            with suppress(AttributeError, OSError):  # where the system cannot take it back when it needs to, the slab keeps its memory
                slab.madvise(mmap.MADV_FREE)
            with self._lock:
                if len(self._spare) < _THREADS:
                    self._spare.append(slab)


class DirectWriter:
    """Writes to one open file around the page cache; through it where the file system refuses that.

    Safe to call from several threads for different ranges.
    """

    def __init__(self, system: FileSystem, descriptor: int, pool: WritePool) -> None:
        self.descriptor = descriptor
        self._system = system
        self._pool = pool
        with suppress(OSError):
            system.set_direct(descriptor, direct=True)

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` from `offset` on, a multiple of `PAGE`, and zeros up to the end of its last page.

        Several pieces are written at the same time: one request at a time leaves a fast device waiting for the next.
        """
        first, *others = self._pieces(data, offset)
        with self._pool.running(*others) as written:
            _end(first, written)

    def write_beside(self, data: memoryview, offset: int, act: Callable[[], T]) -> T:
        """Do the same, and `act` in another thread as soon as no piece is left for it to write; return what that returns."""
        first, *others = self._pieces(data, offset)
        with self._pool.running(*others) as written, self._pool.running(act) as (acted,):
            _end(first, written)
            return acted()

    def _pieces(self, data: memoryview, offset: int) -> list[Callable[[], None]]:
        """Return what writes each piece, at least one."""
        return [partial(self._write_piece, data[start : start + PIECE], offset + start) for start in range(0, len(data), PIECE) or [0]]

    def _write_piece(self, data: memoryview, offset: int) -> None:
        whole = len(data) // PAGE * PAGE if _aligned(data) else 0
        self._write_pages(data[:whole], offset)
        for start in range(whole, len(data), SLAB):
            with self._pool.slab() as slab:
                self._write_pages(_padded(slab, data[start : start + SLAB], 0), offset + start)

    def write_together(self, head: bytes, data: memoryview, offset: int) -> None:
        """Write a head of whole pages and behind it `data` at one go; both fit into a slab."""
        with self._pool.slab() as slab:
            slab[: len(head)] = head
            self._write_pages(_padded(slab, data, len(head)), offset)

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


def _end(first: Callable[[], None], others: Iterable[Callable[[], None]]) -> None:
    """Write the first piece, and wait until the others are written."""
    first()
    for wait in others:
        wait()


def _result(future: Future[T], act: Callable[[], T]) -> T:
    return act() if future.cancel() else future.result()


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
