"""The contract of a backend: a place where tensor bytes live.

A backend knows nothing of budgets, models or other tiers. The store calls it from several threads, but never twice at
once for the same key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tierstore.checksum import Proof
from tierstore.open_file import Readable
from tierstore.spec import TensorSpec


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


class MemoryBackend(Backend):
    """A backend whose values are live tensors on `device`: what `get` returns is the stored memory itself."""

    device: torch.device

    @abstractmethod
    def adopt(self, key: str, tensor: torch.Tensor) -> None:
        """Store `tensor` itself, without a copy; the caller gives up ownership. It must lie on `device`."""

    @abstractmethod
    def allocate(self, spec: TensorSpec) -> torch.Tensor:
        """Return uninitialised memory of `spec` on `device`, for the caller to fill and hand to `adopt`, or to forget."""

    def trim(self) -> None:
        """Give memory that was kept for later back to the system; the store calls it when a budget shrinks."""


class MappedBackend(Backend):
    """A backend whose `get` returns private maps of files: no memory is taken until a page is touched, and writes to a
    returned tensor never reach the stored value.
    """


@dataclass(frozen=True, slots=True)
class FileExtent:
    """The bytes of one value in a file: `nbytes` from `offset` on, in the order of memory, gaps included.

    `file`: the backend may have it open already, for whoever is allowed to `share` it. `proof`: what the bytes have to be
    checked against before anybody uses them, piece by piece, and told that they have passed.
    """

    path: str
    offset: int
    nbytes: int
    file: Readable | None = None
    proof: Proof | None = None


class FileBackend(MappedBackend):
    """A backend whose values lie in files as plain bytes, which a reader may fetch without it."""

    @abstractmethod
    def extent(self, key: str) -> FileExtent:
        """Return where the bytes of `key` lie; raise `KeyError` or `CorruptionError` where `get` does.

        Open the file at once: it is never written again, but `put` and `delete` of the same key take its name away.
        """
