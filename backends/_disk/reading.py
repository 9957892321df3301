"""Reading blobs: finds, checks and maps them, and remembers what was found right."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tierstore.backend import FileExtent
from tierstore.backends._disk.maps import map_range
from tierstore.backends._disk.rows import Row
from tierstore.backends._files import OpenFiles
from tierstore.checksum import Proof, Verify, checksum
from tierstore.errors import CorruptionError
from tierstore.file_system import FileSystem
from tierstore.open_file import OpenFile
from tierstore.spec import typed_view

Identity = tuple[int, int]  # of a file: what differs when it is another one, or was written to


class Blobs:
    """The blobs of the store in `root`, for several threads and different rows; files stay open between reads.

    A blob's header is compared when the file is first seen, and again if it was written to since. Its data is checked as
    `verify` says. A blob whose file is not there raises `FileNotFoundError`.
    """

    def __init__(self, root: Path, system: FileSystem, verify: Verify) -> None:
        self._root = root
        self._system = system
        self._verify = verify
        self._files = OpenFiles(lambda path: OpenFile(str(path), system))
        self._seen: dict[str, Identity] = {}  # whose header was right
        self._proved: dict[str, Identity] = {}  # whose data was
        self._proofs: dict[str, tuple[Identity, Proof]] = {}  # of whose data a part may have been

    def path_of(self, row: Row) -> Path:
        return self._root / row.name

    def get(self, row: Row) -> torch.Tensor:
        """Return the value as a private map of its file."""
        with self._opened(row) as (file, extent, _):
            extent.prove(file)
            # inference mode would mark the memory as an inference tensor, which autograd refuses to save
            with torch.inference_mode(False), torch.no_grad():
                empty = torch.empty(0, dtype=torch.uint8, device="cpu")
                raw = map_range(self._system, file.fileno(), row.offset, row.nbytes) if row.nbytes else empty
                return typed_view(raw, row.spec)

    def extent(self, row: Row) -> FileExtent:
        """Return where the value lies, with what its bytes have to be checked against, if they have to."""
        with self._opened(row) as (_, extent, kept):
            return extent if kept else replace(extent, file=None)

    def check(self, row: Row) -> None:
        """Read and check the value, if it has a checksum, unless that has been done."""
        with self._opened(row) as (file, extent, _):
            extent.prove(file)

    @contextmanager
    def _opened(self, row: Row) -> Iterator[tuple[OpenFile, FileExtent, bool]]:
        """Open and check the file of a row, its data apart; also tell whether it stays open."""
        path = self.path_of(row)
        file, kept = self._files.borrow(path)
        try:
            identity = self._check(row, file)
            yield file, FileExtent(str(path), row.offset, row.nbytes, file, self._proof(row, identity)), kept
        finally:
            file.close()

    def trust(self, row: Row, status: os.stat_result) -> None:
        """Take note of a blob that this process has just written."""
        self._seen[row.blob] = _identity(status)
        if self._verify == "first":
            self._proved[row.blob] = _identity(status)

    def forget(self, row: Row) -> None:
        """A blob was superseded or deleted."""
        self._files.forget(self.path_of(row))
        self._seen.pop(row.blob, None)
        self._proved.pop(row.blob, None)
        self._proofs.pop(row.blob, None)

    def __enter__(self) -> Blobs:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _check(self, row: Row, file: OpenFile) -> Identity:
        """Raise unless the file is what the row says, its data apart; return its identity."""
        status = self._system.status(file.fileno())
        if not status.st_nlink:
            raise FileNotFoundError(file.path)
        if status.st_size != row.file_size:
            raise CorruptionError(row.key, file.path, f"the file has {status.st_size} bytes instead of {row.file_size}")
        identity = _identity(status)
        if self._verify != "never" and (self._verify == "always" or self._seen.get(row.blob) != identity):
            head = memoryview(bytearray(row.offset))
            file.read(head, 0)
            if checksum(head) != row.head:
                raise CorruptionError(row.key, file.path, "its header has changed")
            self._seen[row.blob] = identity
        return identity

    def _proof(self, row: Row, identity: Identity) -> Proof | None:
        """Return what the data has to be checked against, unless it has been, or never is."""
        if not row.sums or self._verify == "never" or (self._verify == "first" and self._proved.get(row.blob) == identity):
            return None
        known, proof = self._proofs.get(row.blob, (None, None))
        if proof is None or known != identity or self._verify == "always":
            proof = Proof(row.sums, row.nbytes, row.key, str(self.path_of(row)), partial(self._passed, row, identity))
        if self._verify == "first":
            self._proofs[row.blob] = identity, proof
        return proof

    def _passed(self, row: Row, identity: Identity) -> None:
        if self._verify == "first":
            self._proved[row.blob] = identity
            self._proofs.pop(row.blob, None)


def _identity(status: os.stat_result) -> Identity:
    return status.st_ino, status.st_mtime_ns
