"""Eviction policies: they see events and answer with keys, never with tensors, so the same class runs in a replay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator


class Policy(ABC):
    """Orders the keys of one tier by how soon they should leave it.

    Called under the store's lock; an instance belongs to one tier.
    """

    @abstractmethod
    def insert(self, key: str, nbytes: int) -> None:
        """`key` has entered the tier, or is on its way into it."""

    @abstractmethod
    def access(self, key: str) -> None:
        """`key`, which is in the tier, is used: in the fastest tier by whoever asked for it, in others by the tier above.

        Each use is told once; one that brought the key in, right after `insert`.
        """

    @abstractmethod
    def remove(self, key: str) -> None:
        """`key` has left the tier."""

    @abstractmethod
    def victims(self) -> Iterator[str]:
        """Yield the keys in the tier, first the one to evict first; not changed while iterated over."""


class Foresight(Policy):
    """A policy that also knows what will be used, so that it can be fetched before anybody waits for it."""

    @abstractmethod
    def wanted(self) -> str | None:
        """Return the key to bring into the tier next, the one used soonest of those missing; None to wait."""

    @abstractmethod
    def spare(self) -> Iterator[str]:
        """Yield the keys in the tier that may leave for a wanted one, first the one to evict first."""

    @abstractmethod
    def budget(self, nbytes: int | None) -> None:
        """Take note of the tier's budget; told before anything else and on each change."""


class LRU(Policy):
    """Evicts the key whose last use is longest ago."""

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def insert(self, key: str, nbytes: int) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def access(self, key: str) -> None:
        self._order.move_to_end(key)

    def remove(self, key: str) -> None:
        del self._order[key]

    def victims(self) -> Iterator[str]:
        return iter(self._order)


PolicyFactory = Callable[[], Policy]
