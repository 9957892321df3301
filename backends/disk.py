"""A directory of safetensors files, one for each value, with an index that says which of them count.

A value is put in this order: its bytes go into a file without a name, around the page cache, several pieces at the same time;
the file gets its name; file and directory are flushed, both at once; the row in the index is committed, and from there on,
and not before, the value is the key's. Then the file of the older value goes. Every step before the commit can fail or be
cut short without a trace: the file has a random name that nothing refers to, and is removed when the store is opened. So a
crash at any moment leaves each key with its old or its new value. Threads that put at the same time share commits.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch

from tierstore.backend import FileBackend, FileExtent
from tierstore.backends._disk import description, upkeep
from tierstore.backends._disk.failures import Health, Owner, explained
from tierstore.backends._disk.group import GroupCommit
from tierstore.backends._disk.hold import WriteHold
from tierstore.backends._disk.index import Index, UncertainError
from tierstore.backends._disk.layout import MARKER, Root, open_index, read_format, read_rows
from tierstore.backends._disk.reading import Blobs
from tierstore.backends._disk.rows import Row
from tierstore.backends._disk.writing import BlobWriter, Draft
from tierstore.backends._lock import opening
from tierstore.backends.scratch import ScratchBackend
from tierstore.checksum import Verify, check_verify
from tierstore.errors import BackendError, CorruptionError
from tierstore.file_system import FileSystem
from tierstore.maintenance import Contents, Described, Inspection, Maintained, PathLike
from tierstore.spec import TensorSpec, bytes_of

_SYSTEM = FileSystem()
T = TypeVar("T")


class DiskBackend(FileBackend, Maintained, Described):
    """Keeps tensors below `path`, which it creates, for good; one store at a time has a directory open for writing.

    What `put` or `delete` has returned from survives a crash of the process and of the machine. `verify` says when bytes
    are checked against the checksums that were stored with them: when they are first read after opening, always, or never.
    After a failure of the device that leaves it open what is stored, nothing more is written (`StorageError`), and what was
    committed before can still be read. Safe to call from several threads for different keys.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: Verify = "first", system: FileSystem = _SYSTEM) -> None:
        check_verify(verify)
        self.path = Path(path).absolute()
        self._owner = Owner(f"the disk store in {self.path}")
        self._health = Health(self.path)
        self._lock = threading.Lock()
        with opening(self.path), ExitStack() as stack:
            self._hold = stack.enter_context(WriteHold(self.path, system))
            self._rows = self._hold.index.rows
            self._generation = self._hold.index.state.generation
            self._index = GroupCommit(self._hold, self._health)
            self._blobs = stack.enter_context(Blobs(self.path, system, verify))
            self._writer = stack.enter_context(BlobWriter(self._hold.root, self._hold.index.state.store, self._health))
            self._end = weakref.finalize(self, _close, stack.pop_all(), self._owner)

    @classmethod
    def scratch(cls, folder: str | os.PathLike[str], *, verify: Verify = "first", system: FileSystem = _SYSTEM) -> ScratchBackend:
        """Return a backend on the file system of `folder` of which nothing is left when the process ends."""
        if Path(folder, "FORMAT").exists():
            raise BackendError(f"{folder} belongs to another store; choose another directory for scratch")
        return ScratchBackend(folder, verify=verify, system=system)

    @classmethod
    def reader(cls, path: str | os.PathLike[str], *, verify: Verify = "first", system: FileSystem = _SYSTEM) -> DiskReader:
        """Return what reads the store at `path`, also while another process writes it."""
        return DiskReader(path, verify=verify, system=system)

    @classmethod
    def verify(cls, path: PathLike) -> Inspection:
        return upkeep.verify(Path(path).absolute(), _SYSTEM)

    @classmethod
    def repair(cls, path: PathLike) -> Inspection:
        return upkeep.repair(Path(path).absolute(), _SYSTEM)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return (path / MARKER).is_file()

    @classmethod
    def describe(cls, path: Path) -> Contents:
        return description.describe(path, _SYSTEM)

    def file_of(self, key: str) -> Path:
        """Return the file that holds `key` now; raise `KeyError` if there is none."""
        return self._blobs.path_of(self._rows[key])

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._check_writable()
        data = bytes_of(tensor)
        with explained(f"storing {key!r}", self.path):
            new, status = self._writer.write(Draft(key, TensorSpec.of(tensor), self._next_generation(), data))
            try:
                old = self._index.change(key, new)
            except UncertainError:
                raise
            except OSError:
                self._writer.remove(new.row)
                raise
        self._blobs.trust(new.row, status)
        if old is not None:
            self._discard(old)

    def get(self, key: str) -> torch.Tensor:
        return self._look(key, self._blobs.get)

    def extent(self, key: str) -> FileExtent:
        return self._look(key, self._blobs.extent)

    def delete(self, key: str) -> None:
        self._check_writable()
        with explained(f"deleting {key!r}", self.path):
            old = self._index.change(key, None)
        if old is not None:
            self._discard(old)

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        self._owner.check()
        return ((key, row.spec) for key, row in list(self._rows.items()))

    def close(self) -> None:
        if self._owner.here:
            self._owner.closed = True
        self._end()

    def _look(self, key: str, how: Callable[[Row], T]) -> T:
        self._owner.check()
        row = self._rows[key]
        with explained(f"reading {key!r}", self.path):
            try:
                return how(row)
            except FileNotFoundError:
                raise CorruptionError(key, str(self._blobs.path_of(row)), "the file is missing") from None

    def _check_writable(self) -> None:
        self._owner.check()
        self._health.check()

    def _next_generation(self) -> int:
        with self._lock:
            self._generation += 1
            return self._generation

    def _discard(self, row: Row) -> None:
        self._blobs.forget(row)
        self._writer.remove(row)


class DiskReader:
    """Reads what another process, or nobody, is writing below `path`; many may at once, and they change nothing there.

    It sees what was committed when it was opened, or last refreshed; of a value that was replaced or deleted since, whose
    file is gone, it returns the newest one, as if it had been refreshed. Safe to call from several threads.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: Verify = "first", system: FileSystem = _SYSTEM) -> None:
        check_verify(verify)
        self.path = Path(path).absolute()
        self._owner = Owner(f"the reader of {self.path}")
        self._lock = threading.Lock()
        self._index: Index | None = None
        self._rows: dict[str, Row] = {}
        with opening(self.path), ExitStack() as stack:
            self._root = Root(self.path, system)
            stack.callback(self._root.close)
            self._blobs = stack.enter_context(Blobs(self.path, system, verify))
            self._open()
            stack.callback(self._close_index)
            self._stack = stack.pop_all()

    def get(self, key: str) -> torch.Tensor:
        """Return the value of `key`, a private map of its file; raise `KeyError` if there is none."""
        return self._look(key, self._blobs.get)

    def extent(self, key: str) -> FileExtent:
        """Return where the bytes of `key` lie; raise what `get` raises."""
        return self._look(key, self._blobs.extent)

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        """Yield key and spec of everything that was stored when this was last refreshed."""
        self._owner.check()
        return ((key, row.spec) for key, row in list(self._rows.items()))

    def refresh(self) -> None:
        """See what has been committed by now."""
        self._owner.check()
        with self._lock, opening(self.path):
            if self._index is None:
                self._open()
            elif self._index.refresh():
                self._rows = self._index.rows

    def close(self) -> None:
        if self._owner.here and not self._owner.closed:
            self._owner.closed = True
            self._stack.close()

    def _open(self) -> None:
        found = read_format(self._root)
        if found is None:
            raise BackendError(f"there is no store in {self.path}; open it for writing to make one")
        if found.version == 1:
            self._rows = {row.key: row for row in read_rows(self._root)}
            return
        self._index = open_index(self._root, found.store, writable=False)
        self._rows = self._index.rows

    def _close_index(self) -> None:
        if self._index is not None:
            self._index.close()

    def _look(self, key: str, how: Callable[[Row], T]) -> T:
        self._owner.check()
        row = self._rows[key]
        with explained(f"reading {key!r}", self.path):
            while True:
                try:
                    return how(row)
                except FileNotFoundError:
                    self._blobs.forget(row)
                    before = row
                self.refresh()
                row = self._rows[key]
                if row == before:
                    raise CorruptionError(key, str(self._blobs.path_of(row)), "the file is missing")


def _close(stack: ExitStack, owner: Owner) -> None:
    if owner.here:  # a forked child must not touch what its parent has open
        stack.close()
