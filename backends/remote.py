"""Objects in a bucket, one for each value, through fsspec: s3://, gs://, http://, memory://, file:// and others.

    tierstore.json                          {"format": "tierstore-remote", "version": 1, "values": [...]}
    values/<sha256 of key>-<generation>.safetensors

A key is never a path. Each object is complete in itself and opens with stock `safetensors`. The index describes all of them,
so that opening reads one object; it is there only while it is true: before anything changes it is deleted, and closing
writes it again. Without one, opening lists the values and reads their heads.

[Note: generations]
A new value of a key is a new object, and the older one is deleted when it is complete. So no reader, here or on another
machine, ever mixes two values, and an attempt that is repeated repeats itself. Of two objects of one key, which a crash can
leave, the later one counts.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch

from tierstore.backend import DistantBackend, ReadOnlyBackend
from tierstore.backends._bucket import Bucket
from tierstore.backends._object import StoredObject, checksum_of, head_size, read_head, read_index, write_index
from tierstore.backends._parallel import Parallel
from tierstore.backends._retry import Retries
from tierstore.errors import BackendError, ClosedError, CorruptionError, RemoteError, TierStoreError
from tierstore.spec import TensorSpec, bytes_of, typed_view

INDEX = "tierstore.json"
VALUES = "values"

_READS_ONLY = ("http", "https")
_HEAD_GUESS = 4096  # bytes; nearly all heads are smaller


class _RemoteValues(DistantBackend):
    """What reading and writing a bucket share.

    A value is read in ranges of `part_bytes` by up to `threads` threads, straight into the memory that it fills, apart from one
    part for each thread; they start when first needed. `storage_options` go to fsspec, which finds credentials. Not to be
    used in a forked child: fsspec's own thread is missing there.
    """

    def __init__(
        self,
        url: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
        retries: Retries | None = None,
        threads: int = 8,
        part_bytes: int = 16 << 20,
    ) -> None:
        if "://" not in url:
            raise BackendError(f"{url!r} is no URL; write one like 's3://bucket/prefix', or use the backend 'disk' for a directory")
        if threads < 1 or part_bytes < 1:
            raise BackendError(f"a remote backend needs at least one thread and one byte, got {threads=}, {part_bytes=}")
        self.url = url.rstrip("/")
        self._pid = os.getpid()
        self._closed = False
        self._part_bytes = part_bytes
        self._bucket = Bucket(self.url, storage_options or {}, retries or Retries(), part_bytes)
        self._parallel = Parallel("remote", threads)
        self._objects: dict[str, tuple[StoredObject, int]] = {}  # and where in the object the data begins
        self._superseded: list[str] = []  # names of objects that a newer one replaces
        try:
            self._indexed = self._load_index(self._until())
            if not self._indexed:
                self._rebuild(self._until())
        except BaseException:
            self._parallel.close()
            raise

    def get(self, key: str) -> torch.Tensor:
        spec = self._objects[key][0].spec
        with torch.inference_mode(False), torch.no_grad():
            raw = torch.empty(spec.nbytes, dtype=torch.uint8, device="cpu")
            self.read_into(key, raw)
            return typed_view(raw, spec)

    def read_into(self, key: str, out: torch.Tensor) -> None:
        self._check_usable()
        stored, offset = self._objects[key]
        until, memory = self._until(), out.numpy()

        def read_part(start: int) -> None:
            stop = min(start + self._part_bytes, len(memory))
            data = self._bucket.read(f"{VALUES}/{stored.name}", offset + start, offset + stop, until)
            memory[start:stop] = np.frombuffer(data, np.uint8)

        try:
            self._parallel.map(read_part, range(0, len(memory), self._part_bytes))
        except (FileNotFoundError, RemoteError) as error:
            self._explain(stored, offset, until, error)
            raise
        if checksum_of(memory.data) != stored.checksum:
            raise CorruptionError(key, self._place(stored), "its checksum does not match")

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        self._check_usable()
        return ((key, stored.spec) for key, (stored, _) in list(self._objects.items()))

    def object_of(self, key: str) -> str:
        """Return the URL of the object that holds the value of `key`."""
        return self._place(self._objects[key][0])

    def close(self) -> None:
        self._closed = True
        self._parallel.close()

    # -- opening --------------------------------------------------------------------------------------------------

    def _load_index(self, until: float) -> bool:
        """Take over what the index says; False if there is none."""
        try:
            text = self._bucket.read_whole(INDEX, until)
        except FileNotFoundError:
            return False
        place = f"{self.url}/{INDEX}"
        try:
            found = read_index(text)
        except BackendError as error:
            raise BackendError(f"{place} {error}") from error
        except ValueError as error:
            raise CorruptionError("?", place, f"{error}; without this file the values are found by listing them") from error
        self._objects = {stored.key: (stored, len(stored.head())) for stored in found}
        return True

    def _rebuild(self, until: float) -> None:
        """Find out what there is from the objects themselves."""
        names = self._bucket.names(VALUES, until)
        heads = self._parallel.map(lambda name: self._read_head(name, until), names)
        for name, (stored, offset) in sorted(zip(names, heads, strict=True), key=lambda found: found[1][0].generation):
            if stored.name != name:
                raise CorruptionError(stored.key, f"{self.url}/{VALUES}/{name}", "the object is named for another value")
            if stored.key in self._objects:
                self._superseded.append(self._objects[stored.key][0].name)
            self._objects[stored.key] = stored, offset

    def _read_head(self, name: str, until: float) -> tuple[StoredObject, int]:
        place = f"{VALUES}/{name}"
        size = self._bucket.size(place, until)
        start = self._bucket.read(place, 0, min(size, _HEAD_GUESS), until)
        try:
            length = head_size(start)
            if length > size:
                raise ValueError(f"a header of {length} bytes in an object of {size} bytes")
            rest = self._bucket.read(place, len(start), max(length, len(start)), until)
            stored = read_head((start + rest)[:length])
            if size != length + stored.spec.nbytes:
                raise ValueError(f"the object has {size} bytes instead of {length + stored.spec.nbytes}")
        except ValueError as error:
            raise CorruptionError("?", f"{self.url}/{place}", str(error)) from error
        return stored, length

    # -- small things ---------------------------------------------------------------------------------------------

    def _explain(self, stored: StoredObject, offset: int, until: float, error: BaseException) -> None:
        """Raise `CorruptionError` if a read failed because the object is not what it was."""
        place = f"{VALUES}/{stored.name}"
        try:
            size = self._bucket.size(place, until)
        except FileNotFoundError:
            raise CorruptionError(stored.key, self._place(stored), "the object is missing") from error
        except RemoteError:
            return  # what went wrong with the read says it all
        if size != offset + stored.spec.nbytes:
            reason = f"the object has {size} bytes instead of {offset + stored.spec.nbytes}"
            raise CorruptionError(stored.key, self._place(stored), reason) from error

    def _place(self, stored: StoredObject) -> str:
        return f"{self.url}/{VALUES}/{stored.name}"

    def _until(self) -> float:
        return self._bucket.retries.until()

    def _check_usable(self) -> None:
        if self._closed:
            raise ClosedError(f"the remote store in {self.url} is closed; open it again")
        if os.getpid() != self._pid:
            raise BackendError(f"the remote store in {self.url} was opened before this process was forked; open it again in the child")


class RemoteBackend(_RemoteValues):
    """Keeps tensors as objects below `url`, of which it must be the only writer; any number of machines may read them.

    `put` sends the value, all at once up to `part_bytes` and in parts above, and holds one part more in memory. The lock is
    held for changes of the tables, and once while the index is deleted. Safe to call from several threads for different keys.
    """

    def __init__(self, url: str, **options: Any) -> None:
        if url.partition("://")[0] in _READS_ONLY:
            raise BackendError(f"{url} can only be read; open_backend('remote-source', url) does that")
        self._lock = threading.Lock()
        self._scratch = False
        super().__init__(url, **options)
        self._generation = max((stored.generation for stored, _ in self._objects.values()), default=-1)

    @classmethod
    def scratch(cls, parent: str, **options: Any) -> Self:
        """Open a fresh place below the url `parent`, whose objects `close` deletes; a killed process leaves them there."""
        backend = cls(f"{parent.rstrip('/')}/tierstore-scratch-{secrets.token_hex(8)}", **options)
        backend._scratch = True
        return backend

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._check_usable()
        data = bytes_of(tensor)
        self._begin_change()
        with self._lock:
            self._generation += 1
            stored = StoredObject(key, TensorSpec.of(tensor), self._generation, checksum_of(data))
        head = stored.head()
        self._bucket.write(f"{VALUES}/{stored.name}", (head, data), self._until())
        with self._lock:
            older = self._objects.get(key)
            self._objects[key] = stored, len(head)
        if older is not None:
            self._discard(older[0].name)

    def delete(self, key: str) -> None:
        self._check_usable()
        stored, _ = self._objects[key]
        self._begin_change()
        self._bucket.remove(f"{VALUES}/{stored.name}", self._until())
        with self._lock:
            del self._objects[key]

    def close(self) -> None:
        """Write the index, or delete everything if this is scratch. Raises `RemoteError` if that fails: the values are all there."""
        if self._closed:
            return
        try:
            if os.getpid() == self._pid:
                self._finish()
        finally:
            super().close()

    def _finish(self) -> None:
        if self._scratch:
            self._bucket.remove_all(self._until())
        elif not self._indexed:
            for name in self._superseded:
                self._bucket.remove(f"{VALUES}/{name}", self._until())
            index = write_index(stored for stored, _ in self._objects.values())
            self._bucket.write(INDEX, (index,), self._until())

    def _begin_change(self) -> None:
        """Delete the index before anything that it does not know of is there."""
        if self._indexed:
            with self._lock:
                if self._indexed:
                    self._bucket.remove(INDEX, self._until())
                    self._indexed = False

    def _discard(self, name: str) -> None:
        """Delete a replaced object; if it resists, it is tried again at the end, and the later one counts until then."""
        try:
            self._bucket.remove(f"{VALUES}/{name}", self._until())
        except (OSError, TierStoreError):
            with self._lock:
                self._superseded.append(name)


class RemoteSource(ReadOnlyBackend, _RemoteValues):
    """Reads what a `RemoteBackend` has written below `url`, without ever writing there; over http, where it needs the index."""

    def _rebuild(self, until: float) -> None:
        if self._bucket.protocol in _READS_ONLY:
            raise BackendError(f"{self.url} has no {INDEX}, and cannot be listed; close the store that wrote it, which writes one")
        super()._rebuild(until)
