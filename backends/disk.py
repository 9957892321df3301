"""A directory of safetensors files, one for each value, read through private maps.

    FORMAT      {"format": "tierstore-disk", "version": 1}
    LOCK        flocked while a store has the directory open
    blobs/<2 hex>/<32 hex>.safetensors

The hex is the start of the sha256 of the key, so a key is never a path: any text of any length is one, and none leads
out of the directory. Each file is complete in itself and opens with stock `safetensors`: one tensor called "data", and
metadata from which key, dtype, shape and stride come back. The data starts at a multiple of 4096 bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from tierstore.backend import MappedBackend
from tierstore.backends._lock import (
    TEMPORARY,
    DirectoryLock,
    check_format,
    dtype_name,
    key_fields,
    key_from,
    opening,
    prepare_root,
    read_json,
    replace_file,
    spec_from,
    sync_path,
)
from tierstore.errors import BackendError, ClosedError, CorruptionError
from tierstore.spec import TensorSpec, raw_bytes, typed_view

FORMAT_NAME, FORMAT_VERSION = "tierstore-disk", 1
ALIGNMENT = 4096  # of the data in the file and so in memory, in bytes
MAX_HEADER = 100_000_000  # bytes; the limit of safetensors

_SCRATCH_PREFIX = "tierstore-scratch-"
_SETTLED_SECONDS = 60  # how long a scratch directory may take from its creation to its lock

_SAFETENSORS_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}


@dataclass(frozen=True, slots=True)
class _Blob:
    """What `get` needs to know of a file without parsing it."""

    spec: TensorSpec
    data_offset: int
    head_crc: int

    @classmethod
    def of(cls, spec: TensorSpec, head: bytes) -> _Blob:
        return cls(spec, len(head), zlib.crc32(head))

    @property
    def file_size(self) -> int:
        return self.data_offset + self.spec.nbytes


class DiskBackend(MappedBackend):
    """Keeps tensors as safetensors files below `path`, which it creates; one store at a time has a directory open.

    Values outlive the process unless `scratch`: then nothing is flushed to the device, and `close` removes the directory.
    Each key's file is written aside and renamed into place, so a crash leaves the old value or the new one. A deletion is
    not flushed: after a power loss the value may be back. Safe to call from several threads for different keys.
    """

    def __init__(self, path: str | os.PathLike[str], *, scratch: bool = False) -> None:
        self.path = Path(path).absolute()
        self._scratch = scratch
        self._closed = False
        _check_encodable(self.path)
        with opening(self.path):
            if prepare_root(self.path, marker="FORMAT", ignored="LOCK") and scratch:
                raise BackendError(f"{self.path} belongs to another store, and scratch would remove it; choose a new directory")
            self._lock = DirectoryLock(self.path / "LOCK")
            try:
                self._blobs = self._load()
            except BaseException:
                self._lock.release()
                raise

    @classmethod
    def scratch(cls, parent: str | os.PathLike[str]) -> Self:
        """Open a fresh directory below `parent` that lasts until `close`, or until another store finds its owner dead."""
        return cls(scratch_directory(Path(parent)), scratch=True)

    def file_of(self, key: str) -> Path:
        """Return the file that holds `key`, or would."""
        return self.path / "blobs" / _file_name(key)

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._check_open()
        spec = TensorSpec.of(tensor)
        head = encode_head(key, spec)
        file = self.file_of(key)
        self._make_folder(file.parent)
        data = raw_bytes(tensor).cpu().numpy()
        replace_file(file, (head, data.data), sync=not self._scratch)
        self._blobs[key] = _Blob.of(spec, head)
        self._sync(file.parent)  # after the entry, since the new file is in place even if this fails

    def get(self, key: str) -> torch.Tensor:
        self._check_open()
        blob = self._blobs[key]
        file = self.file_of(key)
        size = _size_of(file)
        if size != blob.file_size:
            reason = "the file is missing" if size is None else f"the file has {size} bytes instead of {blob.file_size}"
            raise CorruptionError(key, str(file), reason)
        # inference mode would mark the memory as an inference tensor, which autograd refuses to save
        with torch.inference_mode(False), torch.no_grad():
            whole = _map_file(file, blob.file_size)
            if zlib.crc32(whole.numpy()[: blob.data_offset].data) != blob.head_crc:
                raise CorruptionError(key, str(file), "its header has changed")
            # through numpy the tensor's storage is the data alone, and still keeps the whole map alive
            return typed_view(torch.from_numpy(whole.numpy()[blob.data_offset :]), blob.spec)

    def delete(self, key: str) -> None:
        self._check_open()
        if key not in self._blobs:
            raise KeyError(key)
        self.file_of(key).unlink(missing_ok=True)
        del self._blobs[key]

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        self._check_open()
        return ((key, blob.spec) for key, blob in list(self._blobs.items()))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._scratch and self._lock.owned:
            shutil.rmtree(self.path, ignore_errors=True)  # what resists is swept by the next scratch store
        self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the disk store in {self.path} is closed; open it again")

    def _load(self) -> dict[str, _Blob]:
        """Check or write FORMAT, sweep what a crash left, and read every header."""
        marker = self.path / "FORMAT"
        if not marker.exists():
            text = json.dumps({"format": FORMAT_NAME, "version": FORMAT_VERSION})
            replace_file(marker, (text.encode(),), sync=not self._scratch)
            self._sync(self.path)
        check_format(self.path, read_json(marker), name=FORMAT_NAME, version=FORMAT_VERSION)
        for leftover in (*self.path.glob(f"{TEMPORARY}*"), *self.path.glob(f"blobs/*/{TEMPORARY}*")):
            leftover.unlink()
        return dict(read_blob(file) for file in sorted(self.path.glob("blobs/*/*.safetensors")))

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            self._sync(folder.parent, self.path)  # or a power loss could take the folder away from below a flushed file

    def _sync(self, *folders: Path) -> None:
        if not self._scratch:
            for folder in folders:
                sync_path(folder)


def scratch_directory(parent: Path) -> Path:
    """Create a directory for one scratch store below `parent`, after removing those whose owner is dead."""
    if (parent / "FORMAT").exists():
        raise BackendError(f"{parent} belongs to another store; choose another directory for scratch")
    with opening(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for sibling in parent.glob(f"{_SCRATCH_PREFIX}*"):
            _remove_if_dead(sibling)
        fresh = parent / f"{_SCRATCH_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        fresh.mkdir(mode=0o700)
    return fresh


def _remove_if_dead(directory: Path) -> None:
    """Remove a scratch directory that nobody has locked.

    FORMAT is written under the lock, so a directory that has it was locked by its owner. One without may be a moment old
    and about to be locked: it is left alone until it has aged.
    """
    with suppress(OSError, BackendError):
        fresh = time.time() - directory.stat().st_mtime < _SETTLED_SECONDS
        if directory.is_symlink() or (fresh and not (directory / "FORMAT").exists()):
            return
        lock = DirectoryLock(directory / "LOCK")
        shutil.rmtree(directory, ignore_errors=True)
        lock.release()


def encode_head(key: str, spec: TensorSpec) -> bytes:
    """Return what stands before the data: the header's length, the header, and the spaces that align the data."""
    header = {"__metadata__": _metadata(key, spec), "data": _plain_entry(spec)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    total = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    if total - 8 > MAX_HEADER:
        raise BackendError(f"a key of {len(key)} characters does not fit into a header of {MAX_HEADER} bytes; use a shorter key")
    return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)


def read_blob(file: Path) -> tuple[str, _Blob]:
    """Return the key and description of a stored value; raise `CorruptionError` unless all of its header agrees."""
    key = "?"
    try:
        head, size = _read_head(file)
        header = _parse_header(head)
        metadata = header["__metadata__"]
        key = key_from(metadata, "key")
        blob = _Blob.of(_spec_from(metadata), head)
        _check_header(header, key, blob.spec)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(key, str(file), str(error)) from error
    if file.parts[-2:] != _file_name(key).parts:
        raise CorruptionError(key, str(file), "the file is named for another key")
    if size != blob.file_size:
        raise CorruptionError(key, str(file), f"the file has {size} bytes instead of {blob.file_size}")
    return key, blob


def _file_name(key: str) -> Path:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    return Path(digest[:2], f"{digest[:32]}.safetensors")


def _metadata(key: str, spec: TensorSpec) -> dict[str, str]:
    fields = key_fields(key, "key") | {
        "tierstore": str(FORMAT_VERSION),
        "dtype": dtype_name(spec.dtype),
        "shape": json.dumps(spec.shape),
        "stride": json.dumps(spec.stride),
    }
    return fields | {"crc32": _checksum(fields)}


def _checksum(fields: Mapping[str, str]) -> str:
    """Guard what the sizes of the file do not: a damaged stride may span the same bytes."""
    return f"{zlib.crc32(json.dumps(sorted(fields.items())).encode()):08x}"


def _plain_entry(spec: TensorSpec) -> dict[str, object]:
    """Return an entry that any safetensors reader understands, or the raw one where the format cannot say dtype or stride."""
    name = _SAFETENSORS_NAMES.get(spec.dtype)
    if name is None or not _row_major(spec):
        return _raw_entry(spec)
    return {"dtype": name, "shape": list(spec.shape), "data_offsets": [0, spec.nbytes]}


def _raw_entry(spec: TensorSpec) -> dict[str, object]:
    return {"dtype": "U8", "shape": [spec.nbytes], "data_offsets": [0, spec.nbytes]}


def _row_major(spec: TensorSpec) -> bool:
    expected = 1
    for size, step in zip(reversed(spec.shape), reversed(spec.stride), strict=True):
        if size != 1 and step != expected:
            return 0 in spec.shape
        expected *= size
    return True


def _read_head(file: Path) -> tuple[bytes, int]:
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size} bytes")
        return prefix + stream.read(length), size


def _parse_header(head: bytes) -> dict[str, dict[str, object]]:
    try:
        header = json.loads(head[8:])
    except ValueError:
        raise ValueError("the header is not JSON") from None
    if not (isinstance(header, dict) and set(header) == {"__metadata__", "data"} and isinstance(header["__metadata__"], dict)):
        raise ValueError("the header does not describe one value")
    return header


def _spec_from(metadata: Mapping[str, object]) -> TensorSpec:
    shape, stride = metadata.get("shape"), metadata.get("stride")
    if not (isinstance(shape, str) and isinstance(stride, str)):
        raise ValueError("the header has no shape or no stride")
    return spec_from(metadata.get("dtype"), json.loads(shape), json.loads(stride))


def _check_header(header: Mapping[str, object], key: str, spec: TensorSpec) -> None:
    if header["__metadata__"] != _metadata(key, spec):
        raise ValueError("the metadata does not match its checksum or version")
    if header["data"] not in (_plain_entry(spec), _raw_entry(spec)):
        raise ValueError("the tensor entry does not match the metadata")


def _check_encodable(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise BackendError(f"the path {path!a} is not UTF-8, and torch maps no other; choose another path") from None


def _size_of(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def _map_file(file: Path, nbytes: int) -> torch.Tensor:
    """Map `file` copy-on-write as a uint8 tensor.

    Not with `mmap.mmap`: before Python 3.13 each of its maps holds a file descriptor, of which a process has 1024.
    """
    return torch.from_file(str(file), shared=False, size=nbytes, dtype=torch.uint8, device="cpu")
