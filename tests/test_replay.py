"""Replays do what a store does; nothing beats the bound; and the policies rank as the literature says."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces import RECORDED, Trace
from tierstore import BudgetError, Tier, TieredStore, open_backend
from tierstore.planning.classic import FIFO, LRU, MRU
from tierstore.planning.frequency import TinyLFU
from tierstore.planning.offline import Belady, lower_bound
from tierstore.planning.policy import Policy
from tierstore.planning.recorder import Recorder
from tierstore.planning.replay import Replay, Simulation, replay
from tierstore.planning.shadow import Shadowed
from tierstore.testing import DictBackend

ONLINE: dict[str, type[Policy]] = {"lru": LRU, "fifo": FIFO, "mru": MRU, "tinylfu": TinyLFU, "shadowed": Shadowed}


# -- what a replay does -----------------------------------------------------------------------------------------------


class Spy(Policy):
    """Writes down what it is told; evicts in the order of the alphabet."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._keys: set[str] = set()

    def insert(self, key: str, nbytes: int) -> None:
        self.told.append(f"insert {key} {nbytes}")
        self._keys.add(key)

    def access(self, key: str) -> None:
        self.told.append(f"access {key}")

    def remove(self, key: str) -> None:
        self.told.append(f"remove {key}")
        self._keys.remove(key)

    def victims(self) -> Iterator[str]:
        return iter(sorted(self._keys))


def test_a_replay_tells_the_events_in_the_order_of_the_contract() -> None:
    spy = Spy()
    assert replay("abac", {"a": 2, "b": 3, "c": 4}, 5, spy) == Replay(bytes=9, misses=3, hits=1)
    assert spy.told == [
        "insert a 2", "access a", "insert b 3", "access b", "access a", "remove a", "remove b", "insert c 4", "access c",
    ]  # fmt: skip


def test_another_size_is_another_value() -> None:
    tier = Simulation(LRU(), 5)
    assert [tier.use("a", nbytes) for nbytes in (2, 2, 4, 4, 2)] == [False, True, False, True, False]
    assert [tier.use(key, 3) for key in "bab"] == [False, False, False]


def test_a_simulated_tier_only_grows() -> None:
    tier = Simulation(LRU(), 2)
    tier.grow(1)
    assert [tier.use(key, 1) for key in "abab"] == [False, False, True, True]
    tier.grow(3)
    assert [tier.use(key, 1) for key in "cabc"] == [False, True, True, True]


def test_an_empty_trace_costs_nothing() -> None:
    assert replay([], {}, 0, LRU()) == Replay(0, 0, 0)
    assert lower_bound([], {}, 0) == 0


def test_a_key_larger_than_the_tier_is_named() -> None:
    with pytest.raises(BudgetError, match=r"'huge'.* 11 .* 10 ") as caught:
        replay(["a", "huge"], {"a": 1, "huge": 11}, 10, LRU())
    assert (caught.value.required_bytes, caught.value.budget_bytes) == (11, 10)


KEYS = [f"key {i}" for i in range(12)]
GETS = random.Random(3).choices(KEYS, k=300)


@pytest.mark.parametrize("make", [LRU, FIFO, MRU, lambda: Belady(GETS)], ids=["lru", "fifo", "mru", "belady"])
def test_a_replay_moves_what_the_store_moves(make: Callable[[], Policy]) -> None:
    recorders: list[Recorder] = []

    def recorder() -> Recorder:
        recorders.append(Recorder(make()))
        return recorders[-1]

    sizes = {key: 10 + 3 * i for i, key in enumerate(KEYS)}
    with TieredStore([Tier("fast", open_backend("device", "cpu"), 120), Tier("slow", DictBackend())], policy=recorder) as store:
        for key, nbytes in sizes.items():
            store.put(key, torch.zeros(nbytes, dtype=torch.uint8))
        store.offload(KEYS)
        for key in GETS:
            store.get(key)
        stats = store.stats()
    expected = replay(GETS, sizes, 120, make())
    assert Replay(stats.links["slow->fast"].bytes, stats.misses, stats.hits) == expected
    assert recorders[0].trace == GETS, "every use is told exactly once"
    assert recorders[0].sizes == sizes


# -- optima, by trying everything -------------------------------------------------------------------------------------


def optimum(trace: Sequence[str], sizes: Mapping[str, int], capacity: int) -> int:
    """Return the fewest bytes of all ways to fetch whole entries, each of which must be in the tier while it is used."""
    costs = {frozenset[str](): 0}  # of the best way to end with these entries
    for key in trace:
        after: dict[frozenset[str], int] = {}
        for resident, cost in costs.items():
            others = resident - {key}
            paid = cost + (0 if key in resident else sizes[key])
            for kept in chain.from_iterable(combinations(others, n) for n in range(len(others) + 1)):
                now = frozenset((key, *kept))
                if sum(map(sizes.__getitem__, now)) <= capacity:
                    after[now] = min(paid, after.get(now, paid))
        costs = after
    return min(costs.values())


def divided_optimum(trace: Sequence[str], sizes: Mapping[str, int], capacity: int) -> int:
    """Return the fewest bytes where any part of an entry may stay, and an entry passes through while it is used."""
    names = list(sizes)
    costs = {(0,) * len(names): 0}
    for key in trace:
        after: dict[tuple[int, ...], int] = {}
        place = names.index(key)
        for held, cost in costs.items():
            paid = cost + sizes[key] - held[place]
            most = [sizes[key] if i == place else part for i, part in enumerate(held)]
            for now in product(*(range(part + 1) for part in most)):
                if sum(now) <= capacity:
                    after[now] = min(paid, after.get(now, paid))
        costs = after
    return min(costs.values())


@st.composite
def problems(draw: st.DrawFn, *, keys: str = "abcde", largest: int = 6, length: int = 14) -> tuple[str, dict[str, int], int]:
    sizes = {key: draw(st.integers(1, largest)) for key in keys}
    trace = draw(st.text(keys, max_size=length))
    capacity = draw(st.integers(max(sizes.values()), sum(sizes.values())))
    return trace, sizes, capacity


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_bound_is_never_above_the_optimum(problem: tuple[str, dict[str, int], int]) -> None:
    assert lower_bound(*problem) <= optimum(*problem) <= min(replay(*problem, make()).bytes for make in ONLINE.values())


@settings(max_examples=60, deadline=None)
@given(problems(keys="abc", largest=3, length=9))
def test_the_bound_is_the_optimum_of_divided_entries(problem: tuple[str, dict[str, int], int]) -> None:
    assert lower_bound(*problem) == divided_optimum(*problem)


@settings(max_examples=150, deadline=None)
@given(problems(largest=1, length=18))
def test_belady_is_the_optimum_for_equal_sizes(problem: tuple[str, dict[str, int], int]) -> None:
    trace, _, capacity = problem
    assert replay(*problem, Belady(trace)).bytes == optimum(trace, dict.fromkeys("abcde", 1), capacity)


def test_belady_is_not_the_optimum_for_unequal_sizes() -> None:
    """Why there is a bound besides: the farthest may be small and cheap to keep."""
    trace, sizes = "abcba", {"a": 1, "b": 3, "c": 2}
    assert lower_bound(trace, sizes, 4) <= optimum(trace, sizes, 4) == 9
    assert replay(trace, sizes, 4, Belady(trace)).bytes == 10


def test_first_uses_and_whole_passes_are_in_the_bound() -> None:
    """N + (k - 1)(N - C), the bytes that k passes over N cannot go below."""
    sizes = {f"layer {i}": 5 + i for i in range(20)}
    total = sum(sizes.values())
    for capacity in (0, 1, 30, total - 1, total, 2 * total):
        assert lower_bound(list(sizes) * 7, sizes, capacity) == total + 6 * max(0, total - capacity)


# -- what the literature says -----------------------------------------------------------------------------------------


def layers(name: str, count: int) -> list[str]:
    return [f"{name}{i}" for i in range(count)]


def ratios(trace: list[str], share: float) -> dict[str, float]:
    """Return the bytes of each online policy over Belady's, for equal sizes and a tier of that share of the keys."""
    sizes = dict.fromkeys(trace, 1)
    capacity = int(share * len(sizes))
    best = replay(trace, sizes, capacity, Belady(trace)).bytes
    return {name: replay(trace, sizes, capacity, make()).bytes / best for name, make in ONLINE.items()}


@pytest.mark.parametrize("capacity", [1, 10, 20, 39])
def test_on_a_cycle_lru_never_hits_and_mru_is_the_optimum(capacity: int) -> None:
    n, trace = 40, layers("layer", 40) * 40
    sizes = dict.fromkeys(trace, 1)
    assert replay(trace, sizes, capacity, LRU()).hits == replay(trace, sizes, capacity, FIFO()).hits == 0
    best = replay(trace, sizes, capacity, Belady(trace))
    assert replay(trace, sizes, capacity, MRU()) == best
    assert best.misses == n + n * (n - capacity)  # after the first pass 39 more, at n (n - c) / (n - 1) each
    assert replay(trace, sizes, capacity, TinyLFU()).bytes < 1.1 * best.bytes + n


def diffusion(loop: int) -> list[str]:
    return (layers("text", 24) + layers("unet", 40) * loop + layers("vae", 4)) * 3


def test_a_loop_that_fits_beside_parts_that_run_once() -> None:
    ratio = ratios(diffusion(30), share=45 / 68)
    assert ratio["mru"] > 10, "it keeps what runs once and streams the loop"
    assert 1.4 < ratio["lru"] < 2.5, "each part displaces all others"
    assert ratio["tinylfu"] < 1.3
    assert ratio["shadowed"] < 1.5


def test_a_loop_that_does_not_fit_beside_parts_that_run_once() -> None:
    ratio = ratios(diffusion(30), share=30 / 68)
    assert min(ratio["lru"], ratio["fifo"], ratio["mru"]) > 2
    assert ratio["tinylfu"] < 1.25
    assert ratio["shadowed"] < 1.35


def experts(*, popularity: float, sticky: float, tokens: int = 250) -> list[str]:
    """Two of 16 experts in each of 12 layers a token; with probability `sticky` those of the last token."""
    rng = random.Random(0)
    chosen: list[list[int]] = [[] for _ in range(12)]
    weights = [rng.sample([(i + 1) ** -popularity for i in range(16)], 16) for _ in chosen]
    trace = []
    for _ in range(tokens):
        for layer, popular in enumerate(weights):
            if not chosen[layer] or rng.random() >= sticky:
                first = rng.choices(range(16), popular)[0]
                second = rng.choices(range(16), [0 if i == first else w for i, w in enumerate(popular)])[0]
                chosen[layer] = [first, second]
            trace += [f"{layer}.{expert}" for expert in chosen[layer]]
    return trace


def test_popular_experts_want_frequency_and_sticky_ones_recency() -> None:
    popular, sticky = (ratios(experts(popularity=p, sticky=s), 0.25) for p, s in ((1.0, 0.0), (0.0, 0.6)))
    assert popular["tinylfu"] < 0.9 * popular["lru"]
    assert sticky["lru"] < 0.8 * sticky["tinylfu"]
    for ratio in (popular, sticky):
        assert ratio["shadowed"] < 1.08 * min(ratio["lru"], ratio["tinylfu"])


# -- recorded runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=RECORDED)
def recorded(request: pytest.FixtureRequest) -> Trace:
    return RECORDED[request.param]()


def test_a_recorded_run_has_every_use(recorded: Trace) -> None:
    trace, sizes = recorded
    assert set(trace) <= sizes.keys()
    assert len(trace) > 4000
    first = trace[: len(trace) // 2]
    assert len(set(first)) > 0.8 * len(set(trace)), "the second request repeats the first"


def test_a_loop_repeats_exactly() -> None:
    trace, _ = RECORDED["llama"]()
    assert trace == trace[: len(set(trace))] * (len(trace) // len(set(trace))), "prefill and each token use the same weights in one order"
    trace, _ = RECORDED["diffusion"]()
    parts = [key.partition(".")[0] for key in trace]
    assert [parts.count(part) for part in "012"] == [2 * 12 * 6, 2 * 20 * 20 * 6, 2 * 4 * 6]
    assert trace == trace[: len(trace) // 2] * 2


@pytest.mark.parametrize("percent", [25, 50, 75])
def test_nobody_beats_the_bound(recorded: Trace, percent: int) -> None:
    trace, sizes = recorded
    capacity = sum(sizes[key] for key in set(trace)) * percent // 100
    bound = lower_bound(trace, sizes, capacity)
    best = replay(trace, sizes, capacity, Belady(trace)).bytes
    assert sum(sizes[key] for key in set(trace)) < bound <= best < 1.2 * bound
    online = {name: replay(trace, sizes, capacity, make()).bytes for name, make in ONLINE.items()}
    assert min(online.values()) >= bound
    assert online["tinylfu"] < 2.5 * bound
    assert online["shadowed"] < 1.2 * min(online["lru"], online["tinylfu"])
