"""Follows whichever policy would have missed fewer bytes lately; for accesses that depend on the data."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from tierstore.planning.classic import LRU
from tierstore.planning.frequency import TinyLFU
from tierstore.planning.policy import Policy, PolicyFactory
from tierstore.planning.replay import Simulation
from tierstore.planning.segment import Segment

MARGIN = 0.85  # of the bytes that the followed policy missed: another one is followed once it missed less than this


class Shadow:
    """A simulated tier under one policy; `missed` counts the bytes that it missed in its last `window` uses."""

    def __init__(self, policy: Policy, window: int) -> None:
        self._tier = Simulation(policy, 0)
        self._recent: deque[int] = deque()
        self._window = window
        self.missed = 0

    def use(self, key: str, nbytes: int, capacity: int) -> None:
        """Use `key` in a tier that has by now been seen to hold `capacity` bytes."""
        self._tier.grow(capacity)
        cost = 0 if self._tier.use(key, nbytes) else nbytes
        self._recent.append(cost)
        self.missed += cost
        if len(self._recent) > self._window:
            self.missed -= self._recent.popleft()


class Shadowed(Policy):
    """Evicts what the followed one of several policies would, by default LRU or W-TinyLFU.

    All of them see every event, so each has an order ready. Beside the real tier, each fills a shadow of keys only, as large
    as the real one was seen to be; after every use the one with clearly fewer missed bytes over the last `window` uses is
    followed. The first is followed at the start, and by a margin as long as no other is better.
    """

    def __init__(self, choices: Sequence[PolicyFactory] = (LRU, TinyLFU), window: int = 2048) -> None:
        self._policies = [make() for make in choices]
        self._shadows = [Shadow(make(), window) for make in choices]
        self._present = Segment()
        self._capacity = 0
        self._followed = 0

    @property
    def followed(self) -> Policy:
        """The policy whose order is used now."""
        return self._policies[self._followed]

    def insert(self, key: str, nbytes: int) -> None:
        self._present.put(key, nbytes)
        self._capacity = max(self._capacity, self._present.nbytes)
        for policy in self._policies:
            policy.insert(key, nbytes)

    def access(self, key: str) -> None:
        for policy in self._policies:
            policy.access(key)
        for shadow in self._shadows:
            shadow.use(key, self._present[key], self._capacity)
        best = min(range(len(self._shadows)), key=lambda i: self._shadows[i].missed)
        if self._shadows[best].missed < MARGIN * self._shadows[self._followed].missed:
            self._followed = best

    def remove(self, key: str) -> None:
        self._present.pop(key)
        for policy in self._policies:
            policy.remove(key)

    def victims(self) -> Iterator[str]:
        return self.followed.victims()
