"""One file that several threads read ranges of: from the page cache what it has, everything else around it.

[Note: asking the page cache]
A read with RWF_NOWAIT returns what is cached and else fails, but the kernel then starts to read the asked range into the
cache: a probe as large as the request made the device read all bytes twice (1.56 instead of 3.87 GB/s for 16 MiB files
that were not cached). So one page is asked first; that costs nothing measurable (3.85), and only if it is there the rest
is asked in steps. What a vain question began is thrown out of the cache again, or a second pass would find the probed
pages there and go on from them, until all of the file took memory twice. For cached files this way is 3 times as fast
as direct I/O (11.5 against 4.1 GB/s). Asking once per extent gained nothing over once per 8 MiB, nor did cachestat(2).
A file that was once found uncached is not asked about again as long as it is open: where memory is short, the reads that
vain questions begin cost more than a file is worth that somebody else brings into the cache.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol

from tierstore.errors import CorruptionError, StorageError
from tierstore.file_system import FileSystem

PAGE = 4096  # bytes; direct I/O needs offset, address and length in multiples of it
_STEP = 1 << 20  # bytes asked of the cache at once when the page before was there

_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)
_DIRECT: int | None = getattr(os, "O_DIRECT", None)
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
_SYSTEM = FileSystem()


class Readable(Protocol):
    """Bytes that several threads may read at once, and that stay as they are while anybody has them open.

    Who makes one has to `close` it, once, and so has everybody who was allowed to `share` it.
    """

    @property
    def direct(self) -> bool:
        """True if a read is known to go around the page cache, so that one large request keeps the device busy by itself."""

    def share(self) -> bool:
        """Let one more user have it; False if it is closed already."""

    def close(self) -> None:
        """End one user's use."""

    def read(self, memory: memoryview, offset: int) -> None:
        """Fill `memory` with the bytes from `offset` on; raise `CorruptionError` if they end before, `StorageError` if the device fails."""

    def read_cached(self, memory: memoryview, offset: int) -> None:
        """Like `read`, through the page cache and leaving there what was read, for small parts that are wanted again."""

    def fileno(self) -> int:
        """Return the descriptor to map from, valid as long as the caller has not closed this."""

    def keep(self) -> Callable[[], None]:
        """Let the bytes stay as they are for a map of them, also when everybody has closed this.

        What is returned ends that, once; it may be called in any thread at any moment, also inside the garbage collector.
        """


class OpenFile:
    """The file at `path`, a `Readable` that stays so when its name goes.

    The last user closes the descriptors. The lock is held only while the second descriptor, the one for direct I/O, is
    opened, and to count. With a `descriptor` the file is that one, which it takes over, and `path` is only what errors say;
    a file that was written around the cache is `cold` from the beginning.
    """

    def __init__(self, path: str, system: FileSystem = _SYSTEM, *, descriptor: int | None = None, cold: bool = False) -> None:
        self.path = path
        self._system = system
        self._lock = threading.Lock()
        self._users = 1
        self._cold = cold
        self._direct: int | None = None
        self._refused = _DIRECT is None
        self._buffered = system.open(path, os.O_RDONLY) if descriptor is None else descriptor
        if hasattr(os, "posix_fadvise"):  # nothing may be read ahead that is about to be read around the cache
            self._advise(0, 0, os.POSIX_FADV_RANDOM)

    @classmethod
    def of(cls, path: str, shared: Readable | None) -> Readable:
        """Return `shared` if it may still be shared, else the file at a path, opened; to be closed by the caller."""
        return shared if shared is not None and shared.share() else cls(path)

    @property
    def direct(self) -> bool:
        return self._cold and self._direct is not None and not self._refused

    def fileno(self) -> int:
        """Return the descriptor for ordinary reads and maps; valid as long as the caller has not closed the file."""
        return self._buffered

    def keep(self) -> Callable[[], None]:
        """Return what does nothing: a map of a file needs no descriptor, and nobody writes into a file that has a value."""
        return _nothing

    def share(self) -> bool:
        """Let one more user have it; False if it is closed already."""
        with self._lock:
            self._users += bool(self._users)
            return self._users > 0

    def close(self) -> None:
        """End one user's use."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        for descriptor in (self._buffered, self._direct):
            if descriptor is not None:
                with suppress(OSError):  # nothing was written through it, so nothing is lost
                    self._system.close(descriptor)

    def read(self, memory: memoryview, offset: int) -> None:
        """Fill `memory` with the bytes from `offset` on; raise `CorruptionError` if the file ends before."""
        cached, asked = (0, 0) if self._cold else self._read_cached(memory, offset)
        self._cold = self._cold or not cached
        self._read_all(self._read_on, memory[cached:], offset + cached)
        if cached < asked:
            # one page alone may be there only because the device was quick to answer the question
            self._uncache(offset + (cached if cached > PAGE else 0), offset + asked)

    def read_cached(self, memory: memoryview, offset: int) -> None:
        """Like `read`, through the page cache and leaving there what was read."""
        self._read_all(partial(self._system.read, self._buffered), memory, offset)

    def _read_all(self, read: Callable[[memoryview, int], int], memory: memoryview, offset: int) -> None:
        """Fill `memory` with a function that reads at least one byte, unless the file ends or the device fails."""
        position, failure = 0, None
        while position < len(memory):
            try:
                count = read(memory[position:], offset + position)
            except OSError as error:
                reason = f"reading {self.path} at byte {offset + position} failed: {error.strerror}"
                failure = StorageError(error.errno or errno.EIO, reason)
            if failure is not None:  # not with the system's error as its cause, whose frames would keep the memory alive
                raise failure
            if count == 0:
                raise CorruptionError("?", self.path, f"the file ends {len(memory) - position} bytes before the end of what was asked for")
            position += count

    def _read_cached(self, memory: memoryview, offset: int) -> tuple[int, int]:
        """Read what is cached from the start on; return how many bytes that were, and how many were asked for."""
        cached = asked = 0
        while _NOWAIT is not None and cached == asked < len(memory):
            asked = min(len(memory), asked + (_STEP if asked else PAGE))
            while cached < asked:
                try:
                    count = self._system.read(self._buffered, memory[cached:asked], offset + cached, _NOWAIT)
                except OSError:  # not there, or not supported; any other error comes again when the device is asked
                    count = 0
                if count == 0:
                    break
                cached += count
        return cached, asked

    def _read_on(self, memory: memoryview, offset: int) -> int:
        """Read from the device at least one byte of what `memory` has room for, unless the file ends here."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        to_border = -offset % PAGE
        if (address + to_border) % PAGE or len(memory) < to_border + PAGE:
            return self._read_buffered(memory, offset)
        if to_border:
            return self._read_buffered(memory[:to_border], offset)
        descriptor = self._direct_descriptor()
        if descriptor is not None:
            try:
                return self._system.read(descriptor, memory[: len(memory) // PAGE * PAGE], offset)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self._refused = True
        return self._read_buffered(memory, offset)

    def _read_buffered(self, memory: memoryview, offset: int) -> int:
        count = self._system.read(self._buffered, memory, offset)
        self._uncache(offset, offset + count)
        return count

    def _uncache(self, start: int, stop: int) -> None:
        """Drop pages of the cache that only this reader wanted: they would hold the same bytes a second time."""
        if hasattr(os, "posix_fadvise"):
            start -= start % PAGE  # the kernel drops whole pages only
            self._advise(start, stop + -stop % PAGE - start, os.POSIX_FADV_DONTNEED)

    def _advise(self, start: int, nbytes: int, advice: int) -> None:
        with suppress(OSError):  # advice that a file system does not take changes nothing
            self._system.advise(self._buffered, start, nbytes, advice)

    def _direct_descriptor(self) -> int | None:
        """Return the descriptor for direct I/O, or None where the file system has none."""
        if self._refused or _DIRECT is None:
            return None
        with self._lock:
            if self._direct is None:
                try:  # not by the path: the name may be gone, or another file's by now
                    self._direct = self._system.open(f"/proc/self/fd/{self._buffered}", os.O_RDONLY | _DIRECT)
                except OSError:
                    self._refused = True
            return self._direct


def _nothing() -> None:
    pass
