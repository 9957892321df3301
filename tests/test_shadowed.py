"""`Shadowed` follows whichever policy misses fewer bytes, and does not waver."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tierstore.planning.classic import FIFO, LRU
from tierstore.planning.frequency import TinyLFU
from tierstore.planning.policy import Policy
from tierstore.planning.replay import Simulation, replay
from tierstore.planning.shadow import Shadow, Shadowed


def drifting(steps: int) -> list[str]:
    """Each key is used four times within a short while and never again."""
    return [f"step{i - back}" for i in range(3, steps) for back in range(4)]


def run(policy: Policy, trace: list[str], capacity: int) -> int:
    return replay(trace, dict.fromkeys(trace, 1), capacity, policy).bytes


CYCLE = [f"layer{i}" for i in range(30)] * 20
PHASES = [CYCLE, drifting(400), CYCLE + drifting(400) + CYCLE]


@pytest.mark.parametrize("trace", PHASES, ids=["cycle", "drift", "phases"])
def test_shadowed_is_about_as_good_as_the_better_one(trace: list[str]) -> None:
    best = min(run(LRU(), trace, 12), run(TinyLFU(), trace, 12))
    assert run(Shadowed(window=200), trace, 12) < 1.15 * best


def test_shadowed_follows_what_fits_the_moment() -> None:
    policy = Shadowed(window=200)
    tier, kinds = Simulation(policy, 12), []
    for phase in (drifting(100), CYCLE, drifting(400)):
        for key in phase:
            tier.use(key, 1)
        kinds.append(type(policy.followed))
    assert kinds == [LRU, TinyLFU, LRU]


def test_shadowed_stays_where_others_are_hardly_better() -> None:
    """Half of the time LRU is slightly better, half of the time FIFO: neither is worth a switch."""
    policy, rng = Shadowed((LRU, FIFO), window=100), random.Random(0)
    tier, switches = Simulation(policy, 20), 0
    for _ in range(5000):
        before = policy.followed
        tier.use(f"any{rng.randrange(25)}", 1)
        switches += policy.followed is not before
    assert switches < 60, "without a margin it switches hundreds of times"


class BySize(Policy):
    """Evicts the smallest key first, or (`sign` = -1) the largest."""

    def __init__(self, sign: int) -> None:
        self._sign = sign
        self._sizes: dict[str, int] = {}

    def insert(self, key: str, nbytes: int) -> None:
        self._sizes[key] = nbytes

    def access(self, key: str) -> None:
        pass

    def remove(self, key: str) -> None:
        del self._sizes[key]

    def victims(self) -> Iterator[str]:
        return iter(sorted(self._sizes, key=lambda key: self._sign * self._sizes[key]))


def test_shadows_count_bytes_and_not_misses() -> None:
    sizes = {"big": 10, **dict.fromkeys("abcde", 1)}
    trace = list(sizes) * 20
    keeps_big, keeps_small = (replay(trace, sizes, 12, BySize(sign)) for sign in (1, -1))
    assert keeps_big.bytes < keeps_small.bytes
    assert keeps_big.misses > keeps_small.misses
    policy = Shadowed((lambda: BySize(-1), lambda: BySize(1)), window=30)
    assert replay(trace, sizes, 12, policy).bytes < 0.75 * keeps_small.bytes


def test_a_shadow_forgets_misses_beyond_its_window() -> None:
    shadow = Shadow(LRU(), window=3)
    for key in "abcab":
        shadow.use(key, 10, capacity=30)
    assert shadow.missed == 10
    shadow.use("c", 10, capacity=30)
    assert shadow.missed == 0


def test_a_shadow_grows_with_what_is_learnt() -> None:
    shadow = Shadow(LRU(), window=100)
    for capacity, missed in ((1, 2), (2, 3), (2, 3)):
        for key in "ab":
            shadow.use(key, 1, capacity)
        assert shadow.missed == missed
