"""Writing blobs: complete, named, and with both on the device before anybody is told."""

from __future__ import annotations

import errno
import os
import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from tierstore.backends._disk.blob import FORMAT_VERSION, encode_head, encoded_size
from tierstore.backends._disk.direct import SLAB, DirectWriter, WritePool
from tierstore.backends._disk.failures import Health
from tierstore.backends._disk.layout import BLOBS, Root
from tierstore.backends._disk.rows import Row, Sealed, blob_name
from tierstore.backends._lock import TEMPORARY
from tierstore.checksum import checksum, checksums
from tierstore.file_system import FileSystem
from tierstore.open_file import PAGE
from tierstore.spec import TensorSpec

TOGETHER = SLAB // 2  # bytes; copying more takes longer than a second write
_IN_A_SHARD = 256  # blobs that go into one directory before the next is chosen: each new one takes a flush of its own
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Draft:
    """A value to be written."""

    key: str
    spec: TensorSpec
    generation: int
    data: memoryview


class BlobWriter:
    """Writes the blobs of the store with the id `store`; safe to call from several threads.

    A flush that fails is never tried again, since the system may have dropped what could not be written and would then say
    that all is well; `health` is told, and no more is written. The lock is held while a directory of blobs is made.
    """

    def __init__(self, root: Root, store: str, health: Health) -> None:
        self._root = root
        self._system: FileSystem = root.system
        self._store = store
        self._health = health
        self._pool = WritePool()
        self._lock = threading.Lock()
        self._flushed: set[str] = set()  # directories of blobs whose own names are on the device
        self._shard = ""  # two digits: how the ids of blobs begin now
        self._room = 0  # blobs that may still go there

    def write(self, draft: Draft) -> tuple[Sealed, os.stat_result]:
        """Return the row and the status of a new blob that is on the device, with its name; on failure there is none."""
        blob = self._new_id()
        shard, name = blob_name(blob).rsplit("/", 1)
        self._prepare_shard(shard)
        with self._root.folder(shard) as folder, _Unfinished(self._system, folder) as file:
            sealed = self._fill(file.descriptor, draft, blob)
            file.publish(name)
            try:
                return sealed, self._flush_both(file.descriptor, folder, draft.key)
            except BaseException:
                with suppress(OSError):  # swept when the store is opened
                    self._system.unlink(folder, name)
                raise

    def remove(self, row: Row) -> None:
        """Take away a blob that no row names any more; what resists is swept when the store is opened."""
        with suppress(OSError):
            self._root.remove(row.name)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def _fill(self, descriptor: int, draft: Draft, blob: str) -> Sealed:
        """Write head and data into an empty file; return the row that will name it.

        All of it that does not need the data to be written is done beside that: where the device is waited for.
        """
        data = draft.data
        size = encoded_size(draft.key, draft.spec, draft.generation, self._store)
        writer = DirectWriter(self._system, descriptor, self._pool)
        total = size + len(data)
        self._system.reserve(descriptor, 0, total + -total % PAGE)
        if total <= TOGETHER:
            sealed, head = self._describe(draft, blob)
            writer.write_together(head, data, 0)
        else:
            sealed = writer.write_beside(data, size, partial(self._write_head, writer, draft, blob))
        assert sealed.row.offset == size, "the data would begin in the head, or behind a gap"
        if total % PAGE:
            self._system.truncate(descriptor, total)
        return sealed

    def _write_head(self, writer: DirectWriter, draft: Draft, blob: str) -> Sealed:
        sealed, head = self._describe(draft, blob)
        writer.write(memoryview(head), 0)
        return sealed

    def _describe(self, draft: Draft, blob: str) -> tuple[Sealed, bytes]:
        """Return the row of a blob, and its head."""
        sums = checksums(draft.data)
        head = encode_head(draft.key, draft.spec, sums, draft.generation, self._store)
        return Row(draft.key, blob, len(head), draft.spec, sums, checksum(head), draft.generation, FORMAT_VERSION).sealed(), head

    def _new_id(self) -> str:
        """Return a random id for a blob."""
        with self._lock:
            if not self._room:
                self._shard, self._room = secrets.token_hex(1), _IN_A_SHARD
            self._room -= 1
            return self._shard + secrets.token_hex(15)

    def _flush_both(self, file: int, folder: int, key: str) -> os.stat_result:
        """Flush a file and the directory with its name at the same time, so that they share what the file system waits for.

        Returns the file's status.
        """
        flush = partial(self._flush, folder, f"a directory could not be flushed while {key!r} was stored")
        with self._pool.running(flush) as (flushed,):
            self._flush(file, f"a file could not be flushed while {key!r} was stored")
            status = self._system.status(file)
            flushed()
        return status

    def _flush(self, descriptor: int, reason: str) -> None:
        try:
            self._system.sync(descriptor)
        except OSError as error:
            self._health.fail(f"{reason} ({error})")
            raise

    def _prepare_shard(self, shard: str) -> None:
        """Make a directory of blobs, and see to it once that its name is on the device, whoever has made it."""
        with self._lock:
            if shard in self._flushed:
                return
            if not self._flushed:
                self._root.make_folder(BLOBS)
                self._flush(self._root.descriptor, "the store's directory could not be flushed")
            self._root.make_folder(shard)
            with self._root.folder(BLOBS) as blobs:
                self._flush(blobs, "a directory of blobs could not be flushed")
            self._flushed.add(shard)


class _Unfinished:
    """A new file in a directory that has no name, or a temporary one, until it is published."""

    def __init__(self, system: FileSystem, folder: int) -> None:
        self._system = system
        self._folder = folder
        self._name: str | None = None
        self.descriptor = -1

    def __enter__(self) -> _Unfinished:
        try:
            self.descriptor = self._system.open_unnamed(self._folder)
        except OSError as error:
            if error.errno not in _NO_UNNAMED:
                raise
            self._name = f"{TEMPORARY}{secrets.token_hex(8)}"
            self.descriptor = self._system.open(self._name, os.O_RDWR | os.O_CREAT | os.O_EXCL, folder=self._folder)
        return self

    def publish(self, name: str) -> None:
        if self._name is None:
            self._system.link(self.descriptor, self._folder, name)
        else:
            self._system.rename(self._folder, self._name, name)
            self._name = None

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # swept when the store is opened
            if self._name is not None:
                self._system.unlink(self._folder, self._name)
        with suppress(OSError):  # it is on the device, or not wanted
            self._system.close(self.descriptor)
