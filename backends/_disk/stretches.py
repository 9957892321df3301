"""One file without a name, and ranges of it that are handed out and come back.

[Note: ranges in use]
A range is used again only when its value is gone, nobody reads it, and no map of it is left: what a caller was given
stays as it is. Space that is free is kept for the next values up to a share of what is in use, and beyond that given back
to the file system as holes. The file is never made shorter, since maps beyond its end would kill the process.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from tierstore.backends._disk.direct import DirectWriter, WritePool
from tierstore.backends._disk.maps import map_range
from tierstore.backends._intervals import Intervals
from tierstore.file_system import FileSystem
from tierstore.open_file import PAGE, OpenFile

_ADDRESSES = 8 << 40  # bytes; what is not used costs nothing, and file systems allow files of this size
_SPARE = 64 << 20  # bytes that are kept for the next values at least
_SPARE_SHARE = 8  # and of what is in use, one part in so many
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


class Stretch:
    """A range of a scratch file: a `Readable`, in use until everybody who holds it has let go."""

    def __init__(self, file: ScratchFile, start: int, nbytes: int) -> None:
        self.start = start
        self.nbytes = nbytes
        self.holders = 1
        self._file = file

    @property
    def direct(self) -> bool:
        return self._file.file.direct

    def share(self) -> bool:
        return self._file.hold(self, reading=True)

    def close(self) -> None:
        self._file.let_go(self, reading=True)

    def read(self, memory: memoryview, offset: int) -> None:
        self._file.file.read(memory, offset)

    def read_cached(self, memory: memoryview, offset: int) -> None:
        self._file.file.read_cached(memory, offset)

    def fileno(self) -> int:
        return self._file.file.fileno()

    def keep(self) -> Callable[[], None]:
        return self._file.keep(self)

    def release(self) -> None:
        """The value is gone, or another one has taken its place."""
        self._file.let_go(self)

    def map(self) -> torch.Tensor:
        """Return a private map of the bytes, which may outlive the file's descriptors."""
        return self._file.map(self)


class ScratchFile:
    """A file without a name in `folder`, whose space comes back by itself when the process ends.

    Safe to call from several threads. The lock is held around bookkeeping, and while space is given back to the system.
    """

    def __init__(self, folder: Path, system: FileSystem) -> None:
        self._system = system
        self._lock = threading.Lock()
        self._ranges = Intervals(grain=PAGE)
        self._ranges.add(0, _ADDRESSES)
        self._ended: deque[Stretch] = deque()  # whose maps were dropped; noted without a lock, wherever that happens
        writing, reading = _open_twice(folder, system)
        self.file = OpenFile(f"{folder} (a scratch file without a name)", system, descriptor=reading, cold=True)
        self._pool = WritePool()
        self._writer = DirectWriter(system, writing, self._pool)

    def store(self, data: memoryview) -> Stretch:
        """Write `data` where nobody needs what was there; on failure nothing is taken."""
        stretch = self._take(len(data))
        try:
            self._writer.write(data, stretch.start)
        except BaseException:
            stretch.release()
            raise
        return stretch

    def hold(self, stretch: Stretch, *, reading: bool = False) -> bool:
        """Add a holder, if there is still one; one that is `reading` also keeps the file open."""
        with self._lock:
            if not stretch.holders or (reading and not self.file.share()):
                return False
            stretch.holders += 1
            return True

    def let_go(self, stretch: Stretch, *, reading: bool = False) -> None:
        """End what one holder began."""
        with self._lock:
            self._count_down(stretch)
        if reading:
            self.file.close()

    def keep(self, stretch: Stretch) -> Callable[[], None]:
        """Add a holder, and return what ends it without taking the lock: the range is free when the next one is taken."""
        self.hold(stretch)
        return partial(self._ended.append, stretch)

    def map(self, stretch: Stretch) -> torch.Tensor:
        if not stretch.nbytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        ended = self.keep(stretch)
        try:
            return map_range(self._system, self.file.fileno(), stretch.start, stretch.nbytes, ended)
        except BaseException:
            ended()
            raise

    def close(self) -> None:
        """Give the space back as soon as the last map is gone too."""
        self._pool.close()
        self.file.close()
        with suppress(OSError):  # whatever that is, nobody wants the bytes any more
            self._system.close(self._writer.descriptor)

    def _take(self, nbytes: int) -> Stretch:
        size = max(PAGE, nbytes + -nbytes % PAGE)
        with self._lock:
            while self._ended:
                self._count_down(self._ended.popleft())
            backed = self._ranges.warm
            start = self._ranges.take(size)
            if start is None:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            backed -= self._ranges.warm
        if backed < size:
            self._reserve(start, size)
        return Stretch(self, start, nbytes)

    def _reserve(self, start: int, size: int) -> None:
        """Make sure of disk space for a range that was taken, or give it back."""
        try:
            self._system.reserve(self._writer.descriptor, start, size)
        except BaseException:
            with self._lock:
                self._punch(start, size)
                self._ranges.give(start, warm=False)
            raise

    def _count_down(self, stretch: Stretch) -> None:
        stretch.holders -= 1
        if stretch.holders:
            return
        ranges = self._ranges
        ranges.give(stretch.start)
        ranges.peak = ranges.live + max(_SPARE, ranges.live // _SPARE_SHARE)
        for start, stop in ranges.cool():
            self._punch(start, stop - start)

    def _punch(self, start: int, size: int) -> None:
        with suppress(OSError):  # the space comes back later, at the latest when the process ends
            self._system.punch(self._writer.descriptor, start, size)


def _open_twice(folder: Path, system: FileSystem) -> tuple[int, int]:
    """Return two descriptors of a new file without a name: one to write with, one to read and map with."""
    directory = system.open(str(folder), os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            return _open_unnamed(directory, system)
        except OSError as error:
            if error.errno not in _NO_UNNAMED:
                raise
        return _open_unlinked(directory, system)
    finally:
        system.close(directory)


def _open_unnamed(directory: int, system: FileSystem) -> tuple[int, int]:
    writing = system.open_unnamed(directory)
    try:
        return writing, system.open(f"/proc/self/fd/{writing}", os.O_RDONLY)
    except BaseException:
        system.close(writing)
        raise


def _open_unlinked(directory: int, system: FileSystem) -> tuple[int, int]:
    """Make a file with a name and take the name away at once, where the system has no other way."""
    name = f".tierstore-scratch-{secrets.token_hex(8)}"
    writing = system.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, folder=directory, mode=0o600)
    try:
        reading = system.open(name, os.O_RDONLY, folder=directory)
    except BaseException:
        system.close(writing)
        raise
    finally:
        system.unlink(directory, name)
    return writing, reading
