"""Which huge pages have memory behind them and are free to move; knows nothing of memory itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple


class Move(NamedTuple):
    """Memory that goes from one address to another, `nbytes` from `source` on; `owner` must live until it has gone."""

    source: int
    target: int
    nbytes: int
    owner: object


class Units:
    """Counts units of `size` bytes: live ones, in use, and warm ones, which nobody uses but which still have memory.

    `take` says from where memory has to be moved, so that a range has some before it is used. Not locked.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.live = 0  # bytes
        self._warm: dict[int, object] = {}  # owners by address, first the units that have been free longest

    @property
    def warm(self) -> int:
        """Bytes that are free and have memory."""
        return len(self._warm) * self.size

    def take(self, start: int, stop: int) -> list[Move]:
        """Make a range of addresses live, both multiples of `size`; return what to move into it.

        Addresses that no move leads to have memory already, or get it when they are touched.
        """
        self.live += stop - start
        addresses = range(start, stop, self.size)
        targets = [address for address in addresses if address not in self._warm]
        self.forget(start, stop)
        free = list(self._warm)[: len(targets)]
        return list(_joined(Move(source, target, self.size, self._warm.pop(source)) for source, target in zip(free, targets, strict=False)))

    def give(self, start: int, stop: int, owner: object) -> None:
        """Take back a live range, all of which has memory; its addresses stay the system's as long as `owner` lives."""
        self.live -= stop - start
        self._warm.update(dict.fromkeys(range(start, stop, self.size), owner))

    def forget(self, start: int, stop: int) -> None:
        """Count a range, none of which is live, as cold."""
        for address in range(start, stop, self.size):
            self._warm.pop(address, None)

    def cool(self, excess: int) -> list[Move]:
        """Make at least `excess` warm bytes cold, as far as there are any; return what to give back, as moves to itself."""
        count = min(len(self._warm), max(0, -(-excess // self.size)))
        addresses = sorted(list(self._warm)[:count])
        return list(_joined(Move(address, address, self.size, self._warm.pop(address)) for address in addresses))


def _joined(moves: Iterable[Move]) -> Iterator[Move]:
    """Join moves of neighbours to neighbours that have one owner."""
    for _, run in groupby(enumerate(moves), key=_run_of):
        members = [move for _, move in run]
        yield members[0]._replace(nbytes=sum(move.nbytes for move in members))


def _run_of(numbered: tuple[int, Move]) -> tuple[int, int, int]:
    number, move = numbered
    return move.source - number * move.nbytes, move.target - number * move.nbytes, id(move.owner)
