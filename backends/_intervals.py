"""Which ranges of an address space are live, and which of the free ones are warm; knows nothing of memory itself."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple


class Piece(NamedTuple):
    """A free range: warm if the system has put memory behind it, cold if it is only addresses."""

    start: int
    stop: int
    warm: bool

    @property
    def size(self) -> int:
        return self.stop - self.start


class Intervals:
    """Hands out ranges of the address space that `add` gave it; neighbours of one temperature are always one piece.

    `live` and `warm` are the bytes handed out and the free warm ones, `peak` the most that were ever live at once, which is
    what `cool` leaves backed. `grain` is the system's unit of memory: cooling ends on its borders where it can. Not locked.
    """

    def __init__(self, grain: int = 1) -> None:
        self.live = 0
        self.warm = 0
        self.peak = 0
        self._grain = grain
        self._free: list[Piece] = []  # by address
        self._taken: dict[int, int] = {}  # start -> stop

    @property
    def free(self) -> tuple[Piece, ...]:
        """All free pieces, by address."""
        return tuple(self._free)

    def add(self, start: int, stop: int) -> None:
        """Make a cold range of new addresses available."""
        self._insert(start, stop, warm=False)

    def remove(self, start: int, stop: int) -> bool:
        """Forget a range that was added; False, and nothing is done, while a part of it is live."""
        covered = self._overlapping(start, stop)
        if sum(piece.size for piece in covered) < stop - start:
            return False
        self._cut(start, stop)
        return True

    def take(self, nbytes: int) -> int | None:
        """Return the start of `nbytes` (not 0) that are live from now on, or None if no free range is long enough.

        The range with the fewest cold bytes is taken; among equal ones the tightest, then the lowest.
        """
        start = self._best(nbytes)
        if start is None:
            return None
        self._cut(start, start + nbytes)
        self._taken[start] = start + nbytes
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        return start

    def give(self, start: int, *, warm: bool = True) -> None:
        """Take back the live range that begins at `start`; it is warm from now on, since its owner may have written to it.

        Not `warm`: its owner has given the memory behind it back to the system.
        """
        stop = self._taken.pop(start)
        self.live -= stop - start
        self._insert(start, stop, warm=warm)

    def cool(self) -> list[tuple[int, int]]:
        """Make warm pieces cold until live and warm bytes are at most `peak`; return the ranges to give back to the system.

        The smallest pieces go first, since they serve the fewest requests.
        """
        ranges = []
        while (excess := self.live + self.warm - self.peak) > 0 and self.warm:
            piece = min((piece for piece in self._free if piece.warm), key=lambda piece: (piece.size, piece.start))
            start = max(piece.start, (piece.stop - excess) // self._grain * self._grain)
            self._cut(start, piece.stop)
            cold = self._insert(start, piece.stop, warm=False)
            ranges.append(self._whole_grains(start, piece.stop, cold))
        return ranges

    def _whole_grains(self, start: int, stop: int, cold: Piece) -> tuple[int, int]:
        """Extend a range to the grain's borders within the cold piece around it.

        The system backs a whole grain when any byte of it is touched, so cold neighbours in the same grain may have memory.
        """
        low, high = start // self._grain * self._grain, -(-stop // self._grain) * self._grain
        return max(low, cold.start), min(high, cold.stop)

    def _best(self, nbytes: int) -> int | None:
        fitting = min(((piece.size, piece.start) for piece in self._free if piece.warm and piece.size >= nbytes), default=None)
        if fitting is not None:  # the usual case, and what the search below would find
            return fitting[1]
        best = min((window for run in self._runs() for window in _windows(run, nbytes)), default=None)
        return None if best is None else best[2]

    def _runs(self) -> Iterator[list[Piece]]:
        """Yield the pieces in groups without a gap, whatever their temperature."""
        run: list[Piece] = []
        for piece in self._free:
            if run and run[-1].stop != piece.start:
                yield run
                run = []
            run.append(piece)
        if run:
            yield run

    def _overlapping(self, start: int, stop: int) -> list[Piece]:
        """Return what is free of a range, as pieces clipped to it."""
        first, last = self._indices(start, stop)
        return [Piece(max(start, piece.start), min(stop, piece.stop), piece.warm) for piece in self._free[first:last]]

    def _indices(self, start: int, stop: int) -> tuple[int, int]:
        first = bisect_right(self._free, start, key=lambda piece: piece.stop)
        return first, bisect_left(self._free, stop, key=lambda piece: piece.start)

    def _cut(self, start: int, stop: int) -> None:
        """Take a range, all of which is free, out of the free pieces."""
        first, last = self._indices(start, stop)
        self.warm -= _warm_bytes(self._overlapping(start, stop))
        head, tail = self._free[first], self._free[last - 1]
        rest = (Piece(head.start, start, head.warm), Piece(stop, tail.stop, tail.warm))
        self._free[first:last] = [piece for piece in rest if piece.size]

    def _insert(self, start: int, stop: int, *, warm: bool) -> Piece:
        """Add a free range; return the piece that it is now part of."""
        self.warm += (stop - start) * warm
        first = last = bisect_left(self._free, start, key=lambda piece: piece.start)
        if first and self._free[first - 1][1:] == (start, warm):
            first -= 1
            start = self._free[first].start
        if last < len(self._free) and (self._free[last].start, self._free[last].warm) == (stop, warm):
            stop = self._free[last].stop
            last += 1
        piece = Piece(start, stop, warm)
        self._free[first:last] = [piece]
        return piece


def _warm_bytes(pieces: Iterable[Piece]) -> int:
    return sum(piece.size for piece in pieces if piece.warm)


def _windows(run: list[Piece], nbytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield (cold bytes, room around it, start) of the places in a run worth looking at.

    The fewest cold bytes are always found where one end of the window is an end of a piece.
    """
    low, high = run[0].start, run[-1].stop
    if high - low < nbytes:
        return
    warm_before = list(accumulate((piece.size * piece.warm for piece in run), initial=0))

    def warm_below(address: int) -> int:
        index = bisect_right(run, address, key=lambda piece: piece.start) - 1
        return warm_before[index] + (address - run[index].start) * run[index].warm

    for piece in run:
        room = piece.size if piece.size >= nbytes else high - low
        for start in (piece.start, piece.stop - nbytes):
            if low <= start <= high - nbytes:
                yield nbytes - warm_below(start + nbytes) + warm_below(start), room, start
