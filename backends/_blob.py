"""The format of one stored value: a safetensors file that is complete in itself."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tierstore.backends._lock import dtype_name, key_fields, key_from, spec_from
from tierstore.errors import BackendError, CorruptionError
from tierstore.spec import TensorSpec

FORMAT_VERSION = 1
ALIGNMENT = 4096  # of the data in the file and so in memory, in bytes
MAX_HEADER = 100_000_000  # bytes; the limit of safetensors

SAFETENSORS_NAMES = {
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
class Blob:
    """What `get` needs to know of a file without parsing it."""

    spec: TensorSpec
    data_offset: int
    head_crc: int

    @classmethod
    def of(cls, spec: TensorSpec, head: bytes) -> Blob:
        return cls(spec, len(head), zlib.crc32(head))

    def check_head(self, head: bytes | memoryview, key: str, file: Path) -> None:
        """Raise `CorruptionError` unless `head`, what stands before the data now, is what was there at first."""
        if zlib.crc32(head) != self.head_crc:
            raise CorruptionError(key, str(file), "its header has changed")

    @property
    def file_size(self) -> int:
        return self.data_offset + self.spec.nbytes


def encode_head(key: str, spec: TensorSpec) -> bytes:
    """Return what stands before the data: the header's length, the header, and the spaces that align the data."""
    header = {"__metadata__": _metadata(key, spec), "data": _plain_entry(spec)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    total = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    if total - 8 > MAX_HEADER:
        raise BackendError(f"a key of {len(key)} characters does not fit into a header of {MAX_HEADER} bytes; use a shorter key")
    return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)


def read_blob(file: Path) -> tuple[str, Blob]:
    """Return the key and description of a stored value; raise `CorruptionError` unless all of its header agrees."""
    key = "?"
    try:
        head, size = _read_head(file)
        header = _parse_header(head)
        metadata = header["__metadata__"]
        key = key_from(metadata, "key")
        blob = Blob.of(_spec_from(metadata), head)
        _check_header(header, key, blob.spec)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(key, str(file), str(error)) from error
    if file.parts[-2:] != file_name(key).parts:
        raise CorruptionError(key, str(file), "the file is named for another key")
    if size != blob.file_size:
        raise CorruptionError(key, str(file), f"the file has {size} bytes instead of {blob.file_size}")
    return key, blob


def file_name(key: str) -> Path:
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
    name = SAFETENSORS_NAMES.get(spec.dtype)
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
