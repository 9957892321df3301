"""The contract of eviction policies: they see events and answer with keys, so the same class runs in a store and in a replay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

from tierstore.planning.plan import Plan


class Policy(ABC):
    """Orders the keys of one tier by how soon they should leave it.

    Every use of a key is told exactly once, by `access` or `access_all`: in the fastest tier by whoever asked for it, in others by the tier
    above. Where the use brought the key in, `insert` comes first and `access` as soon as all that is used with it has come in;
    a prefetch is an `insert` alone.
    A policy only orders: nothing is refused admission, so what it would not have admitted is its first victim. It is not told
    the tier's size; one that needs it takes the most bytes it saw at once.

    Called under the store's lock; an instance belongs to one tier.
    """

    @abstractmethod
    def insert(self, key: str, nbytes: int) -> None:
        """`key` has entered the tier, or is on its way into it."""

    @abstractmethod
    def access(self, key: str) -> None:
        """`key`, which is in the tier, is used."""

    def access_all(self, keys: list[str]) -> None:
        """`keys`, all of them in the tier, were used in this order."""
        for key in keys:
            self.access(key)

    @abstractmethod
    def remove(self, key: str) -> None:
        """`key` has left the tier."""

    @abstractmethod
    def victims(self) -> Iterator[str]:
        """Yield the keys in the tier, first the one to evict first; not changed while iterated over."""


class Foresight(Policy):
    """A policy that also knows what will be used, so that it can be fetched before anybody waits for it."""

    @property
    @abstractmethod
    def plan(self) -> Plan | None:
        """What is kept and what streams now; None as long as nothing is known."""

    @abstractmethod
    def would_move(self, budget: int) -> int | None:
        """Return the bytes that one repetition would bring into the tier with another budget; None as long as nothing is known."""

    def foretell(self, sizes: Mapping[str, int]) -> None:
        """Nothing was used yet; these keys probably will be, in this order, each of so many bytes."""

    @abstractmethod
    def together(self, keys: Sequence[str]) -> None:
        """`keys` are about to be used at once, and must all be in the tier for that."""

    def hold(self, key: str) -> None:
        """`key`, which is in the tier, cannot leave from now on, so it need not be among what may."""

    def unhold(self, key: str) -> None:
        """`key`, which is in the tier, can leave again."""

    @abstractmethod
    def wanted(self) -> str | None:
        """Return the key to bring into the tier next, the one used soonest of those missing; None to wait."""

    @abstractmethod
    def spare(self) -> Iterator[str]:
        """Yield the keys in the tier that may leave for a wanted one, first the one to evict first."""

    @abstractmethod
    def budget(self, nbytes: int | None) -> None:
        """Take note of the tier's budget; told before anything else and on each change."""

    @abstractmethod
    def timed(self, now: Callable[[], float]) -> None:
        """Take note of the clock, in seconds, by which uses are timed; told once, before any."""

    @abstractmethod
    def waited(self, seconds: float) -> None:
        """Since the last use so many seconds went by in which nothing was computed."""


PolicyFactory = Callable[[], Policy]
