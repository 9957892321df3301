"""Policies that only know the order of events: LRU, FIFO, MRU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from tierstore.planning.policy import Policy


class LRU(Policy):
    """Evicts the key whose last use is longest ago.

    Good where what was used lately is used again soon; on a cycle longer than the tier it never hits.
    """

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


class FIFO(Policy):
    """Evicts the key that came in first, whatever was used since; a new value does not make a key younger."""

    def __init__(self) -> None:
        self._order: dict[str, None] = {}

    def insert(self, key: str, nbytes: int) -> None:
        self._order[key] = None

    def access(self, key: str) -> None:
        """Uses change nothing."""

    def remove(self, key: str) -> None:
        del self._order[key]

    def victims(self) -> Iterator[str]:
        return iter(self._order)


class MRU(Policy):
    """Evicts the key that was used last: the optimum on a pure cycle (Chou and DeWitt 1985), bad on nearly all else.

    A key that came in but has not been used yet was fetched ahead and leaves last.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def insert(self, key: str, nbytes: int) -> None:
        self._order[key] = None
        self._order.move_to_end(key, last=False)

    def access(self, key: str) -> None:
        self._order.move_to_end(key)

    def remove(self, key: str) -> None:
        del self._order[key]

    def victims(self) -> Iterator[str]:
        return reversed(self._order)
