"""A directory of safetensors files, one for each value, read through private maps.

    FORMAT      {"format": "tierstore-disk", "version": 1}
    LOCK        flocked while a store has the directory open
    blobs/<2 hex>/<32 hex>.safetensors

The hex is the start of the sha256 of the key, so a key is never a path: any text of any length is one, and none leads
out of the directory. Each file is complete in itself and opens with stock `safetensors`: one tensor called "data", and
metadata from which key, dtype, shape and stride come back. The data starts at a multiple of 4096 bytes.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch

from tierstore.backend import FileBackend, FileExtent
from tierstore.backends._blob import FORMAT_VERSION, Blob, encode_head, file_name, read_blob
from tierstore.backends._files import OpenFiles
from tierstore.backends._lock import (
    TEMPORARY,
    DirectoryLock,
    check_format,
    opening,
    prepare_root,
    read_json,
    replace_file,
    sync_path,
)
from tierstore.errors import BackendError, ClosedError, CorruptionError
from tierstore.spec import TensorSpec, raw_bytes, typed_view

FORMAT_NAME = "tierstore-disk"

_SCRATCH_PREFIX = "tierstore-scratch-"
_SETTLED_SECONDS = 60  # how long a scratch directory may take from its creation to its lock


class DiskBackend(FileBackend):
    """Keeps tensors as safetensors files below `path`, which it creates; one store at a time has a directory open.

    Values outlive the process unless `scratch`: then nothing is flushed to the device, and `close` removes the directory.
    Each key's file is written aside and renamed into place, so a crash leaves the old value or the new one. A deletion is
    not flushed: after a power loss the value may be back. Safe to call from several threads for different keys.
    """

    def __init__(self, path: str | os.PathLike[str], *, scratch: bool = False) -> None:
        self.path = Path(path).absolute()
        self._scratch = scratch
        self._closed = False
        self._known: dict[str, tuple[int, int]] = {}  # which file of each key was found right
        self._files = OpenFiles()
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
        return self.path / "blobs" / file_name(key)

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._check_open()
        spec = TensorSpec.of(tensor)
        head = encode_head(key, spec)
        file = self.file_of(key)
        self._make_folder(file.parent)
        data = raw_bytes(tensor).cpu().numpy()
        replace_file(file, (head, data.data), sync=not self._scratch)
        self._files.forget(file)
        self._blobs[key] = Blob.of(spec, head)
        self._known[key] = _identity(file.stat())
        self._sync(file.parent)  # after the entry, since the new file is in place even if this fails

    def get(self, key: str) -> torch.Tensor:
        file, blob = self._find(key)
        # inference mode would mark the memory as an inference tensor, which autograd refuses to save
        with torch.inference_mode(False), torch.no_grad():
            whole = _map_file(file, blob.file_size)
            # through numpy the tensor's storage is the data alone, and still keeps the whole map alive
            return typed_view(torch.from_numpy(whole.numpy()[blob.data_offset :]), blob.spec)

    def extent(self, key: str) -> FileExtent:
        file, blob = self._find(key)
        return FileExtent(str(file), blob.data_offset, blob.spec.nbytes, self._files.of(file))

    def delete(self, key: str) -> None:
        self._check_open()
        if key not in self._blobs:
            raise KeyError(key)
        file = self.file_of(key)
        file.unlink(missing_ok=True)
        self._files.forget(file)
        self._known.pop(key, None)
        del self._blobs[key]

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        self._check_open()
        return ((key, blob.spec) for key, blob in list(self._blobs.items()))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._files.close()
        if self._scratch and self._lock.owned:
            shutil.rmtree(self.path, ignore_errors=True)  # what resists is swept by the next scratch store
        self._lock.release()

    def _find(self, key: str) -> tuple[Path, Blob]:
        """Return the file of `key` and its description, after checking that its size is right, and that nobody has changed it.

        The header is read again only if the file is another one, or was written to, since it was last found right.
        """
        self._check_open()
        blob = self._blobs[key]
        file = self.file_of(key)
        try:
            status = file.stat()
        except FileNotFoundError:
            raise CorruptionError(key, str(file), "the file is missing") from None
        if status.st_size != blob.file_size:
            raise CorruptionError(key, str(file), f"the file has {status.st_size} bytes instead of {blob.file_size}")
        if self._known.get(key) != _identity(status):
            self._files.forget(file)
            blob.check_head(_read_start(file, blob.data_offset), key, file)
            self._known[key] = _identity(status)
        return file, blob

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the disk store in {self.path} is closed; open it again")

    def _load(self) -> dict[str, Blob]:
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


def _check_encodable(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise BackendError(f"the path {path!a} is not UTF-8, and torch maps no other; choose another path") from None


def _identity(status: os.stat_result) -> tuple[int, int]:
    """Return what differs when a file is replaced or written to."""
    return status.st_ino, status.st_mtime_ns


def _read_start(file: Path, nbytes: int) -> bytes:
    """Read the first bytes of a file."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # or the kernel would read data ahead that is fetched directly
        return os.pread(descriptor, nbytes, 0)
    finally:
        os.close(descriptor)


def _map_file(file: Path, nbytes: int) -> torch.Tensor:
    """Map `file` copy-on-write as a uint8 tensor.

    Not with `mmap.mmap`: before Python 3.13 each of its maps holds a file descriptor, of which a process has 1024.
    """
    try:
        return torch.from_file(str(file), shared=False, size=nbytes, dtype=torch.uint8, device="cpu")
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, f"cannot be mapped ({error})", str(file)) from error
