"""What a TieredTensor stands for: an entry of a store, or a copy of another one that is made only when it is read."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tierstore.entry import Entry
from tierstore.shield import shielded
from tierstore.spec import TensorSpec, typed_view
from tierstore.store import TieredStore


class Source(ABC):
    """Bytes behind one or more TieredTensors, which are views of it.

    `settled` is set once, when the session ends: from then on the source is that plain tensor, and no store is asked.
    `spec` describes what `read` returns.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.settled: torch.Tensor | None = None
        self._copies: weakref.WeakSet[CopySource] | None = None  # made when needed: most sources have none
        self._saved: tuple[weakref.ref[torch.UntypedStorage], int] | None = None  # and the version that it is a copy of
        self.image: Callable[[], Any] | None = None  # what `saving` made for whoever saves this; a weak reference

    @abstractmethod
    def entries(self) -> Iterable[Entry]:
        """The entries that must be leased before `read`; none once settled."""

    @abstractmethod
    def read(self) -> torch.Tensor:
        """Return the plain tensor; the caller holds leases on `entries`."""

    @property
    @abstractmethod
    def host(self) -> Host:
        """The session's side of this source."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What to call it in messages."""

    def chain(self) -> Iterable[Source]:
        """This source and the one that holds its bytes, if that is another."""
        return (self,)

    def copied_lazily(self, copy: CopySource) -> None:
        if self._copies is None:
            self._copies = weakref.WeakSet()
        self._copies.add(copy)

    @abstractmethod
    def version(self) -> int:
        """Return a number that grows when the bytes are written to."""

    @property
    def has_pending_copies(self) -> bool:
        return self._copies is not None and len(self._copies) > 0

    def forget_snapshot(self) -> None:
        self._saved = None

    def before_write(self) -> None:
        """Give pending lazy copies their own bytes: they must not see what is about to be written."""
        self.forget_snapshot()
        for copy in list(self._copies or ()):
            copy.materialise()

    def settle_copies(self) -> None:
        """Give pending lazy copies plain memory of their own, for good."""
        for copy in list(self._copies or ()):
            copy.settle()

    @abstractmethod
    def after_write(self) -> None:
        """Record that the resident bytes were changed in place; the caller still holds the lease."""

    def snapshot(self) -> torch.Tensor:
        """Return the value as a plain tensor in memory of its own; asked twice, the same memory while that is alive.

        Pickling tied tensors needs this, so that they stay tied.
        """
        if self.settled is not None:
            return self.settled
        version = self.version()
        storage = self._saved[0]() if self._saved is not None and self._saved[1] == version else None
        if storage is None:
            plain = self.host.copy_out(self)
            self._saved = weakref.ref(plain.untyped_storage()), version
            return plain
        return torch.empty(0, dtype=self.spec.dtype, device=storage.device).set_(storage, 0, self.spec.shape, self.spec.stride)


class Host(ABC):
    """What sources and TieredTensors need of the session that made them."""

    store: TieredStore

    @abstractmethod
    def adopt(self, name: str, tensor: torch.Tensor, fastest: int = 0) -> Source:
        """Put a plain tensor into the store, not above the tier at level `fastest`, and return what stands for it."""

    @abstractmethod
    def lease(self, entries: list[Entry], operation: object) -> bool:
        """Make all entries resident and lease them; `BudgetError` if they cannot fit.

        True if tensors that were held plain had to become TieredTensors to make room.
        """

    @abstractmethod
    def make_way(self, nbytes: int, entries: list[Entry]) -> None:
        """An operation on `entries` found no memory on the device: let `nbytes` of others leave, and leave that room free."""

    @abstractmethod
    def copy_out(self, source: Source) -> torch.Tensor:
        """Return the value of `source` as a plain tensor that the store does not own."""

    @abstractmethod
    def forget(self, keys: list[str]) -> None:
        """No source stands for the entries of `keys` any more. May be called from a finaliser, with any lock held."""

    @abstractmethod
    def release_later(self, entries: list[Entry], owner: int) -> None:
        """Give back leases that thread `owner` took. May be called from a finaliser, with any lock held."""

    @abstractmethod
    def worked_on(self, nbytes: int) -> None:
        """One operation needed `nbytes` at once."""


class CopySource(Source):
    """The result of `aten._to_copy` (a cast or another memory format), computed at each read, holding no memory between.

    Autocast and checkpointing save such copies for backward; plain they would hold a second copy of the weights. Once the
    original is about to change, or the copy itself, it turns into an entry of its own.
    """

    def __init__(self, spec: TensorSpec, original: Source, make: Callable[[torch.Tensor], torch.Tensor], name: str) -> None:
        """`make` returns the copy of what `original.read` does."""
        super().__init__(spec)
        self._original: Source | None = original
        self._make = make
        self._own: Source | None = None
        self._name = name
        self._host = original.host
        original.copied_lazily(self)

    @property
    def host(self) -> Host:
        return self._host

    @property
    def name(self) -> str:
        return self._name

    def made_from(self, read: Callable[[Source], torch.Tensor]) -> torch.Tensor:
        """Return the copy, made from what `read` returns of the source that has its bytes."""
        behind = read(self._behind())
        return behind if self._own is not None else self._make(behind)

    def _behind(self) -> Source:
        behind = self._own or self._original
        assert behind is not None
        return behind

    def entries(self) -> Iterable[Entry]:
        return () if self.settled is not None else self._behind().entries()

    def read(self) -> torch.Tensor:
        if self.settled is not None:
            return self.settled
        return self._own.read() if self._own is not None else self._make(self._behind().read())

    def chain(self) -> Iterable[Source]:
        return (self, self._behind())

    def version(self) -> int:
        return self._behind().version()

    def materialise(self) -> None:
        """Compute the copy and give it an entry of its own."""
        if self._own is None and self.settled is None:
            self._own = self._host.adopt(self._name, self._host.copy_out(self))
            self._original = None
            self._make = _unreachable

    def settle(self) -> None:
        """Compute the copy into plain memory, for good."""
        if self._own is None and self.settled is None:
            self.settled = self._host.copy_out(self)
            self._original = None
            self._make = _unreachable

    def before_write(self) -> None:
        super().before_write()
        self.materialise()

    def after_write(self) -> None:
        if self._own is not None:
            self._own.after_write()


class SettledSource(Source):
    """A plain tensor in the place of a source; what compilers trace with."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(TensorSpec.of(tensor))
        self.settled = tensor

    @property
    def host(self) -> Host:
        raise AssertionError("a settled source belongs to no session")

    @property
    def name(self) -> str:
        return "a plain tensor"

    def entries(self) -> Iterable[Entry]:
        return ()

    def read(self) -> torch.Tensor:
        assert self.settled is not None
        return self.settled

    def version(self) -> int:
        return 0

    def after_write(self) -> None:
        pass


def _unreachable(base: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a materialised copy is not computed again")


def typed_part(base: torch.Tensor, spec: TensorSpec, offset: int) -> torch.Tensor:
    """Return the part of `base`'s memory that starts `offset` elements of `spec` after `base` does."""
    with shielded():  # a mode that makes fake tensors must not meet the storage of a real one
        raw = torch.empty(0, dtype=torch.uint8, device=base.device).set_(
            base.untyped_storage(), base.storage_offset() * base.dtype.itemsize, (0,), (1,)
        )
        return typed_view(raw, spec, offset)
