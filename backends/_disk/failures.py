"""What a backend over files says when the file system fails, and when it stops writing for good."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tierstore.errors import ClosedError, CorruptionError, StorageError

_WAYS_OUT = {
    errno.ENOSPC: "free space on that file system, or give the tier a smaller budget",
    errno.EDQUOT: "free space in your quota, or give the tier a smaller budget",
    errno.EROFS: "make the file system writable again",
    errno.ENOENT: "the directory is gone; open a store elsewhere",
    errno.EMFILE: "close files, or raise the limit of open files (ulimit -n)",
    errno.EIO: "the device reports an error; look at the system's log",
}


@contextmanager
def explained(doing: str, place: Path) -> Iterator[None]:
    """Turn what the file system refuses into a `StorageError` that says what was being done, and what to do."""
    try:
        yield
    except (CorruptionError, StorageError):
        raise
    except OSError as error:
        code = error.errno or errno.EIO
        way_out = _WAYS_OUT.get(code, "see the error itself")
        raise StorageError(code, f"{doing} in {place} failed, which changed nothing: {os.strerror(code)}; {way_out}") from error


class Health:
    """Whether a store may go on writing; once something has been lost track of, it never does again."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._reason = ""

    def fail(self, reason: str) -> None:
        """Refuse all writes from now on."""
        self._reason = self._reason or reason

    def check(self) -> None:
        """Raise `StorageError` if something has failed before."""
        if self._reason:
            raise StorageError(
                errno.EROFS,
                f"{self._place} is only read since {self._reason}; what was stored before is safe: close the store and open it again",
            )


class Owner:
    """The process that opened something, and whether it is still open."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._process = os.getpid()
        self.closed = False

    @property
    def here(self) -> bool:
        """False in a forked child."""
        return os.getpid() == self._process

    def check(self) -> None:
        """Raise `ClosedError` if it was closed, or if this process is a forked child of the one that opened it."""
        if self.closed:
            raise ClosedError(f"{self._what} is closed; open it again")
        if not self.here:
            raise ClosedError(f"{self._what} was opened by process {self._process}; a forked child opens it for itself")
