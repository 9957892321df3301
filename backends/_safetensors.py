"""Headers of safetensors files, read strictly: a file from anywhere must not make anybody read what is not a tensor of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tierstore.backends._disk.blob import MAX_HEADER, SAFETENSORS_NAMES
from tierstore.backends._lock import parse_json
from tierstore.backends._pinned_file import Identity, identity_of
from tierstore.errors import CheckpointError, CorruptionError
from tierstore.spec import TensorSpec

_MOST_TENSORS = 1_000_000
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
_PACKED = {"F4": "float4_e2m1fn_x2"}  # two values in a byte: the header counts values, torch bytes
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor in a file: `offset` is that of its first byte, `identity` what the file was when that was found out."""

    file: Path
    offset: int
    spec: TensorSpec
    identity: Identity


def read_header(file: Path) -> dict[str, Located]:
    """Return every tensor of a safetensors file by its name.

    Raises `CorruptionError` unless the header describes tensors inside the file that do not overlap, and `CheckpointError`
    for a dtype that torch lacks.
    """
    text, identity = _header_text(file)
    try:
        header = parse_json(text, _without_duplicates)
    except ValueError as error:
        raise CorruptionError("", str(file), f"its header is not JSON: {error}") from None
    if not isinstance(header, dict) or len(header) > _MOST_TENSORS:
        raise CorruptionError("", str(file), "its header is not an object of tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptionError("", str(file), "its metadata are not an object of strings")
    start = 8 + len(text)
    located = {name: _located(file, name, entry, start, identity) for name, entry in header.items()}
    _check_apart(located)
    return located


def _header_text(file: Path) -> tuple[bytes, Identity]:
    with file.open("rb") as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # or data would be read ahead that is fetched directly
        status = os.fstat(stream.fileno())
        size = status.st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise CorruptionError("", str(file), f"it claims a header of {length} bytes in a file of {size} bytes")
        text = stream.read(length)
    if len(text) < length or not text.startswith(b"{"):
        raise CorruptionError("", str(file), "its header is not a JSON object")
    return text, identity_of(status)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{name!r} is there twice")
    return found


def _located(file: Path, name: str, entry: object, start: int, identity: Identity) -> Located:
    if not (isinstance(entry, dict) and entry.keys() == _FIELDS):
        raise CorruptionError(name, str(file), "its entry has other fields than dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise CorruptionError(name, str(file), f"shape {shape!r} and offsets {offsets!r} are not sizes")
    spec = _spec(file, name, entry["dtype"], shape)
    begin, end = offsets
    room = identity.size - start
    if not 0 <= begin <= end <= room:
        raise CorruptionError(name, str(file), f"its bytes {begin} to {end} are not inside the {room} bytes of data")
    if end - begin != spec.nbytes:
        raise CorruptionError(name, str(file), f"{spec.dtype} of shape {spec.shape} takes {spec.nbytes} bytes, not {end - begin}")
    return Located(file, start + begin, spec, identity)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _spec(file: Path, name: str, dtype: object, shape: list[int]) -> TensorSpec:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    packed = getattr(torch, _PACKED.get(str(dtype), ""), None)
    if packed is not None:
        if not shape or shape[-1] % 2:
            raise CorruptionError(name, str(file), f"{dtype} of shape {shape} does not fill its last byte")
        found, shape = packed, [*shape[:-1], shape[-1] // 2]
    if found is None:
        raise CheckpointError(f"{name!r} in {file} has dtype {dtype!r}, which this torch lacks; convert the file, or use a newer torch")
    return TensorSpec(found, tuple(shape), _row_major(file, name, shape))


def _row_major(file: Path, name: str, shape: list[int]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
        if step >= 1 << 63:  # also for the sake of time: products of thousands of sizes have thousands of digits
            raise CorruptionError(name, str(file), f"a shape of {len(shape)} sizes takes more elements than a tensor can have")
    return tuple(reversed(stride))


def _check_apart(located: Mapping[str, Located]) -> None:
    end, before = 0, ""
    for name, tensor in sorted(located.items(), key=lambda item: (item[1].offset, item[1].spec.nbytes)):
        if tensor.spec.nbytes and tensor.offset < end:
            raise CorruptionError(name, str(tensor.file), f"its bytes overlap those of {before!r}")
        if tensor.spec.nbytes:
            end, before = tensor.offset + tensor.spec.nbytes, name
