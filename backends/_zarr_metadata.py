"""How a value is described to zarr: the name of its array, its attributes, and metadata that make its chunk plain bytes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tierstore.backends._lock import key_fields, key_from, read_json, spec_from
from tierstore.errors import CorruptionError
from tierstore.spec import TensorSpec, dtype_name

if TYPE_CHECKING:  # a name of some zarr releases only
    from zarr.core.common import JSON

MARKER = "zarr.json"

_LONGEST_NAME = 100  # characters; file systems stop at 255, and `_REPLACED` comes before it
_NATIVE = frozenset(
    ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    + ("float16", "float32", "float64", "complex64", "complex128")
)  # dtypes that numpy and zarr have too, by the same names


def node_name(key: str) -> str:
    """Return the name of the array of `key`: no two keys share one, not even where case does not count."""
    # zarr reserves names that start with "__", and "%" alone cannot come from an encoded key
    name = re.sub(rb"^_|[^a-z0-9_-]", lambda found: b"%%%02X" % found[0][0], key.encode("utf-8", "surrogatepass")).decode()
    if len(name) > _LONGEST_NAME:
        return f"%sha256-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return name or "%"


def attributes_of(key: str, spec: TensorSpec) -> dict[str, JSON]:
    return {
        **key_fields(key, "tierstore_key"),
        "tierstore_dtype": dtype_name(spec.dtype),
        "tierstore_shape": list(spec.shape),
        "tierstore_stride": list(spec.stride),
    }


def described(node: Path, key: str) -> tuple[str, TensorSpec]:
    """Return the key and spec in an array's attributes; raise `CorruptionError` unless its chunk has the plain bytes of such a tensor."""
    metadata = read_json(node / MARKER) if (node / MARKER).is_file() else None
    fields = metadata.get("attributes") if isinstance(metadata, dict) else None
    if not (isinstance(metadata, dict) and isinstance(fields, dict)):
        raise CorruptionError(key, str(node), "its metadata do not describe an array of this store")
    try:
        key = key_from(fields, "tierstore_key")
        spec = spec_from(*(fields.get(f"tierstore_{name}") for name in ("dtype", "shape", "stride")))
    except ValueError as error:
        raise CorruptionError(key, str(node), str(error)) from error
    for name, wanted in _plain_metadata(spec).items():
        if _without_defaults(metadata.get(name)) != wanted:
            raise CorruptionError(
                key, str(node), f"the array does not match its attributes, or is not stored as plain bytes any more ({name})"
            )
    return key, spec


def _plain_metadata(spec: TensorSpec) -> dict[str, object]:
    """Return those metadata of an array that say which bytes are in its chunk."""
    dtype, shape, order = layout_of(spec)
    codecs: list[object] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if order != tuple(range(len(shape))):
        codecs.insert(0, {"name": "transpose", "configuration": {"order": list(order)}})
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, size) for size in shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": codecs,
    }


def _without_defaults(value: object) -> object:
    """Return a part of the metadata with what writers may leave out of the codec for bytes, for elements of one byte."""
    if not isinstance(value, list):
        return value
    return [{"name": "bytes", "configuration": {"endian": "little"}} if each == {"name": "bytes"} else each for each in value]


def layout_of(spec: TensorSpec) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Return dtype and shape of the array that holds a tensor of `spec`, and its dimensions in the order of memory, slowest first."""
    if not spec.dense:
        return "uint8", (spec.nbytes,), (0,)
    name = dtype_name(spec.dtype)
    large = [dim for dim, size in enumerate(spec.shape) if size > 1]
    ordered = sorted(large, key=lambda dim: -spec.stride[dim])
    rest = [dim for dim, size in enumerate(spec.shape) if size <= 1]
    order = sorted(large + rest) if ordered == large else ordered + rest
    return name if name in _NATIVE else f"uint{8 * spec.dtype.itemsize}", spec.shape, tuple(order)


def chunk_of(node: Path, dimensions: int) -> Path:
    return node.joinpath("c", *("0",) * dimensions)
