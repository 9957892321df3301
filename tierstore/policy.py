"""Eviction policies: they see events and answer with keys, never with tensors, so the same class runs in a replay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator

from tierstore.errors import TierStoreError


class Policy(ABC):
    """Orders the keys of one tier by how soon they should leave it.

    Called under the store's lock; an instance belongs to one tier.
    """

    @abstractmethod
    def insert(self, key: str, nbytes: int) -> None:
        """`key` has entered the tier."""

    @abstractmethod
    def access(self, key: str) -> None:
        """`key`, which is in the tier, has been used."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """`key` has left the tier."""

    @abstractmethod
    def victims(self) -> Iterator[str]:
        """Yield the keys in the tier, first the one to evict first; not changed while iterated over."""


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
_NAMED: dict[str, PolicyFactory] = {"auto": LRU, "lru": LRU}


def policy_factory(policy: str | PolicyFactory) -> PolicyFactory:
    """Return what makes a fresh policy per tier: `policy` itself if callable, else the one of that name."""
    if callable(policy):
        return policy
    if policy not in _NAMED:
        raise TierStoreError(f"no policy is called {policy!r}; give one of {sorted(_NAMED)} or a callable that returns a tierstore.Policy")
    return _NAMED[policy]
