"""Values for the length of a process: ranges of one file that has no name, so that nothing is left of it, whatever happens."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tierstore.backend import FileBackend, FileExtent
from tierstore.backends._disk.failures import Owner, explained
from tierstore.backends._disk.stretches import ScratchFile, Stretch
from tierstore.checksum import Proof, Verify, check_verify, checksums
from tierstore.errors import BackendError
from tierstore.file_system import FileSystem
from tierstore.spec import TensorSpec, bytes_of, typed_view

_SYSTEM = FileSystem()


@dataclass(frozen=True, slots=True)
class _Value:
    spec: TensorSpec
    stretch: Stretch
    sums: bytes = b""


class ScratchBackend(FileBackend):
    """Keeps tensors on the file system of `folder`, which is created, until `close`, or until the process ends in any way.

    Nothing is flushed, nothing can be opened again, and no name is ever seen in `folder`. Values are written and read
    around the page cache. With `verify="always"` every read is checked against what was written; otherwise nothing is,
    since only this process can have written it. Safe to call from several threads for different keys.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: Verify = "first", system: FileSystem = _SYSTEM) -> None:
        check_verify(verify)
        self.folder = Path(folder).absolute()
        self._always = verify == "always"
        self._values: dict[str, _Value] = {}
        self._owner = Owner(f"the scratch store in {self.folder}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = ScratchFile(self.folder, system)
        except OSError as error:
            raise BackendError(f"cannot put scratch files into {self.folder}: {error}; choose a directory to write to") from error
        self._end = weakref.finalize(self, _close, self._file, self._owner)

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._owner.check()
        data = bytes_of(tensor)
        sums = checksums(data) if self._always else b""
        with explained(f"storing {key!r}", self.folder):
            stretch = self._file.store(data)
        before = self._values.get(key)
        self._values[key] = _Value(TensorSpec.of(tensor), stretch, sums)
        if before is not None:
            before.stretch.release()

    def get(self, key: str) -> torch.Tensor:
        extent = self.extent(key)
        value = self._values[key]
        with explained(f"reading {key!r}", self.folder):
            extent.prove(value.stretch)
            # inference mode would mark the memory as an inference tensor, which autograd refuses to save
            with torch.inference_mode(False), torch.no_grad():
                return typed_view(value.stretch.map(), value.spec)

    def extent(self, key: str) -> FileExtent:
        self._owner.check()
        value = self._values[key]
        place = f"{self.folder} (scratch)"
        proof = Proof(value.sums, value.spec.nbytes, key, place, _nothing) if self._always else None
        return FileExtent(place, value.stretch.start, value.spec.nbytes, value.stretch, proof)

    def delete(self, key: str) -> None:
        self._owner.check()
        self._values.pop(key).stretch.release()

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        self._owner.check()
        return ((key, value.spec) for key, value in list(self._values.items()))

    def close(self) -> None:
        if self._owner.here:
            self._owner.closed = True
            self._values.clear()
        self._end()


def _close(file: ScratchFile, owner: Owner) -> None:
    if owner.here:  # a forked child's locks may be held by threads that it does not have
        file.close()


def _nothing() -> None:
    """A value that is checked at every read never counts as checked."""
