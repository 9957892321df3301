"""Leases: values that are resident and not evictable for a while."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import overload

import torch

from tierstore.entry import Entry
from tierstore.errors import TierStoreError
from tierstore.leasing import Leasing


class LeasedTensors(tuple[torch.Tensor, ...]):
    """The leased values in the order asked for; also indexed by key."""

    _keys: tuple[str, ...]

    @classmethod
    def of(cls, keys: Sequence[str], tensors: Sequence[torch.Tensor]) -> LeasedTensors:
        leased = cls(tensors)
        leased._keys = tuple(keys)
        return leased

    @overload  # type: ignore[override]
    def __getitem__(self, index: int | str) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[torch.Tensor, ...]: ...
    def __getitem__(self, index: int | str | slice) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return super().__getitem__(self._keys.index(index) if isinstance(index, str) else index)

    def keys(self) -> tuple[str, ...]:
        return self._keys

    def values(self) -> tuple[torch.Tensor, ...]:
        return tuple(self)

    def items(self) -> list[tuple[str, torch.Tensor]]:
        return list(zip(self._keys, self, strict=True))


class Lease:
    """Context manager that holds a lease on `keys`; made by `TieredStore.lease`. Good for one use at a time."""

    def __init__(self, moves: Leasing, keys: Sequence[str]) -> None:
        self._moves = moves
        self._keys = keys
        self._entries: list[Entry] | None = None
        self._owner = 0

    def __enter__(self) -> LeasedTensors:
        if self._entries is not None:
            raise TierStoreError("this lease is already held; ask the store for another one")
        moves = self._moves
        with moves.lock:
            entries = list(dict.fromkeys(moves.entry(key) for key in self._keys))
            moves.acquire(entries, "a lease")
            self._entries, self._owner = entries, threading.get_ident()
        try:
            return LeasedTensors.of(self._keys, [self._value(key) for key in self._keys])
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _value(self, key: str) -> torch.Tensor:
        tensor = self._moves.entries[key].tensor
        return self._moves.tiers[0].backend.get(key) if tensor is None else tensor

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        entries, self._entries = self._entries, None
        if entries is not None:
            with self._moves.lock:
                self._moves.release(entries, self._owner)
