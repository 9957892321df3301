"""One value as one object: a safetensors file that says of itself which key, dtype, shape and stride it holds.

Any safetensors reader opens it as a tensor called "data". What the format cannot say, and a checksum (xxh3, 128 bits) of the
data, stands in its metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import xxhash

from tierstore.backends._lock import key_fields, key_from, parse_json, spec_from
from tierstore.errors import BackendError
from tierstore.spec import TensorSpec, dtype_name

FORMAT_NAME, FORMAT_VERSION = "tierstore-remote", 1
SUFFIX = ".safetensors"

_ALIGNMENT = 64  # bytes; where the data begins is a multiple of it
_MAX_HEAD = 100_000_000  # bytes; the limit of safetensors
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16", torch.uint32: "U32",
    torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What a reader has to know of one value: `generation` counts the values of a store, so a later one is newer."""

    key: str
    spec: TensorSpec
    generation: int
    checksum: str

    @property
    def name(self) -> str:
        """The object's own name: no path, the same for no two keys or values, also where case does not count."""
        digest = hashlib.sha256(self.key.encode("utf-8", "surrogatepass")).hexdigest()
        return f"{digest}-{self.generation:x}{SUFFIX}"

    def head(self) -> bytes:
        """Return what stands before the data: the header's length, the header, and the spaces that align the data."""
        text = json.dumps({"__metadata__": self._metadata(), "data": self._entry()}, ensure_ascii=False, separators=(",", ":")).encode()
        total = -(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT
        if total - 8 > _MAX_HEAD:
            raise BackendError(f"a key of {len(self.key)} characters does not fit into a header of {_MAX_HEAD} bytes; use a shorter key")
        return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)

    def described(self) -> dict[str, str]:
        """Return the same as text fields, from which `from_fields` makes it again."""
        fields = {
            "dtype": dtype_name(self.spec.dtype),
            "shape": json.dumps(self.spec.shape),
            "stride": json.dumps(self.spec.stride),
            "generation": str(self.generation),
            "xxh3": self.checksum,
        }
        return key_fields(self.key, "key") | fields

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> StoredObject:
        """Return what `described` described; raise `ValueError` if that is no value."""
        shape, stride, generation, checksum = (fields.get(name) for name in ("shape", "stride", "generation", "xxh3"))
        if not (isinstance(shape, str) and isinstance(stride, str) and isinstance(generation, str) and isinstance(checksum, str)):
            raise ValueError("it does not describe a value")
        spec = spec_from(fields.get("dtype"), parse_json(shape), parse_json(stride))
        return cls(key_from(fields, "key"), spec, int(generation), checksum)

    def _metadata(self) -> dict[str, str]:
        fields = self.described() | {"tierstore-object": str(FORMAT_VERSION)}
        return fields | {"check": checksum_of(json.dumps(sorted(fields.items())).encode())}

    def _entry(self) -> dict[str, object]:
        """Describe the data as the tensor that it is, or as bytes where safetensors cannot say dtype or stride."""
        name = _NAMES.get(self.spec.dtype)
        plain = name is not None and self.spec.stride == _row_major(self.spec.shape)
        shape = list(self.spec.shape) if plain else [self.spec.nbytes]
        return {"dtype": name if plain else "U8", "shape": shape, "data_offsets": [0, self.spec.nbytes]}


def checksum_of(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def head_size(start: bytes) -> int:
    """Return how many bytes stand before the data of the object that begins with `start`; raise `ValueError` if nothing can."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > _MAX_HEAD:
        raise ValueError("it does not begin like a safetensors file")
    return 8 + length


def read_head(head: bytes) -> StoredObject:
    """Return what the head of an object describes; raise `ValueError` unless all of it agrees."""
    try:
        header = parse_json(head[8:])
        found = StoredObject.from_fields(header["__metadata__"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header describes no value ({error})") from error
    if found.head() != head:
        raise ValueError("its header has been changed, or is of another version")
    return found


def write_index(values: Iterable[StoredObject]) -> bytes:
    """Return an index of `values`, which `read_index` reads."""
    fields = [stored.described() for stored in values]
    whole = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "check": checksum_of(json.dumps(fields).encode()), "values": fields}
    return json.dumps(whole).encode()


def read_index(text: bytes) -> list[StoredObject]:
    """Return what an index describes; raise `BackendError` if it is not one of this version, `ValueError` if it is damaged."""
    index = parse_json(text)
    if not isinstance(index, dict) or index.get("format") != FORMAT_NAME:
        raise BackendError(f"belongs to something else than {FORMAT_NAME}; choose another place")
    if index.get("version") != FORMAT_VERSION:
        raise BackendError(f"has version {index.get('version')!r} of {FORMAT_NAME}, and this tierstore reads version {FORMAT_VERSION}")
    fields = index.get("values")
    if not isinstance(fields, list) or checksum_of(json.dumps(fields).encode()) != index.get("check"):
        raise ValueError("its checksum does not match")
    return [StoredObject.from_fields(each) for each in fields]


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())
