"""How fast a disk is read: around the page cache, and out of it; measured shortly, with nothing left behind."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tierstore.errors import BackendError

_REQUEST, _THREADS = 8 << 20, 4
_MOST = 256 << 20  # bytes that are read at most
_LEAST = 16 << 20  # bytes below which a figure would say nothing
_SECONDS = 1.0
_SHARE_OF_FREE = 4  # a temporary file takes at most one of so many parts of the free space
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Bytes per second with 4 requests of 8 MiB at a time: `device` around the page cache (None: the file system refuses
    that), `cached` from it (None: not measured)."""

    device: float | None
    cached: float | None


def folder_speed(folder: Path, nbytes: int | None = None) -> DiskSpeed:
    """Measure the file system of `folder` with a file of up to `nbytes`, which has no name and ends with the process at the latest.

    Raises `BackendError` if nothing can be written there.
    """
    if not folder.is_dir():
        raise BackendError(f"{folder} is no directory; give one that is there, or make it")
    room = min(nbytes or _MOST, shutil.disk_usage(folder).free // _SHARE_OF_FREE) // _REQUEST * _REQUEST
    if room < _LEAST:
        needed = _SHARE_OF_FREE * _LEAST
        raise BackendError(
            f"{folder} has too little room to measure it, which takes {needed} bytes of free space; choose another directory"
        )
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".tierstore-") as file:
            _write(file.fileno(), room)
            device = _direct_speed([file.fileno()])
            _warm(file.fileno(), room)
            return DiskSpeed(device, _speed(_parts([file.fileno()]), _SECONDS))
    except OSError as error:
        raise BackendError(f"{folder} cannot be measured: {error}; choose a directory that this user may write to") from error


def files_speed(files: Iterable[Path]) -> float | None:
    """Measure how fast these files are read around the page cache, in bytes per second; None where that cannot be told.

    That is where direct I/O is refused, or there is too little to read. Nothing is written, and the page cache stays as it is.
    """
    descriptors = [os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in files]
    try:
        return _direct_speed(descriptors) if sum(os.fstat(each).st_size for each in descriptors) >= _LEAST else None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _write(descriptor: int, nbytes: int) -> None:
    """Fill a file with bytes that do not compress, and leave none of them in the page cache."""
    block = os.urandom(_REQUEST)
    for start in range(0, nbytes, _REQUEST):
        done = 0
        while done < _REQUEST:
            done += os.pwrite(descriptor, memoryview(block)[done:], start + done)
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _warm(descriptor: int, nbytes: int) -> None:
    """Bring a file into the page cache."""
    buffer = memoryview(bytearray(_REQUEST))
    for start in range(0, nbytes, _REQUEST):
        os.preadv(descriptor, [buffer], start)


def _direct_speed(descriptors: list[int]) -> float | None:
    opened: list[int] = []
    try:
        for descriptor in descriptors:
            if not _DIRECT:
                return None
            opened.append(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | _DIRECT))
        return _speed(_parts(opened), _SECONDS)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return None
    finally:
        for descriptor in opened:
            with suppress(OSError):
                os.close(descriptor)


def _parts(descriptors: list[int]) -> list[tuple[int, int]]:
    """Return whole requests, as file and offset, of up to `_MOST` bytes."""
    parts = [(each, start) for each in descriptors for start in range(0, os.fstat(each).st_size - _REQUEST + 1, _REQUEST)]
    return parts[: _MOST // _REQUEST]


def _speed(parts: list[tuple[int, int]], seconds: float) -> float | None:
    """Read these parts, or as many as some seconds allow; return bytes per second."""
    if not parts:
        return None
    deadline = time.perf_counter() + seconds
    with mmap.mmap(-1, _REQUEST * _THREADS) as slab, ThreadPoolExecutor(_THREADS) as threads:
        slab.write(bytes(len(slab)))  # no first touch while the clock runs
        started = time.perf_counter()
        done = sum(threads.map(_read_some, [slab] * _THREADS, range(_THREADS), [parts] * _THREADS, [deadline] * _THREADS))
        return done / (time.perf_counter() - started)


def _read_some(slab: mmap.mmap, thread: int, parts: list[tuple[int, int]], deadline: float) -> int:
    """Read every fourth part until the time is over, at least one; return the bytes."""
    done = 0
    with memoryview(slab)[thread * _REQUEST : (thread + 1) * _REQUEST] as buffer:
        for descriptor, offset in parts[thread::_THREADS]:
            done += os.preadv(descriptor, [buffer], offset)
            if time.perf_counter() > deadline:
                break
    return done
