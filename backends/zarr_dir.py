"""A zarr v3 group on local disk, one array for each value, which plain zarr-python and other readers open too.

A dense tensor is the array that it looks like; one with gaps or overlaps is the bytes it spans. Dtypes that zarr lacks
are unsigned integers of the same size. Attributes of each array hold the key, dtype, shape and stride.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.buffer.cpu import NDBuffer
from zarr.storage import LocalStore

from tierstore.backend import Backend
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
    spec_from,
    sync_path,
)
from tierstore.errors import ClosedError, CorruptionError
from tierstore.spec import TensorSpec, raw_bytes, typed_view

if TYPE_CHECKING:  # names of some zarr releases only
    from zarr.core.common import JSON
    from zarr.types import AnyArray

FORMAT_NAME, FORMAT_VERSION = "tierstore-zarr", 1
MARKER = "zarr.json"

_REPLACED = f"{TEMPORARY}old-"
_LONGEST_NAME = 100  # characters; file systems stop at 255, and `_REPLACED` comes before it
_NATIVE = frozenset(
    ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    + ("float16", "float32", "float64", "complex64", "complex128")
)  # dtypes that numpy and zarr have too, by the same names


class ZarrBackend(Backend):
    """Keeps tensors as arrays of the zarr group at `path`, which it creates; one store at a time has it open.

    Each array is written aside, flushed and renamed into place; what a crash leaves in between is put right when the group
    is opened next. The lock is on the group's own zarr.json, since zarr readers warn about files they do not know. Safe to
    call from several threads for different keys.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._closed = False
        with opening(self.path):
            prepare_root(self.path, marker=MARKER)
            self._lock = DirectoryLock(self.path / MARKER)
            try:
                self._prepare_group()
                self._store = LocalStore(self.path)
                self._specs = dict(self._load())
            except BaseException:
                self._lock.release()
                raise

    def node_of(self, key: str) -> Path:
        """Return the directory that holds the array of `key`, or would."""
        return self.path / node_name(key)

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._check_open()
        spec = TensorSpec.of(tensor)
        temporary = self.path / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            self._write(temporary.name, key, tensor)
            _sync_tree(temporary)
            _replace_directory(temporary, self.node_of(key))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._specs[key] = spec  # before the flush, since the new array is in place even if that fails
        sync_path(self.path)

    def get(self, key: str) -> torch.Tensor:
        self._check_open()
        spec = self._specs[key]
        node = self.node_of(key)
        array = self._open_array(node, key)
        if _described(array, node, key) != (key, spec):
            raise CorruptionError(key, str(node), "its attributes have changed")
        _check_chunk(key, node, array, spec)
        with torch.inference_mode(False), torch.no_grad():
            raw = torch.empty(spec.nbytes, dtype=torch.uint8, device="cpu")
            array.get_basic_selection(Ellipsis, out=NDBuffer.from_numpy_array(_as_array(raw, spec)))
            return typed_view(raw, spec)

    def delete(self, key: str) -> None:
        self._check_open()
        if key not in self._specs:
            raise KeyError(key)
        node = self.node_of(key)
        if node.exists():
            aside = self.path / f"{TEMPORARY}{secrets.token_hex(8)}"
            node.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        del self._specs[key]

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        self._check_open()
        return iter(list(self._specs.items()))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._store.close()
            self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the zarr store in {self.path} is closed; open it again")

    def _prepare_group(self) -> None:
        """Write the group's metadata if the lock has just created its file, check it, and repair what a crash left."""
        marker = self.path / MARKER
        if marker.stat().st_size == 0:
            ours = {"format": FORMAT_NAME, "version": FORMAT_VERSION}
            # in place: a rename would leave the lock on a file that is gone
            marker.write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"tierstore": ours}}))
            sync_path(marker)
            sync_path(self.path)
        check_format(self.path, _group_format(read_json(marker)), name=FORMAT_NAME, version=FORMAT_VERSION)
        for replaced in self.path.glob(f"{_REPLACED}*"):
            _restore_replaced(replaced)
        for leftover in self.path.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)

    def _load(self) -> Iterator[tuple[str, TensorSpec]]:
        for node in sorted(path for path in self.path.iterdir() if path.is_dir()):
            key, spec = _described(self._open_array(node, "?"), node, "?")
            if node_name(key) != node.name:
                raise CorruptionError(key, str(node), "the array is named for another key")
            yield key, spec

    def _open_array(self, node: Path, key: str) -> AnyArray:
        try:
            return zarr.open_array(self._store, path=node.name, mode="r", zarr_format=3)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptionError(key, str(node), f"its metadata does not describe an array: {error}") from error

    def _write(self, name: str, key: str, tensor: torch.Tensor) -> None:
        spec = TensorSpec.of(tensor)
        dtype, shape, chunks = _layout(spec)
        array = zarr.create_array(
            self._store,
            name=name,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            compressors=None,
            filters=None,
            fill_value=0,
            attributes=_attributes(key, spec),
            config={"write_empty_chunks": True},  # or zeros would look like a lost chunk
        )
        if spec.nbytes:
            array[...] = _as_array(raw_bytes(tensor).cpu(), spec)


def node_name(key: str) -> str:
    """Return the name of the array of `key`: no two keys share one, not even where case does not count."""
    # zarr reserves names that start with "__", and "%" alone cannot come from an encoded key
    name = re.sub(rb"^_|[^a-z0-9_-]", lambda found: b"%%%02X" % found[0][0], key.encode("utf-8", "surrogatepass")).decode()
    if len(name) > _LONGEST_NAME:
        return f"%sha256-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return name or "%"


def _attributes(key: str, spec: TensorSpec) -> dict[str, JSON]:
    return {
        **key_fields(key, "tierstore_key"),
        "tierstore_dtype": dtype_name(spec.dtype),
        "tierstore_shape": list(spec.shape),
        "tierstore_stride": list(spec.stride),
    }


def _described(array: AnyArray, node: Path, key: str) -> tuple[str, TensorSpec]:
    """Return the key and spec in the attributes; raise `CorruptionError` if the array cannot hold such a tensor."""
    fields: Mapping[str, object] = array.attrs.asdict()
    try:
        key = key_from(fields, "tierstore_key")
        spec = spec_from(*(fields.get(f"tierstore_{name}") for name in ("dtype", "shape", "stride")))
    except ValueError as error:
        raise CorruptionError(key, str(node), str(error)) from error
    if (array.dtype, array.shape, array.chunks) != _layout(spec):
        raise CorruptionError(key, str(node), "the array does not match its attributes")
    return key, spec


def _layout(spec: TensorSpec) -> tuple[np.dtype, tuple[int, ...], tuple[int, ...]]:
    """Return dtype, shape and chunk shape of the array that holds a tensor of `spec`."""
    if not spec.dense:
        return np.dtype(np.uint8), (spec.nbytes,), (max(1, spec.nbytes),)
    name = dtype_name(spec.dtype)
    dtype = np.dtype(name if name in _NATIVE else f"uint{8 * spec.dtype.itemsize}")
    return dtype, spec.shape, tuple(max(1, size) for size in spec.shape)


def _as_array(raw: torch.Tensor, spec: TensorSpec) -> npt.NDArray[np.generic]:
    """Return the bytes of a tensor as the array that holds it, sharing their memory."""
    dtype, shape, _ = _layout(spec)
    strides = tuple(step * dtype.itemsize for step in spec.stride) if spec.dense and spec.nbytes else None
    return np.ndarray(shape, dtype, buffer=raw.numpy().data, strides=strides)


def _check_chunk(key: str, node: Path, array: AnyArray, spec: TensorSpec) -> None:
    """Raise unless the only chunk is there in full: zarr would read a missing one as zeros."""
    if spec.nbytes == 0:
        return
    chunk = node.joinpath("c", *("0" for _ in array.shape))
    if not chunk.is_file():
        raise CorruptionError(key, str(chunk), "the chunk is missing")
    if chunk.stat().st_size != spec.nbytes:
        raise CorruptionError(key, str(chunk), f"the chunk has {chunk.stat().st_size} bytes instead of {spec.nbytes}")


def _group_format(group: object) -> object:
    attributes = group.get("attributes") if isinstance(group, dict) else None
    return attributes.get("tierstore") if isinstance(attributes, dict) else None


def _replace_directory(new: Path, final: Path) -> None:
    """Rename `new` to `final`; the older directory comes back if that fails, or at the next opening after a crash."""
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if replaced.exists():
        _restore_replaced(replaced)
    if final.exists():
        final.rename(replaced)
    try:
        new.rename(final)
    except BaseException:
        if replaced.exists():
            replaced.rename(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _restore_replaced(replaced: Path) -> None:
    """Finish a replacement that was cut short: the new directory if it is in place, else the older one."""
    final = replaced.with_name(replaced.name.removeprefix(_REPLACED))
    if final.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(final)


def _sync_tree(root: Path) -> None:
    for path in (*root.rglob("*"), root):
        sync_path(path)
