"""Every call to the operating system that has to do with files, behind one object.

Backends that keep files, and what reads them, are given a `FileSystem`; tests give one that records, refuses, shortens or
reorders. A directory is named by a descriptor (`folder`) and a name in it, so that one that was deleted and made anew by
somebody else is never taken for the old one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sqlite3
from collections.abc import Callable

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value

_DIRECT: int = getattr(os, "O_DIRECT", 0)
_UNNAMED: int | None = getattr(os, "O_TMPFILE", None)
_PUNCH = 1 | 2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_MISSING = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class FileSystem:
    """The file system as it is. Every method raises `OSError` as the system reports it, after trying again on EINTR."""

    def open(self, name: str, flags: int, *, folder: int | None = None, mode: int = 0o666) -> int:
        """Return a descriptor that a program started from here does not inherit."""
        return os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=folder)

    def open_unnamed(self, folder: int) -> int:
        """Return a descriptor of a new file without a name, which is gone when it is closed unless it was linked."""
        if _UNNAMED is None:
            raise OSError(errno.EOPNOTSUPP, "this system has no unnamed files")
        return os.open(".", _UNNAMED | os.O_RDWR | os.O_CLOEXEC, 0o666, dir_fd=folder)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def set_direct(self, descriptor: int, *, direct: bool) -> None:
        """Let reads and writes go around the page cache from now on, or through it again."""
        if not _DIRECT:
            raise OSError(errno.EOPNOTSUPP, "this system has no direct I/O")
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)

    def read(self, descriptor: int, memory: memoryview, offset: int, flags: int = 0) -> int:
        """Read into `memory`; return how many bytes that were, which may be fewer, and none only at the end."""
        return os.preadv(descriptor, [memory], offset, flags)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Return how many bytes were written, which may be fewer than all."""
        return os.pwrite(descriptor, data, offset)

    def reserve(self, descriptor: int, offset: int, nbytes: int) -> bool:
        """Make sure of disk space for a range, growing the file if need be; False where the file system cannot."""
        try:
            os.posix_fallocate(descriptor, offset, nbytes)
        except OSError as error:
            if error.errno not in _MISSING:
                raise
            return False
        return True

    def punch(self, descriptor: int, offset: int, nbytes: int) -> bool:
        """Give the disk space of a range back, which reads as zeros then; False where the file system cannot."""
        if not hasattr(_LIBC, "fallocate"):
            return False
        try:
            _retried(lambda: _LIBC.fallocate(descriptor, _PUNCH, ctypes.c_int64(offset), ctypes.c_int64(nbytes)))
        except OSError as error:
            if error.errno not in _MISSING:
                raise
            return False
        return True

    def lock(self, descriptor: int) -> bool:
        """Take the one lock on a file until it is unlocked or the process ends, however it ends; False if it is taken."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self, descriptor: int) -> None:
        """Give the lock up also for forked children, with which closing alone would leave it."""
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    def truncate(self, descriptor: int, nbytes: int) -> None:
        os.ftruncate(descriptor, nbytes)

    def sync(self, descriptor: int) -> None:
        """Make a file's bytes, or a directory's names, survive a power loss."""
        os.fsync(descriptor)

    def advise(self, descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        os.posix_fadvise(descriptor, offset, nbytes, advice)

    def status(self, descriptor: int) -> os.stat_result:
        return os.fstat(descriptor)

    def link(self, descriptor: int, folder: int, name: str) -> None:
        """Give an unnamed file a name; raise `FileExistsError` if another one has it."""
        # src_dir_fd is not used, since the path is absolute, but without it CPython does not follow the link
        os.link(f"/proc/self/fd/{descriptor}", name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)

    def rename(self, folder: int, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)

    def unlink(self, folder: int, name: str) -> None:
        os.unlink(name, dir_fd=folder)

    def make_folder(self, folder: int, name: str) -> None:
        os.mkdir(name, dir_fd=folder)

    def names(self, folder: int) -> list[str]:
        """Return what is in a directory, unsorted."""
        return os.listdir(folder)

    def map(self, descriptor: int, offset: int, nbytes: int) -> int:
        """Map a range privately, copied on write, and return its address; `offset` is a multiple of the system's pages."""
        protection, private = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
        address = _LIBC.mmap(None, nbytes, protection, private, descriptor, offset)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), f"cannot map {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
        return int(address)

    def unmap(self, address: int, nbytes: int) -> None:
        _LIBC.munmap(address, nbytes)

    def commit(self, database: sqlite3.Connection) -> None:
        """Make the open transaction of a database durable: the one thing about files that is left to SQLite."""
        database.execute("COMMIT")


def _retried(call: Callable[[], int]) -> None:
    """Call what returns -1 and sets errno on failure; interrupted calls are made again, as Python does for its own."""
    while call() == -1:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
