"""The contract of a backend: a place where tensor bytes live.

A backend knows nothing of budgets, models or other tiers. The store calls it from several threads, but never twice at
once for the same key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from tierstore.checksum import Proof
from tierstore.errors import ReadOnlyError
from tierstore.open_file import Readable
from tierstore.recipe import Recipe, Stored
from tierstore.spec import TensorSpec, raw_bytes


class Backend(ABC):
    """Keeps tensors by key. Values come back with equal bits, dtype, shape and stride."""

    @abstractmethod
    def put(self, key: str, tensor: torch.Tensor) -> None:
        """Store a copy of `tensor` (detached, strided, on any device), replacing an older value.

        All or nothing: when it raises, the older value is still there.
        """

    @abstractmethod
    def get(self, key: str) -> torch.Tensor:
        """Return the value of `key`; raise `KeyError` if there is none.

        The caller only reads it, and it stays valid after `put` or `delete` of the same key.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Forget `key` and release its bytes; raise `KeyError` if there is none."""

    @abstractmethod
    def entries(self) -> Iterable[tuple[str, TensorSpec]]:
        """Yield key and spec of everything stored; a store asks once, when it opens."""

    def close(self) -> None:  # noqa: B027  (an optional hook: most backends own nothing to release)
        """Release files, maps and memory. Called once, last."""


class ReadOnlyBackend(Backend):
    """A backend whose values others wrote: a store reads them, and never writes, evicts or deletes there."""

    def put(self, key: str, tensor: torch.Tensor) -> None:
        raise ReadOnlyError(f"{key!r} cannot be written: this {type(self).__name__} only reads; put a tier that takes values above it")

    def delete(self, key: str) -> None:
        raise ReadOnlyError(f"{key!r} cannot be deleted: this {type(self).__name__} only reads")


class VolatileBackend(Backend):
    """A backend whose values are lost when the process ends."""

    def trim(self) -> None:
        """Give memory that was kept for later back to the system; the store calls it when a budget shrinks."""


class ReadingBackend(Backend):
    """A backend that can read a value straight into memory which somebody else provides."""

    @abstractmethod
    def read_into(self, key: str, out: torch.Tensor) -> None:
        """Fill `out`, a contiguous uint8 CPU tensor, with the bytes that the value spans in memory, gaps included.

        `out` has exactly that size. When it raises, as `get` does, what `out` holds is undefined.
        """


class DistantBackend(ReadingBackend):
    """A backend so far away that what was fetched from it is worth writing to a tier in between, rather than fetching it again."""


class SizingBackend(Backend):
    """A backend in which a value takes another number of bytes than its tensor spans: fewer, never more."""

    @abstractmethod
    def stored_bytes(self, key: str) -> int:
        """Return what the value of `key` takes, at most its spec's `nbytes`; it changes only with `put` of that key."""


class MemoryBackend(VolatileBackend):
    """A backend whose values are live tensors on `device`: what `get` returns is the stored memory itself."""

    device: torch.device

    @abstractmethod
    def adopt(self, key: str, tensor: torch.Tensor) -> None:
        """Store `tensor` itself, without a copy; the caller gives up ownership. It must lie on `device`."""

    @abstractmethod
    def allocate(self, key: str, spec: TensorSpec, phase: int = 0) -> torch.Tensor:
        """Return uninitialised memory of `spec` on `device`, for the caller to fill and hand to `adopt` as `key`, or to forget.

        Where it can, large memory begins `phase` bytes (a multiple of the element size) after a multiple of 4096, which
        lets bytes that begin so in a file be read around the page cache.
        """


class DivisibleBackend(MemoryBackend):
    """Memory in which a value may lie in pieces, each under a key of its own, which come and go by themselves.

    Divided values make rings small: what streams need not be as large as what is computed with. `piece_bytes`: the fewest
    bytes in which it likes to take them; where there is much room a piece takes several times as many.
    """

    piece_bytes: int

    @abstractmethod
    def divides(self, nbytes: int) -> bool:
        """True if a value of `nbytes` should lie in pieces.

        These begin and end at multiples of `piece_bytes`, counted from the border from which `reserve` counts its phase; the
        first and the last one may be smaller.
        """

    @abstractmethod
    def reserve(self, nbytes: int, phase: int = 0) -> torch.Tensor:
        """Return a uint8 tensor of `nbytes` that has addresses but takes no memory; it must not be touched where nothing is.

        It begins `phase` (below 4096) bytes after a border of pages of memory: see `MemoryBackend.allocate`.
        """

    @abstractmethod
    def place(self, memory: torch.Tensor, pieces: Mapping[str, int]) -> None:
        """Let what is stored under these keys lie in `memory`, which `reserve` made, one after the other, whenever it is here.

        `pieces`: bytes of each.
        """

    @abstractmethod
    def release(self, keys: Iterable[str]) -> None:
        """Forget where the values of `keys`, none of which is here, had their places."""

    @abstractmethod
    def complete(self, memory: torch.Tensor, parts: Mapping[int, FileExtent | torch.Tensor]) -> None:
        """Put what is missing into `memory`, by the byte at which it starts, for good: no piece may go or come any more.

        Parts of files become private maps, which take no memory until they are touched; uint8 tensors are copied.
        """


class MappedBackend(Backend):
    """A backend whose `get` returns private maps of files: no memory is taken until a page is touched, and writes to a
    returned tensor never reach the stored value.
    """


@dataclass(frozen=True, slots=True)
class FileExtent:
    """The bytes of one value in a file: `nbytes` from `offset` on, in the order of memory, gaps included.

    `file`: the backend may have it open already, for whoever is allowed to `share` it. `proof`: what the bytes have to be
    checked against before anybody uses them, piece by piece. `start`: the byte of the value at which this part of it begins.
    """

    path: str
    offset: int
    nbytes: int
    file: Readable | None = None
    proof: Proof | None = None
    start: int = 0

    def part(self, start: int, nbytes: int) -> FileExtent:
        """Return a part of it; one that will be checked begins where a piece does, and is one, or several."""
        return replace(self, offset=self.offset + start, nbytes=nbytes, start=self.start + start)

    def check(self, start: int, data: memoryview) -> None:
        """Raise `CorruptionError` if `data`, which was read from `start` of this extent on, is a piece with another checksum."""
        if self.proof is not None:
            self.proof.check(self.start + start, data)

    def prove(self, file: Readable, parts: Iterable[tuple[int, int]] | None = None) -> None:
        """Read those pieces of the value from `file` that have to be checked and have not been, and check them.

        `parts`: where in this extent the bytes lie that are needed, and how many; all of the value if not given.
        """
        if self.proof is not None:
            shifted = None if parts is None else [(self.start + start, count) for start, count in parts]
            self.proof.prove(file, self.offset - self.start, shifted)


class FileBackend(MappedBackend):
    """A backend whose values lie in files as plain bytes, which a reader may fetch without it."""

    @abstractmethod
    def extent(self, key: str) -> FileExtent | None:
        """Return where the bytes of `key` lie, or None if no file has them as they are: then `get` and `fill` work, and
        `get` returns memory of its own. Raises `KeyError` or `CorruptionError` where `get` does.

        Open the file at once: it is never written again, but `put` and `delete` of the same key take its name away.
        """

    def fill(self, key: str, out: torch.Tensor) -> None:
        """Write the value of `key` to `out`, CPU memory of the same spec that nobody else has yet."""
        raw_bytes(out).copy_(raw_bytes(self.get(key)))


class SourceBackend(FileBackend):
    """A backend over tensors that exist already, such as a checkpoint's. They are never written to: what is put goes elsewhere.

    Values are what `bind` says; before, each tensor is a value under its own name.
    """

    @abstractmethod
    def tensors(self) -> Mapping[str, Stored]:
        """Return the recipe of each tensor as it is, by its name there."""

    @abstractmethod
    def bind(self, recipes: Mapping[str, Recipe]) -> None:
        """Present exactly these values, each computed from the tensors when it is asked for. Call it before a store opens."""

    @abstractmethod
    def compute(self, recipe: Recipe) -> torch.Tensor:
        """Return the value of `recipe` in memory of its own."""

    @abstractmethod
    def keep(self, key: str) -> torch.Tensor:
        """Return the value of `key` for somebody to keep: a private map, also where it has to be computed and written first."""
