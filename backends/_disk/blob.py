"""The format of one stored value: a safetensors file that is complete in itself, so that the index can be made anew from them."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from tierstore.backends._disk.rows import Row
from tierstore.backends._lock import key_fields, key_from, parse_json, spec_from
from tierstore.checksum import checksum, sums_size
from tierstore.errors import BackendError
from tierstore.spec import TensorSpec, dtype_name

FORMAT_VERSION = 2
ALIGNMENT = 4096  # of the data in the file and so in memory, in bytes
MAX_HEADER = 100_000_000  # bytes; the limit of safetensors

_FRAME = 512  # bytes; more than a head has beside its key, its sizes and its checksums
_CHARACTER = 8  # bytes that one of the key takes at most: four in UTF-8, as hexadecimal digits
_DIMENSION = 3 * 22  # and a dimension, which is in the shape, the stride, and the shape of the entry

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


def encode_head(key: str, spec: TensorSpec, sums: bytes, generation: int, store: str) -> bytes:
    """Return what stands before the data: the header's length, the header, and the spaces that align the data.

    Its size does not depend on what the checksums `sums` are. `store` is the id of the store that owns the blob.
    """
    fields = key_fields(key, "key") | {
        "tierstore": str(FORMAT_VERSION),
        "store": store,
        "generation": str(generation),
        "dtype": dtype_name(spec.dtype),
        "shape": json.dumps(spec.shape),
        "stride": json.dumps(spec.stride),
        "xxh3": sums.hex(),
    }
    fields["seal"] = checksum(json.dumps(sorted(fields.items())).encode()).hex()
    return pack_head({"__metadata__": fields, "data": tensor_entry(spec)}, key)


def encoded_size(key: str, spec: TensorSpec, generation: int, store: str) -> int:
    """Return the size of what `encode_head` will return; where a page is sure to do, at once: a value's first write waits for it."""
    sums = sums_size(spec.nbytes)
    if _FRAME + _CHARACTER * len(key) + _DIMENSION * len(spec.shape) + 2 * sums <= ALIGNMENT:
        return ALIGNMENT
    return len(encode_head(key, spec, bytes(sums), generation, store))


def decode_head(head: bytes, blob: str) -> tuple[Row, str]:
    """Return the row that a head describes, and the id of the store that owns it.

    Raises `ValueError` unless every byte is what `encode_head` would write: nothing in it has changed since.
    """
    metadata = parse_head(head)["__metadata__"]
    key = key_from(metadata, "key")
    spec = spec_in(metadata)
    sums, generation, store = _text(metadata, "xxh3"), _text(metadata, "generation"), _text(metadata, "store")
    row = Row(key, blob, len(head), spec, bytes.fromhex(sums), checksum(head), int(generation), FORMAT_VERSION)
    if len(row.sums) != sums_size(spec.nbytes) or head != encode_head(key, spec, row.sums, row.generation, store):
        raise ValueError("the header does not match its checksum or version")
    return row, store


def head_size(prefix: bytes, file_size: int) -> int:
    """Return how many bytes stand before the data of a file that begins with `prefix`, 8 bytes; `ValueError` if that cannot be."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, file_size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {file_size} bytes")
    return 8 + length


def parse_head(head: bytes) -> dict[str, dict[str, object]]:
    """Return the header's two entries, which are JSON objects; raise `ValueError` if it has others."""
    try:
        header = parse_json(head[8:])
    except ValueError:
        raise ValueError("the header is not JSON") from None
    if isinstance(header, dict) and set(header) == {"__metadata__", "data"} and isinstance(header["__metadata__"], dict):
        return header
    raise ValueError("the header does not describe one value")


def pack_head(header: Mapping[str, object], key: str) -> bytes:
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    total = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    if total - 8 > MAX_HEADER:
        raise BackendError(f"a key of {len(key)} characters does not fit into a header of {MAX_HEADER} bytes; use a shorter key")
    return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)


def tensor_entry(spec: TensorSpec) -> dict[str, object]:
    """Return an entry that any safetensors reader understands: the tensor, or its bytes where the format has no such dtype or stride."""
    name = SAFETENSORS_NAMES.get(spec.dtype)
    if name is None or not _row_major(spec):
        return raw_entry(spec)
    return {"dtype": name, "shape": list(spec.shape), "data_offsets": [0, spec.nbytes]}


def raw_entry(spec: TensorSpec) -> dict[str, object]:
    return {"dtype": "U8", "shape": [spec.nbytes], "data_offsets": [0, spec.nbytes]}


def spec_in(metadata: Mapping[str, object]) -> TensorSpec:
    shape, stride = parse_json(_text(metadata, "shape")), parse_json(_text(metadata, "stride"))
    return spec_from(metadata.get("dtype"), shape, stride)


def _text(metadata: Mapping[str, object], name: str) -> str:
    text = metadata.get(name)
    if not isinstance(text, str):
        raise ValueError(f"the header has no {name}")
    return text


def _row_major(spec: TensorSpec) -> bool:
    expected = 1
    for size, step in zip(reversed(spec.shape), reversed(spec.stride), strict=True):
        if size != 1 and step != expected:
            return 0 in spec.shape
        expected *= size
    return True
