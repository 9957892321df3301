"""The contract of eviction policies: they see events and answer with keys, so the same class runs in a store and in a replay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator


class Policy(ABC):
    """Orders the keys of one tier by how soon they should leave it.

    Every use of a key is told exactly once, by `access`. Where the use brought the key in, `insert` comes first and `access`
    right after it; a prefetch is an `insert` alone. A policy only orders: nothing is refused admission, so what it would not
    have admitted is its first victim. It is not told the tier's size; one that needs it takes the most bytes it saw at once.

    Called under the store's lock; an instance belongs to one tier.
    """

    @abstractmethod
    def insert(self, key: str, nbytes: int) -> None:
        """`key` has entered the tier, or got a new value there."""

    @abstractmethod
    def access(self, key: str) -> None:
        """`key`, which is in the tier, has been used."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """`key` has left the tier."""

    @abstractmethod
    def victims(self) -> Iterator[str]:
        """Yield the keys in the tier, first the one to evict first; no event comes while it is iterated over."""


PolicyFactory = Callable[[], Policy]
