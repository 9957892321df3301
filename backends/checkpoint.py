"""A checkpoint as the home of a model's weights: its files are read where they are, and never written to."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from tierstore.backend import Backend, FileBackend, FileExtent, MappedBackend, SourceBackend
from tierstore.backends._disk.maps import map_range
from tierstore.backends._files import OpenFiles
from tierstore.backends._pieces import PieceReader
from tierstore.backends._pinned_file import Identity, PinnedFile, check_identity, status_of
from tierstore.backends._shards import find_tensors, looks_like_one
from tierstore.backends.disk import DiskBackend
from tierstore.errors import BackendError, BudgetError, ClosedError, CorruptionError, StorageError
from tierstore.file_system import FileSystem
from tierstore.ledger import Ledger
from tierstore.maintenance import Contents, Described
from tierstore.open_file import OpenFile
from tierstore.recipe import Recipe, Stored, compute, fill
from tierstore.spec import TensorSpec, raw_bytes, typed_view

_LARGE = 1 << 20  # bytes from which a computed value that somebody keeps is written to a file instead of taking memory


class CheckpointBackend(SourceBackend, Described):
    """Presents the checkpoint at `path`: a safetensors or `torch.save` file, a directory of them, or an index of shards.

    What is put goes to `scratch`, a directory or a backend that this one then owns; without it to a directory made beside
    the checkpoint when it is first needed, which lasts until `close`. It takes `limit` bytes at most (None: no limit);
    beyond, `put` raises `BudgetError`. Files are opened once and must not change meanwhile: what is read from one that did
    raises `CorruptionError`. Safe to call from several threads for different keys; the lock is held to count what is
    written, and while scratch is made.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, scratch: str | os.PathLike[str] | Backend | None = None, limit: int | None = None
    ) -> None:
        self.path = Path(path).absolute()
        self._located = find_tensors(self.path)
        self._identities: dict[Path, Identity] = {tensor.file: tensor.identity for tensor in self._located.values()}
        self._tensors = {name: Stored(name, tensor.spec) for name, tensor in self._located.items()}
        self._recipes: dict[str, Recipe] = dict(self._tensors)
        self._files = OpenFiles(self._open)
        self._pieces = PieceReader()
        self._lock = threading.Lock()
        self._place = scratch
        self._scratch = scratch if isinstance(scratch, Backend) else None
        self._written: dict[str, int] = {}
        self._ledger = Ledger(limit)
        self._closed = False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return looks_like_one(path)

    @classmethod
    def describe(cls, path: Path) -> Contents:
        located = find_tensors(path)
        folder = path if path.is_dir() else path.parent
        tensors = {name: (tensor.spec, str(tensor.file.relative_to(folder))) for name, tensor in located.items()}
        files = {str(tensor.file.relative_to(folder)): tensor.identity.size for tensor in located.values()}
        facts = {"format": ", ".join(sorted({tensor.file.suffix.removeprefix(".") for tensor in located.values()}))}
        return Contents(str(path), "checkpoint", tensors, files, facts)

    # -- the checkpoint -----------------------------------------------------------------------------------------

    def tensors(self) -> Mapping[str, Stored]:
        return dict(self._tensors)

    def bind(self, recipes: Mapping[str, Recipe]) -> None:
        self._recipes = dict(recipes)

    def compute(self, recipe: Recipe) -> torch.Tensor:
        self._check_open()
        with torch.inference_mode(False), torch.no_grad():
            return compute(recipe, self)

    def read(self, stored: Stored, out: torch.Tensor) -> None:
        """Copy a tensor of the checkpoint, or a view of one, into `out`, casting it to the dtype of `out`."""
        located = self._located[stored.name]
        offset = located.offset + stored.offset * stored.spec.dtype.itemsize
        with self._naming(stored.name), self._opened(located.file) as file:
            self._pieces.read(file, offset, stored.spec, out)

    # -- values -------------------------------------------------------------------------------------------------

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._check_open()
        nbytes = TensorSpec.of(tensor).nbytes
        scratch = self._made_scratch()
        self._reserve(key, nbytes)
        try:
            scratch.put(key, tensor)
        except BaseException:
            self._release(nbytes)
            raise
        self._release(self._written.get(key, 0))
        self._written[key] = nbytes

    def get(self, key: str) -> torch.Tensor:
        self._check_open()
        if key in self._written:
            return self._from_scratch(key)
        recipe = self._recipes[key]
        offset = self._direct_offset(recipe)
        with torch.inference_mode(False), torch.no_grad():
            if offset is None or not isinstance(recipe, Stored):
                return self.compute(recipe)
            with self._naming(key), self._opened(self._current(recipe, key)) as file:
                return typed_view(_mapped(file, offset, recipe.spec.nbytes), recipe.spec)

    def extent(self, key: str) -> FileExtent | None:
        self._check_open()
        if key in self._written:
            scratch = self._made_scratch()
            return scratch.extent(key) if isinstance(scratch, FileBackend) else None
        recipe = self._recipes[key]
        offset = self._direct_offset(recipe)
        if offset is None or not isinstance(recipe, Stored):
            return None
        with self._naming(key):
            path = self._current(recipe, key)
            file, kept = self._files.borrow(path)
        file.close()
        return FileExtent(str(path), offset, recipe.spec.nbytes, file) if kept else None

    def fill(self, key: str, out: torch.Tensor) -> None:
        self._check_open()
        with torch.inference_mode(False), torch.no_grad():
            if key in self._written:
                raw_bytes(out).copy_(raw_bytes(self._from_scratch(key)))
            else:
                fill(self._recipes[key], out, self)

    def keep(self, key: str) -> torch.Tensor:
        if key not in self._written and self._direct_offset(self._recipes[key]) is None and self._recipes[key].spec.nbytes >= _LARGE:
            self.put(key, self.get(key))
        return self.get(key)

    def delete(self, key: str) -> None:
        """Forget a value in memory; the checkpoint stays as it is."""
        self._check_open()
        if key not in self._written and key not in self._recipes:
            raise KeyError(key)
        if key in self._written:
            self._made_scratch().delete(key)
            self._release(self._written.pop(key))
        self._recipes.pop(key, None)

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        self._check_open()
        written = dict(self._scratch.entries()) if self._scratch is not None else {}
        specs = {key: recipe.spec for key, recipe in self._recipes.items()} | {key: written[key] for key in self._written}
        return iter(specs.items())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._files.close()
        if self._scratch is not None:
            self._scratch.close()

    def __str__(self) -> str:
        return f"the checkpoint {self.path}"

    # -- inside -------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the checkpoint {self.path} is closed; open it again")

    def _direct_offset(self, recipe: Recipe) -> int | None:
        """Return where in its file the bytes of a value lie as they are; None if it has to be computed or lies across elements."""
        if not isinstance(recipe, Stored):
            return None
        itemsize = recipe.spec.dtype.itemsize
        offset = self._located[recipe.name].offset + recipe.offset * itemsize
        return None if offset % itemsize else offset

    def _current(self, stored: Stored, key: str) -> Path:
        """Return the file of a tensor after looking whether the path still leads to the same, unchanged file."""
        path = self._located[stored.name].file
        check_identity(str(path), status_of(path, key), self._identities[path], key)
        return path

    def _open(self, path: Path) -> PinnedFile:
        try:
            return PinnedFile(str(path), self._identities[path])
        except FileNotFoundError:
            raise CorruptionError("?", str(path), "the file is missing") from None

    @contextmanager
    def _opened(self, path: Path) -> Iterator[OpenFile]:
        """Give a file for reading: the one that is kept open, or one for this time if no more can be kept."""
        file, _ = self._files.borrow(path)
        try:
            yield file
        finally:
            file.close()

    @contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        """Name the key in errors of files, which know none."""
        try:
            yield
        except CorruptionError as error:
            raise CorruptionError(key, error.file, error.reason) from None

    def _reserve(self, key: str, nbytes: int) -> None:
        with self._lock:
            if self._ledger.reserve(nbytes):
                return
            used, limit = self._ledger.used, self._ledger.budget or 0
        raise BudgetError(f"writing {key!r} beside the checkpoint", tier="disk", required_bytes=used + nbytes, budget_bytes=limit)

    def _release(self, nbytes: int) -> None:
        with self._lock:
            self._ledger.release(nbytes)

    def _from_scratch(self, key: str) -> torch.Tensor:
        scratch = self._made_scratch()
        value = scratch.get(key)
        return value if isinstance(scratch, MappedBackend) else typed_view(raw_bytes(value).clone(), TensorSpec.of(value))

    def _made_scratch(self) -> Backend:
        with self._lock:
            if self._scratch is None:
                self._scratch = self._make_scratch()
            return self._scratch

    def _make_scratch(self) -> Backend:
        if self._place is not None and not isinstance(self._place, Backend):
            return DiskBackend.scratch(self._place)
        try:
            return DiskBackend.scratch(self.path.parent)
        except BackendError as error:
            raise BackendError(
                f"a checkpoint is never written to, and nothing can be written beside it ({error}); give disk=PATH"
            ) from error


def _mapped(file: OpenFile, offset: int, nbytes: int) -> torch.Tensor:
    """Return a private map of a part of a file; an empty one is no map."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    try:
        return map_range(FileSystem(), file.fileno(), offset, nbytes)
    except OSError as error:
        raise StorageError(error.errno or errno.ENOMEM, f"{file.path} cannot be mapped: {error.strerror}") from error
