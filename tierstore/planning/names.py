"""Finds a policy by its name."""

from __future__ import annotations

from tierstore.errors import TierStoreError
from tierstore.planning.classic import FIFO, LRU, MRU
from tierstore.planning.frequency import TinyLFU
from tierstore.planning.lane import Lane
from tierstore.planning.plan import Cost
from tierstore.planning.policy import Policy, PolicyFactory
from tierstore.planning.schedule import FROM_FILES, Schedule


class Auto:
    """Makes the policies of one store: each call gives the one of the next tier, all of them following one schedule."""

    def __init__(self, cost: Cost) -> None:
        self._schedule = Schedule(cost)

    def __call__(self) -> Policy:
        return Lane(self._schedule)


_NAMED: dict[str, PolicyFactory] = {"lru": LRU, "fifo": FIFO, "mru": MRU, "tinylfu": TinyLFU}


def policy_factory(policy: str | PolicyFactory, *, cost: Cost = FROM_FILES) -> PolicyFactory:
    """Return what makes the policy of each tier of one store: `policy` itself if callable, else the one of that name.

    `cost`: of transfers into the fastest tier.
    """
    if callable(policy):
        return policy
    if policy == "auto":
        return Auto(cost)
    if policy not in _NAMED:
        names = sorted(["auto", *_NAMED])
        raise TierStoreError(f"no policy is called {policy!r}; give one of {names} or a callable that returns a tierstore.Policy")
    return _NAMED[policy]
