"""The only place that does arithmetic on used bytes."""

from __future__ import annotations

import threading


class Ledger:
    """Bytes of one tier: resident, staging and in flight together never exceed `budget` (None: no limit).

    `aside`: bytes of the budget that somebody else takes, such as activations; the store has what is left. When it grows
    below what is used, nothing is reserved until enough was released. Not thread-safe by itself: the store calls it under
    its lock.
    """

    __slots__ = ("aside", "budget", "peak", "used")

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.aside = 0
        self.used = 0
        self.peak = 0

    @property
    def limit(self) -> int | None:
        """What the store may use now; None: no limit."""
        return None if self.budget is None else max(self.budget - self.aside, 0)

    def reserve(self, nbytes: int) -> bool:
        """Take `nbytes` if they fit, and say whether they did."""
        limit = self.limit
        if limit is not None and self.used + nbytes > limit:
            return False
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return True

    def release(self, nbytes: int) -> None:
        """Give back `nbytes` taken earlier."""
        assert 0 <= nbytes <= self.used, (nbytes, self.used)
        self.used -= nbytes

    def excess(self, nbytes: int) -> int:
        """By how many bytes `nbytes` more would exceed the limit; not positive if they fit."""
        limit = self.limit
        return 0 if limit is None else self.used + nbytes - limit

    def fits(self, nbytes: int) -> bool:
        """True if an empty tier could hold `nbytes`."""
        limit = self.limit
        return limit is None or nbytes <= limit


class Pool:
    """Bytes that the ledgers of several stores use together: never more than `budget` (None: no limit). Thread-safe."""

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.used = 0
        self.peak = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Take `nbytes` if they fit, and say whether they did."""
        with self._lock:
            if self.budget is not None and self.used + nbytes > self.budget:
                return False
            self.used += nbytes
            self.peak = max(self.peak, self.used)
            return True

    def give(self, nbytes: int) -> None:
        """Give back `nbytes` taken earlier."""
        with self._lock:
            assert 0 <= nbytes <= self.used, (nbytes, self.used)
            self.used -= nbytes


class PartLedger(Ledger):
    """The bytes of a `Pool` that one store may use, at most `budget` of them, and what others leave."""

    __slots__ = ("pool",)

    def __init__(self, pool: Pool, budget: int | None) -> None:
        super().__init__(budget)
        self.pool = pool

    def reserve(self, nbytes: int) -> bool:
        if not self.pool.take(nbytes):
            return False
        if not super().reserve(nbytes):
            self.pool.give(nbytes)
            return False
        return True

    def release(self, nbytes: int) -> None:
        super().release(nbytes)
        self.pool.give(nbytes)
