"""Which huge pages have memory behind them and are free to move; knows nothing of memory itself."""

from __future__ import annotations

from itertools import islice
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
        warm = self._warm
        targets = [address for address in range(start, stop, self.size) if warm.pop(address, self) is self]
        return self._joined([(source, target) for source, target in zip(islice(warm, len(targets)), targets, strict=False)])

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
        return self._joined([(address, address) for address in sorted(islice(self._warm, count))])

    def _joined(self, pairs: list[tuple[int, int]]) -> list[Move]:
        """Make warm units, each to go from one address to another, cold; join those of neighbours to neighbours that have one owner."""
        moves: list[Move] = []
        first, count, owner = (0, 0), 0, None
        for pair in pairs:
            mine = self._warm.pop(pair[0])
            ahead = count * self.size
            if mine is not owner or pair != (first[0] + ahead, first[1] + ahead):
                if count:
                    moves.append(Move(*first, ahead, owner))
                first, count, owner = pair, 0, mine
            count += 1
        if count:
            moves.append(Move(*first, count * self.size, owner))
        return moves
