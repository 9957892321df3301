"""The session's side of sources: puts values into the store, leases them, copies them out, and sweeps up after finalisers."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

import torch

from tierstore.backend import DivisibleBackend
from tierstore.devices import allocated_bytes, release_cached
from tierstore.entry import Entry
from tierstore.errors import BudgetError
from tierstore.patch.maps import mapped
from tierstore.patch.pressure import Pressure
from tierstore.patch.regions import StoredValue
from tierstore.patch.source import Host, Source
from tierstore.patch.stored import DividedSource, EntrySource, StoredSource, Whole
from tierstore.pieces import piece_bytes
from tierstore.spec import TensorSpec, raw_bytes, storable, typed_view
from tierstore.store import TieredStore
from tierstore.writing import Moves


class StoreHost(Host):
    """A `Host` over one store, computing on `device`.

    `headroom` is the largest number of bytes that one operation has needed or may need at once, `total` that of all values.
    """

    def __init__(self, store: TieredStore, device: torch.device) -> None:
        self.store = store
        self.device = device
        self.headroom = 0
        self.total = 0
        self.pressure = Pressure(store.moves, allocated_bytes(device), partial(release_cached, device), self._needed)
        self._sources: weakref.WeakSet[StoredSource] = weakref.WeakSet()
        self._unused_keys: deque[str] = deque()
        self._unreleased: deque[tuple[list[Entry], int]] = deque()

    @property
    def moves(self) -> Moves:
        return self.store.moves

    def _needed(self) -> int:
        """Bytes of the fast tier without which some operation could not run beside the fetch for the next one."""
        return 2 * self.headroom

    @abstractmethod
    def give_way(self) -> bool:
        """Let tensors that were kept plain be evicted too; False if there are none."""

    def adopt(self, name: str, tensor: torch.Tensor, fastest: int = 0) -> StoredSource:
        self._sweep()
        spec = TensorSpec.of(tensor)
        backend = self.moves.tiers[0].backend
        with self.moves.lock:
            key = self._free_key(name)
        with torch.inference_mode(False), torch.no_grad():
            if not fastest and isinstance(backend, DivisibleBackend) and backend.divides(spec.nbytes):
                source: StoredSource = self._adopt_pieces(key, tensor, spec, backend)
            else:
                self._fill(key, tensor, fastest)
                source = EntrySource(self, self.moves.entry(key))
        self._sources.add(source)
        return source

    def _adopt_pieces(self, name: str, tensor: torch.Tensor, spec: TensorSpec, backend: DivisibleBackend) -> DividedSource:
        """Put a value into the store in pieces, which come and go by themselves and lie side by side where all are resident."""
        memory, raw = backend.reserve(spec.nbytes), raw_bytes(storable(tensor))
        size = piece_bytes(backend, self.moves.tiers[0].ledger.budget, self.total)
        starts = range(0, spec.nbytes, size)
        parts = {f"{name}[{number}]": raw[start : start + size] for number, start in enumerate(starts)}
        backend.place(memory, {key: part.nbytes for key, part in parts.items()})
        whole = Whole(memory, spec)
        for key, part in parts.items():
            self._fill(key, part)
        return self._divided(name, spec, parts, whole)

    def _divided(self, name: str, spec: TensorSpec, keys: Iterable[str], whole: Whole) -> DividedSource:
        with self.moves.lock:
            entries = tuple(self.moves.entry(key) for key in keys)
            for entry in entries:
                entry.guard = whole
        return DividedSource(self, spec, name, entries, whole)

    def stand_for(self, name: str, value: StoredValue) -> StoredSource:
        """Return a source for what the store has from its beginning."""
        if value.memory is None:
            source: StoredSource = EntrySource(self, self.moves.entries[value.keys[0]])
        else:
            source = self._divided(name, value.spec, value.keys, Whole(value.memory, value.spec))
        self._sources.add(source)
        return source

    def _fill(self, key: str, tensor: torch.Tensor, fastest: int = 0) -> None:
        with suppress(torch.OutOfMemoryError):
            self.store.fill(key, tensor, fastest)
            return
        self.make_way(tensor.nbytes, [])
        self.store.fill(key, tensor, fastest)

    def _free_key(self, name: str) -> str:
        """Return a key that is not taken yet, made of `name`."""
        key, number = name, 1
        while self._taken(key):
            number += 1
            key = f"{name}#{number}"
        return key

    def _taken(self, key: str) -> bool:
        return key in self.moves.entries or f"{key}[0]" in self.moves.entries

    def lease(self, entries: list[Entry], operation: object) -> bool:
        with suppress(torch.OutOfMemoryError):
            return self._lease_or_give_way(entries, operation)
        self.make_way(sum(entry.nbytes for entry in entries), entries)
        return self._lease_or_give_way(entries, operation)

    def make_way(self, nbytes: int, entries: list[Entry]) -> None:
        self.pressure.relieve(nbytes, entries)

    def _lease_or_give_way(self, entries: list[Entry], operation: object) -> bool:
        try:
            self._lease(entries, operation)
        except BudgetError:
            if not self.give_way():
                raise
            self._lease(entries, operation)
            return True
        return False

    def _lease(self, entries: list[Entry], operation: object) -> None:
        moves = self.moves
        with moves.lock:
            if len(entries) == 1 and moves.lease_resident(entries, 0):
                moves.pump()  # not when the lease ends: who ends it still refers to what has to leave
            else:
                moves.acquire(entries, operation)

    def copy_out(self, source: Source) -> torch.Tensor:
        if self.device.type == "cpu" and isinstance(source, StoredSource) and source.settled is None:
            shown = mapped(source)  # takes no memory, so that a whole state dict can be saved
            if shown is not None:
                return shown
        entries = list(source.entries())
        self.lease(entries, "reading")
        try:
            plain = source.read()
            with torch.inference_mode(False), torch.no_grad():
                return typed_view(raw_bytes(plain).clone(), TensorSpec.of(plain))
        finally:
            with self.moves.lock:
                self.moves.release(entries)

    def forget(self, keys: list[str]) -> None:
        self._unused_keys.extend(keys)

    def release_later(self, entries: list[Entry], owner: int) -> None:
        self._unreleased.append((entries, owner))

    def worked_on(self, nbytes: int) -> None:
        self.pressure.tick()
        if nbytes > self.headroom:
            self.headroom = nbytes
        if self._unused_keys or self._unreleased:
            self._sweep()

    def _sweep(self) -> None:
        """Do what finalisers asked for; they may not take the lock themselves."""
        while self._unreleased:
            entries, owner = self._unreleased.popleft()
            with self.moves.lock:
                self.moves.release(entries, owner)
        backend = self.moves.tiers[0].backend
        for _ in range(len(self._unused_keys)):
            key = self._unused_keys.popleft()
            if not self.moves.closed and key in self.store:
                del self.store[key]
            if isinstance(backend, DivisibleBackend):
                backend.release([key])
