"""Runs a policy over a trace without moving anything: what the store would do by fetching on demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tierstore.errors import BudgetError
from tierstore.ledger import Ledger
from tierstore.planning.policy import Policy


@dataclass(frozen=True)
class Replay:
    """What a replay cost: `bytes` that entered the tier, which was empty at first, and uses that missed or hit."""

    bytes: int
    misses: int
    hits: int


class Simulation:
    """A tier of keys only, filled on demand; tells `policy` the events in the order in which a store does.

    `capacity`: bytes; may be raised between uses.
    """

    def __init__(self, policy: Policy, capacity: int) -> None:
        self._policy = policy
        self._ledger = Ledger(capacity)
        self._sizes: dict[str, int] = {}

    @property
    def capacity(self) -> int:
        return self._ledger.budget or 0

    def grow(self, capacity: int) -> None:
        """Raise the capacity to `capacity` bytes, if it is less."""
        self._ledger.budget = max(self.capacity, capacity)

    def use(self, key: str, nbytes: int) -> bool:
        """Use `key` and say whether it was there, in this size; raise `BudgetError` if it can never be."""
        hit = self._sizes.get(key) == nbytes
        if not hit:
            self._bring_in(key, nbytes)
        self._policy.access(key)
        return hit

    def _bring_in(self, key: str, nbytes: int) -> None:
        if not self._ledger.fits(nbytes):
            raise BudgetError(f"using {key!r} in a replay", tier="replayed", required_bytes=nbytes, budget_bytes=self.capacity)
        if key in self._sizes:
            self._evict(key)
        while not self._ledger.reserve(nbytes):
            self._evict(next(self._policy.victims()))
        self._sizes[key] = nbytes
        self._policy.insert(key, nbytes)

    def _evict(self, key: str) -> None:
        self._policy.remove(key)
        self._ledger.release(self._sizes.pop(key))


def replay(trace: Sequence[str], sizes: Mapping[str, int], capacity: int, policy: Policy) -> Replay:
    """Use the keys of `trace` one after the other in an empty tier of `capacity` bytes; `policy` must be fresh.

    Raises `BudgetError` for a key that is larger than the tier.
    """
    tier = Simulation(policy, capacity)
    missed = [key for key in trace if not tier.use(key, sizes[key])]
    return Replay(sum(sizes[key] for key in missed), len(missed), len(trace) - len(missed))
