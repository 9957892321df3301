"""What a policy could reach that knew the future: Belady's MIN, and bytes that nothing can go below.

[Note: why the bound holds]
To save bytes of a use at time j, a policy must hold them since the use before, at time i: through every gap between two uses
from i to j. In each gap it holds at most the capacity. Choosing bytes of such intervals, as many as possible with no gap
overfull, is an upper bound on what any policy saves: a policy may have to hold more (the whole entry while it is used, or no
part of an entry), never less. Whole or divided entries, with or without fetching ahead, are all covered.
This is the relaxation of Berger, Beckmann and Harchol-Balter (Practical Bounds on Optimal Caching with Variable Object Sizes,
2018). They count hits and need a flow solver, or PFOO-L, which only limits the sum over all gaps. Counted in bytes, each byte
is worth the same, and a greedy is exact: take intervals as they start, and where a gap is overfull give up the bytes whose
interval ends last. That is Belady's rule at the grain of a byte, so the bound is also tight for entries divided finely.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from heapq import heappop, heappush

from tierstore.planning.policy import Policy


class Future:
    """Where in a trace each key is used."""

    def __init__(self, trace: Sequence[str]) -> None:
        self.never = len(trace)
        self._uses: dict[str, list[int]] = {}
        for time, key in enumerate(trace):
            self._uses.setdefault(key, []).append(time)

    def next_use(self, key: str, time: int) -> int:
        """Return when `key` is first used at `time` or later; `never` if it is not."""
        uses = self._uses.get(key, [])
        place = bisect_left(uses, time)
        return uses[place] if place < len(uses) else self.never


class Belady(Policy):
    """Evicts the key whose next use is farthest away: the optimum where all keys have the same size (Belady 1966).

    `trace` must be the accesses that it is going to be told, from the first one on. Each event takes O(log n).
    """

    def __init__(self, trace: Sequence[str]) -> None:
        self._future = Future(trace)
        self._time = 0
        self._present: dict[str, tuple[int, str]] = {}
        self._heap: list[tuple[int, str]] = []  # farthest first; holds outdated entries too, which are not in `_present`

    def insert(self, key: str, nbytes: int) -> None:
        self._place(key)

    def access(self, key: str) -> None:
        self._time += 1
        self._place(key)

    def remove(self, key: str) -> None:
        del self._present[key]
        self._tidy()

    def victims(self) -> Iterator[str]:
        heap = self._heap
        frontier = [(entry, 0) for entry in heap[:1]]  # walks down the heap in its order, without changing it
        while frontier:
            entry, place = heappop(frontier)
            if self._is_current(entry):
                yield entry[1]
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(heap):
                    heappush(frontier, (heap[child], child))

    def _place(self, key: str) -> None:
        entry = (-self._future.next_use(key, self._time), key)
        self._present[key] = entry
        heappush(self._heap, entry)
        self._tidy()

    def _is_current(self, entry: tuple[int, str]) -> bool:
        return self._present.get(entry[1]) is entry

    def _tidy(self) -> None:
        """Drop outdated entries where they would be met first, and all of them once they are the majority."""
        if len(self._heap) > 2 * len(self._present) + 8:
            self._heap = sorted(self._present.values())
        while self._heap and not self._is_current(self._heap[0]):
            heappop(self._heap)


def lower_bound(trace: Sequence[str], sizes: Mapping[str, int], capacity: int) -> int:
    """Return bytes that no policy can go below when it runs `trace` in a tier of `capacity` bytes, empty at first.

    `sizes`: bytes of each key. Holds for any sizes, for whole and for divided entries, first uses included; O(t log n).
    """
    future = Future(trace)
    held: dict[str, int] = {}  # bytes of each key that stay until its next use
    farthest: list[tuple[int, str]] = []
    total = missed = 0
    for time, key in enumerate(trace):
        reused = held.pop(key, 0)
        missed += sizes[key] - reused
        total -= reused
        held[key] = sizes[key]
        total += sizes[key]
        heappush(farthest, (-future.next_use(key, time + 1), key))
        while total > capacity:
            last = farthest[0][1]
            dropped = min(held[last], total - capacity)
            held[last] -= dropped
            total -= dropped
            if held[last] == 0:
                heappop(farthest)
    return missed
