"""A zarr v3 group on local disk, one array for each value, which plain zarr-python, tensorstore and others open too.

A dense tensor is the array that it looks like; one with gaps or overlaps is the bytes it spans. Dtypes that zarr lacks
are unsigned integers of the same size. Attributes of each array hold the key, dtype, shape and stride.

[Note: plain bytes]
Each array is one chunk without compression, in the order of the tensor's memory: where that is not the order of the
array, a transpose codec says so to zarr. So the chunk file is the value's bytes from its first byte on, and is read as any
file is, without zarr (whose own way takes ten times as long).

[Note: other writers]
Anybody may write to an array with zarr-python meanwhile. It replaces chunk files, so every read opens the file anew unless it
is still the one that was opened last, and what was handed out does not change. A chunk of another size, or metadata that
describes other bytes, is damage; so is a missing chunk, which zarr-python leaves where all elements are zero unless it is
told `write_empty_chunks`.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import zarr
from zarr.codecs import TransposeCodec
from zarr.storage import LocalStore

from tierstore.backend import FileBackend, FileExtent
from tierstore.backends._files import OpenFiles
from tierstore.backends._lock import (
    TEMPORARY,
    DirectoryLock,
    check_format,
    opening,
    prepare_root,
    read_json,
    sync_path,
)
from tierstore.backends._zarr_metadata import MARKER, attributes_of, chunk_of, described, layout_of, node_name
from tierstore.errors import ClosedError, CorruptionError
from tierstore.open_file import OpenFile
from tierstore.spec import TensorSpec, bytes_of, typed_view

FORMAT_NAME, FORMAT_VERSION = "tierstore-zarr", 2

_REPLACED = f"{TEMPORARY}old-"


class ZarrBackend(FileBackend):
    """Keeps tensors as arrays of the zarr group at `path`, which it creates; one store at a time has it open.

    Each array is written aside, flushed and renamed into place; what a crash leaves in between is put right when the group
    is opened next. The lock is on the group's own zarr.json, since zarr readers warn about files they do not know. Safe to
    call from several threads for different keys.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._closed = False
        self._known: dict[str, tuple[_Identity, _Identity | None]] = {}  # which metadata and chunk of each key were found right
        self._files = OpenFiles(lambda path: OpenFile(str(path)))
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
            self._write(temporary, key, tensor)
            _sync_tree(temporary)
            _replace_directory(temporary, self.node_of(key))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._forget(key)
        self._specs[key] = spec  # before the flush, since the new array is in place even if that fails
        sync_path(self.path)

    def get(self, key: str) -> torch.Tensor:
        extent = self._find(key)
        with torch.inference_mode(False), torch.no_grad():
            return typed_view(_map_file(extent.path, extent.nbytes), self._specs[key])

    def extent(self, key: str) -> FileExtent:
        extent = self._find(key)
        file, kept = self._files.borrow(Path(extent.path))
        file.close()
        return replace(extent, file=file if kept else None)

    def delete(self, key: str) -> None:
        self._check_open()
        if key not in self._specs:
            raise KeyError(key)
        node = self.node_of(key)
        if node.exists():
            aside = self.path / f"{TEMPORARY}{secrets.token_hex(8)}"
            node.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        self._forget(key)
        del self._specs[key]

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        self._check_open()
        return iter(list(self._specs.items()))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._files.close()
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
            key, spec = described(node, "?")
            if node_name(key) != node.name:
                raise CorruptionError(key, str(node), "the array is named for another key")
            yield key, spec

    def _write(self, node: Path, key: str, tensor: torch.Tensor) -> None:
        spec = TensorSpec.of(tensor)
        dtype, shape, order = layout_of(spec)
        zarr.create_array(
            self._store,
            name=node.name,
            shape=shape,
            dtype=dtype,
            chunks=tuple(max(1, size) for size in shape),
            compressors=None,
            filters=[TransposeCodec(order=order)] if order != tuple(range(len(shape))) else None,
            fill_value=0,
            attributes=attributes_of(key, spec),
        )
        if spec.nbytes:
            chunk = chunk_of(node, len(shape))
            chunk.parent.mkdir(parents=True, exist_ok=True)
            if not shape:
                shutil.rmtree(chunk, ignore_errors=True)  # zarr makes a directory of the name that is the chunk's
            chunk.write_bytes(bytes_of(tensor))

    def _find(self, key: str) -> FileExtent:
        """Return where the bytes of `key` lie, after checking that the metadata still describe them, and that they are all there."""
        self._check_open()
        spec = self._specs[key]
        node = self.node_of(key)
        chunk = chunk_of(node, len(layout_of(spec)[1])) if spec.nbytes else node / MARKER
        try:
            identity = _identity(node / MARKER)
        except OSError as error:
            raise CorruptionError(key, str(node), f"its metadata cannot be read: {error}") from error
        try:
            found = _identity(chunk)
        except FileNotFoundError:
            raise CorruptionError(key, str(chunk), "the chunk is missing") from None
        if spec.nbytes and found.size != spec.nbytes:
            raise CorruptionError(key, str(chunk), f"the chunk has {found.size} bytes instead of {spec.nbytes}")
        if self._known.get(key) != (identity, found):
            self._files.forget(chunk)
            if described(node, key) != (key, spec):
                raise CorruptionError(key, str(node), "its attributes have changed")
            self._known[key] = identity, found
        return FileExtent(str(chunk), 0, spec.nbytes)

    def _forget(self, key: str) -> None:
        """Let nothing be known of the files of `key`, which are replaced or deleted."""
        if self._known.pop(key, None) is not None and key in self._specs:
            self._files.forget(chunk_of(self.node_of(key), len(layout_of(self._specs[key])[1])))
            self._files.forget(self.node_of(key) / MARKER)


def _map_file(path: str, nbytes: int) -> torch.Tensor:
    """Map the first `nbytes` of a file copy-on-write as a uint8 tensor; an empty one is no map."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    try:
        return torch.from_file(path, shared=False, size=nbytes, dtype=torch.uint8, device="cpu")
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, f"cannot be mapped ({error})", path) from error


class _Identity(NamedTuple):
    """What differs when a file is replaced or written to."""

    inode: int
    modified_ns: int
    size: int


def _identity(file: Path) -> _Identity:
    status = file.stat()
    return _Identity(status.st_ino, status.st_mtime_ns, status.st_size)


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
