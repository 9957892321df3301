"""W-TinyLFU: keeps what is used often, and lets everything else pass through a small window.

G. Einziger, R. Friedman, B. Manes: TinyLFU: A Highly Efficient Cache Admission Policy. ACM Transactions on Storage 13(4), 2017.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from tierstore.planning.policy import Policy
from tierstore.planning.segment import Segment

WINDOW_SHARE = 0.01
PROTECTED_SHARE = 0.8
USES_PER_KEY = 10  # the paper's ratio of sample to cache
GHOSTS_PER_KEY = 8  # a model has a few times as many keys as its tier; beyond that a key is forgotten sooner


class Frequencies:
    """How often each key was used lately, in the tier or not: exact counts, halved again and again so that the past fades.

    The paper shares small counters among keys by hashing because it counts millions of keys; a model has thousands.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._uses = 0

    def add(self, key: str, most_keys: int) -> None:
        """Count one use in a tier that has held up to `most_keys` at once."""
        self._counts[key] = self._counts.get(key, 0) + 1
        self._uses += 1
        if self._uses >= USES_PER_KEY * min(len(self._counts), GHOSTS_PER_KEY * most_keys):
            self._uses //= 2
            self._counts = {other: count // 2 for other, count in self._counts.items() if count > 1}

    def __getitem__(self, key: str) -> int:
        return self._counts.get(key, 0)

    def __len__(self) -> int:
        return len(self._counts)


class TinyLFU(Policy):
    """Evicts the less used of two: the oldest key of the window and the oldest one of the main part.

    New keys enter the window. One that is pushed out of it goes to the main part, a segmented LRU: a use promotes from
    probation to protected (80 %), whose oldest key falls back. On equal counts the window's key leaves, so that a cycle or a
    scan passes by what is already there. The window is 1 % of the bytes, but no less than the largest key: were it smaller
    than what comes next, each large key would push one out of the main part, and a cycle of unequal keys would never hit.

    Sizes matter for the shares only, not for the choice: fetching a key again costs its bytes, so what a byte of the tier
    saves is the count alone. The capacity is the most bytes that were there at once.
    """

    def __init__(self) -> None:
        self._window, self._probation, self._protected = Segment(), Segment(), Segment()
        self._uses = Frequencies()
        self._capacity = 0
        self._largest = 0
        self._most_keys = 0

    def insert(self, key: str, nbytes: int) -> None:
        self._segment_of(key).put(key, nbytes)
        segments = (self._window, self._probation, self._protected)
        self._capacity = max(self._capacity, sum(segment.nbytes for segment in segments))
        self._most_keys = max(self._most_keys, sum(map(len, segments)))
        self._largest = max(self._largest, nbytes)
        self._balance()

    def access(self, key: str) -> None:
        self._uses.add(key, self._most_keys)
        if key in self._probation:
            self._protected.put(key, self._probation.pop(key))
            self._balance()
        else:
            self._segment_of(key).touch(key)

    def remove(self, key: str) -> None:
        self._segment_of(key).pop(key)

    def victims(self) -> Iterator[str]:
        candidates, main = iter(self._window), chain(self._probation, self._protected)
        candidate, victim = next(candidates, None), next(main, None)
        while candidate is not None and victim is not None:
            if self._uses[candidate] > self._uses[victim]:
                yield victim
                victim = next(main, None)
            else:
                yield candidate
                candidate = next(candidates, None)
        for last, others in ((candidate, candidates), (victim, main)):
            if last is not None:
                yield last
                yield from others

    def _segment_of(self, key: str) -> Segment:
        """Return the segment that has `key`; a new key belongs to the window."""
        return next((segment for segment in (self._probation, self._protected) if key in segment), self._window)

    def _balance(self) -> None:
        """Push out of window and protected part what exceeds their shares."""
        window = self._window
        share = max(WINDOW_SHARE * self._capacity, self._largest)
        while len(window) > 1 and window.nbytes - window[window.oldest] >= share:
            self._probation.put(*window.pop_oldest())
        while self._protected.nbytes > PROTECTED_SHARE * self._capacity:
            self._probation.put(*self._protected.pop_oldest())
