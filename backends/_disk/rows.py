"""One row of the index of a disk store: everything that reading a value needs, sealed by a checksum of its own."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import NamedTuple

from tierstore.backends._lock import parse_json, spec_from
from tierstore.checksum import SUM, checksum, sums_size
from tierstore.spec import TensorSpec, dtype_name

BLOB_ID = re.compile(r"[0-9a-f]{32}")
SUFFIX = ".safetensors"

Columns = tuple[bytes, str, int, int, str, str, str, bytes, bytes, int, int]


@dataclass(frozen=True, slots=True)
class Row:
    """Where a value lies and what it is.

    `blob` names the file; the data is `spec.nbytes` from `offset` on to the file's end. `sums` are the checksums of the data
    (none for a blob of version 1), `head` is that of what stands before it. Of two blobs with one key the one with the
    higher `generation` is newer.
    """

    key: str
    blob: str
    offset: int
    spec: TensorSpec
    sums: bytes
    head: bytes
    generation: int
    format: int

    @property
    def name(self) -> str:
        """The file's path in the directory of the store."""
        return blob_name(self.blob)

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def file_size(self) -> int:
        return self.offset + self.spec.nbytes

    def sealed(self) -> Sealed:
        """Return the row as the index holds it."""
        columns = self._columns()
        return Sealed(self, columns, seal_of(columns))

    def _columns(self) -> Columns:
        spec = self.spec
        shapes = json.dumps(spec.shape), json.dumps(spec.stride)
        key = self.key.encode("utf-8", "surrogatepass")
        return (
            key, self.blob, self.offset, spec.nbytes, dtype_name(spec.dtype), *shapes, self.sums, self.head, self.generation, self.format,
        )  # fmt: skip


class Sealed(NamedTuple):
    """A row, what SQLite holds of it, and the checksum of that."""

    row: Row
    columns: Columns
    seal: bytes


def blob_name(blob: str) -> str:
    return f"blobs/{blob[:2]}/{blob}{SUFFIX}"


def seal_of(columns: tuple[object, ...]) -> bytes:
    """Return the checksum of a row, which also depends on the types of its columns."""
    return checksum(repr(columns).encode())


def row_from(columns: tuple[object, ...], seal: object) -> Row:
    """Return the row that `Row.sealed` gave; raise `ValueError` if it has changed since, or never was one."""
    if seal != seal_of(columns):
        raise ValueError("a row of the index does not match its checksum")
    key, blob, offset, nbytes, dtype, shape, stride, sums, head, generation, version = columns
    if not (isinstance(key, bytes) and isinstance(sums, bytes) and isinstance(head, bytes) and isinstance(blob, str)):
        raise ValueError("a row of the index has columns of other types")
    if not (isinstance(shape, str) and isinstance(stride, str) and isinstance(offset, int)):
        raise ValueError("a row of the index has columns of other types")
    if not (isinstance(generation, int) and isinstance(version, int)):
        raise ValueError("a row of the index has columns of other types")
    spec = spec_from(dtype, parse_json(shape), parse_json(stride))
    if BLOB_ID.fullmatch(blob) is None or spec.nbytes != nbytes or offset < 0 or len(head) != SUM:
        raise ValueError("a row of the index contradicts itself")
    if version not in (1, 2) or len(sums) != (sums_size(spec.nbytes) if version > 1 else 0):
        raise ValueError("a row of the index contradicts itself")
    return Row(key.decode("utf-8", "surrogatepass"), blob, offset, spec, sums, head, generation, version)
