"""Sources that are entries of a store: one for a value, or one for each piece of a divided value."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Iterable
from operator import gt

import torch

from tierstore.entry import Entry
from tierstore.patch.references import references
from tierstore.patch.source import CopySource, Host, Source
from tierstore.spec import TensorSpec, typed_view


class StoredSource(Source):
    """What entries of a store hold: `stored` is one of them, or the pieces of a divided value in their order."""

    def __init__(self, host: Host, spec: TensorSpec, name: str, stored: tuple[Entry, ...]) -> None:
        super().__init__(spec)
        self._host = host
        self._name = name
        self.stored = stored
        weakref.finalize(self, _forget, weakref.ref(host), [entry.key for entry in stored]).atexit = False

    @property
    def host(self) -> Host:
        return self._host

    @property
    def name(self) -> str:
        return self._name

    @property
    def keys(self) -> list[str]:
        return [entry.key for entry in self.stored]

    def entries(self) -> Iterable[Entry]:
        return () if self.settled is not None else self.stored

    @property
    @abstractmethod
    def tensors(self) -> int:
        """How many tensors of the store refer to the memory of the resident value."""

    @property
    def resident(self) -> bool:
        """True if all of it is in the fast tier, as far as one can tell without the store's lock."""
        return all(entry.resident for entry in self.stored)

    def copied_lazily(self, copy: CopySource) -> None:
        """Remember a copy that waits, unless somebody has the plain tensor: whose writes would come without a warning."""
        super().copied_lazily(copy)
        moves = self._host.store.moves
        with moves.lock:
            apart = all(not entry.leases and moves.withdraw(entry) for entry in self.stored)
        if not apart:
            copy.materialise()

    def version(self) -> int:
        if self.settled is None:
            moves = self._host.store.moves
            with moves.lock:
                for entry in self.stored:
                    moves.refresh(entry)
        return sum(entry.version for entry in self.stored)

    def after_write(self) -> None:
        if self.settled is None:
            moves = self._host.store.moves
            with moves.lock:
                for entry in self.stored:
                    moves.outdate(entry)


class EntrySource(StoredSource):
    """One entry of a store."""

    def __init__(self, host: Host, entry: Entry) -> None:
        super().__init__(host, entry.spec, entry.key, (entry,))
        self._entry = entry

    @property
    def tensors(self) -> int:
        return 1

    def read(self) -> torch.Tensor:
        tensor = self.settled if self.settled is not None else self._entry.tensor
        assert tensor is not None, self._name
        return tensor


class DividedSource(StoredSource):
    """A value in pieces, each an entry of its own; where all of them are resident they lie side by side in `whole`."""

    def __init__(self, host: Host, spec: TensorSpec, name: str, pieces: tuple[Entry, ...], whole: Whole) -> None:
        super().__init__(host, spec, name, pieces)
        self.whole = whole

    @property
    def tensors(self) -> int:
        return 2  # the whole, and the one that keeps its addresses

    def read(self) -> torch.Tensor:
        return self.whole.tensor if self.settled is None else self.settled


class Whole:
    """The tensor over all pieces of a value, of which it is the `Guard`; made while nobody else has a tensor over `memory`.

    It keeps `memory`, whoever else does: a reference that was counted here and went later would hide one of somebody else.
    """

    def __init__(self, memory: torch.Tensor, spec: TensorSpec) -> None:
        with torch.inference_mode(False):
            self.tensor = typed_view(memory, spec)
        self._memory = memory
        self._alone = self.references()

    def used(self) -> bool:
        return any(map(gt, self.references(), self._alone))

    def writes(self) -> int:
        return self.tensor._version

    def references(self) -> tuple[int, ...]:
        return references(self.tensor)


def _forget(host: weakref.ref[Host], keys: list[str]) -> None:
    """Tell the session, unless that went with its last source; a strong reference would keep it, and the model, for good."""
    session = host()
    if session is not None:
        session.forget(keys)
