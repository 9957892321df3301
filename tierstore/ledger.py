"""The only place that does arithmetic on used bytes."""

from __future__ import annotations


class Ledger:
    """Bytes of one tier: resident, staging and in flight together never exceed `budget` (None: no limit).

    Not thread-safe by itself: the store calls it under its lock.
    """

    __slots__ = ("budget", "peak", "used")

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.used = 0
        self.peak = 0

    def reserve(self, nbytes: int) -> bool:
        """Take `nbytes` if they fit, and say whether they did."""
        if self.budget is not None and self.used + nbytes > self.budget:
            return False
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return True

    def release(self, nbytes: int) -> None:
        """Give back `nbytes` taken earlier."""
        assert 0 <= nbytes <= self.used, (nbytes, self.used)
        self.used -= nbytes

    def excess(self, nbytes: int) -> int:
        """By how many bytes `nbytes` more would exceed the budget; not positive if they fit."""
        return 0 if self.budget is None else self.used + nbytes - self.budget

    def fits(self, nbytes: int) -> bool:
        """True if an empty tier could hold `nbytes`."""
        return self.budget is None or nbytes <= self.budget
