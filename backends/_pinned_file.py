"""Files of others, which must stay as they were when they were first looked at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from tierstore.errors import CorruptionError
from tierstore.open_file import OpenFile


class Identity(NamedTuple):
    """What differs when a file is replaced or written to."""

    device: int
    inode: int
    size: int
    changed: int


class PinnedFile(OpenFile):
    """An `OpenFile` whose reads fail with `CorruptionError` once the file is not what `identity` says any more.

    It is looked at after the bytes have been read: a writer changes the times before the bytes.
    """

    def __init__(self, path: str, identity: Identity) -> None:
        super().__init__(path)
        self._identity = identity
        try:
            self.check()
        except CorruptionError:
            self.close()
            raise

    def check(self) -> None:
        check_identity(self.path, os.fstat(self.fileno()), self._identity)

    def read(self, memory: memoryview, offset: int) -> None:
        super().read(memory, offset)
        self.check()

    def read_cached(self, memory: memoryview, offset: int) -> None:
        super().read_cached(memory, offset)
        self.check()


def identity_of(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def check_identity(path: str, status: os.stat_result, identity: Identity, key: str = "?") -> None:
    """Raise `CorruptionError` if a file has another identity now."""
    if identity_of(status) != identity:
        raise CorruptionError(key, path, "the file has changed since the checkpoint was opened")


def status_of(path: Path, key: str) -> os.stat_result:
    """Return the status of the file at `path` now; raise `CorruptionError` if it is gone."""
    try:
        return path.stat()
    except FileNotFoundError:
        raise CorruptionError(key, str(path), "the file is missing") from None
