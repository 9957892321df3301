"""Every eviction policy keeps the contract, and does what it is for."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tierstore.planning.classic import FIFO, LRU, MRU
from tierstore.planning.frequency import Frequencies, TinyLFU
from tierstore.planning.names import policy_factory
from tierstore.planning.offline import Belady
from tierstore.planning.policy import Policy
from tierstore.planning.recorder import Recorder
from tierstore.planning.replay import Simulation, replay
from tierstore.planning.segment import Segment
from tierstore.planning.shadow import Shadowed
from tierstore.testing import check_policy


def random_keys(length: int = 3000) -> list[str]:
    rng = random.Random(1)
    return [f"key {rng.randrange(24)}" for _ in range(length)]


POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LRU,
    "fifo": FIFO,
    "mru": MRU,
    "tinylfu": TinyLFU,
    "shadowed": Shadowed,
    "shadowed, short": lambda: Shadowed((TinyLFU, FIFO, MRU), window=16),
    "belady": lambda: Belady(random_keys()),
    "belady, unexpected": lambda: Belady(["other"] * 5),
    "recorder": lambda: Recorder(TinyLFU()),
}


def insert(policy: Policy, keys: str, nbytes: int = 1) -> None:
    for key in keys:
        policy.insert(key, nbytes)


def access(policy: Policy, keys: str) -> None:
    for key in keys:
        policy.access(key)


def use(policy: Policy, keys: str, nbytes: int = 1) -> None:
    """Bring in and use one key after the other, as demand fetching does."""
    for key in keys:
        policy.insert(key, nbytes)
        policy.access(key)


def order(policy: Policy) -> str:
    return "".join(policy.victims())


def numbered(name: str, count: int) -> list[str]:
    return [f"{name}{i}" for i in range(count)]


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_the_contract(make: Callable[[], Policy], seed: int) -> None:
    check_policy(make, events=800, seed=seed)


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_entries_without_bytes(make: Callable[[], Policy]) -> None:
    policy = make()
    use(policy, "abc", nbytes=0)
    insert(policy, "a", nbytes=0)
    assert sorted(order(policy)) == ["a", "b", "c"]


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_a_value_may_change_its_size(make: Callable[[], Policy]) -> None:
    policy, rng = make(), random.Random(0)
    for _ in range(300):
        use(policy, rng.choice("abcdef"), nbytes=rng.randrange(100))
    assert sorted(order(policy)) == list("abcdef")
    for key in "abcdef":
        policy.remove(key)
    assert order(policy) == ""


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_a_long_run_inside_a_tier(make: Callable[[], Policy]) -> None:
    rng, tier = random.Random(2), Simulation(make(), 60)
    sizes = {f"key {i}": rng.randrange(1, 20) for i in range(24)}
    hits = [tier.use(key, sizes[key]) for key in random_keys()]
    assert 0.1 < sum(hits) / len(hits) < 0.6  # nobody hits often in a quarter of the bytes, nobody never


# -- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("lru", LRU), ("fifo", FIFO), ("mru", MRU), ("tinylfu", TinyLFU)])
def test_names(name: str, kind: type[Policy]) -> None:
    make = policy_factory(name)
    assert type(make()) is kind
    assert make() is not make()


# -- FIFO, MRU --------------------------------------------------------------------------------------------------------


def test_fifo_ignores_uses_and_new_values() -> None:
    policy = FIFO()
    use(policy, "abc")
    access(policy, "ab")
    insert(policy, "a", nbytes=2)
    assert order(policy) == "abc"
    policy.remove("a")
    use(policy, "a")
    assert order(policy) == "bca"


def test_mru_evicts_what_was_just_used() -> None:
    policy = MRU()
    use(policy, "abc")
    assert order(policy) == "cba"
    access(policy, "a")
    assert order(policy) == "acb"


def test_mru_keeps_what_was_fetched_ahead() -> None:
    policy = MRU()
    use(policy, "ab")
    insert(policy, "xy")
    assert order(policy) == "baxy"
    access(policy, "x")
    assert order(policy) == "xbay"


# -- W-TinyLFU --------------------------------------------------------------------------------------------------------


def test_segments_count_their_bytes() -> None:
    segment = Segment()
    for key, nbytes in (("a", 5), ("b", 7), ("a", 2)):
        segment.put(key, nbytes)
    assert (segment.nbytes, list(segment), segment.oldest, segment["a"], len(segment)) == (9, ["b", "a"], "b", 2, 2)
    segment.touch("b")
    assert segment.pop_oldest() == ("a", 2)
    assert segment.pop("b") == 7
    assert (segment.nbytes, "b" in segment) == (0, False)


def test_tinylfu_lets_a_scan_pass_by() -> None:
    tier = Simulation(TinyLFU(), 12)
    hot = numbered("hot", 8)
    for key in hot * 3 + numbered("scanned", 100):
        tier.use(key, 1)
    assert [tier.use(key, 1) for key in hot] == [True] * 8


def test_tinylfu_evicts_the_less_used_of_the_two_oldest() -> None:
    policy = TinyLFU()
    use(policy, "abcd")  # one key fits the window: d; a, b, c are in probation
    assert order(policy) == "dabc"
    access(policy, "d")
    assert order(policy) == "abcd"
    access(policy, "d")
    policy.remove("a")
    use(policy, "e")  # pushes d into the main part
    assert order(policy) == "ebcd"


def test_tinylfu_remembers_uses_of_what_has_left() -> None:
    policy = TinyLFU()
    use(policy, "abcd")
    access(policy, "d")
    policy.remove("d")
    use(policy, "d")
    assert order(policy) == "abcd"


def test_tinylfu_protects_what_is_used_again() -> None:
    policy = TinyLFU()
    use(policy, "abcdefghij")
    access(policy, "abc")
    policy.remove("d")
    use(policy, "k")  # pushes j into the main part, behind the others that were used once
    assert order(policy) == "kefghijabc"
    access(policy, "a")
    assert order(policy) == "kefghijbca"


def test_tinylfu_protects_four_fifths() -> None:
    policy = TinyLFU()
    use(policy, "abcdefghij")
    access(policy, "abcdefghi")  # nine are more than 80 % of ten: the oldest falls back into probation
    policy.remove("b")
    use(policy, "k")
    assert order(policy) == "kajcdefghi"


def test_tinylfu_keeps_a_part_of_a_cycle_of_unequal_keys() -> None:
    """A window smaller than the largest key would make room for each large one from the main part: no hit, ever."""
    sizes = {f"{layer}.{name}": nbytes for layer in range(20) for name, nbytes in (("norm", 1), ("q", 32), ("k", 16), ("mlp", 64))}
    total = sum(sizes.values())
    assert replay(list(sizes) * 20, sizes, total // 2, TinyLFU()).bytes < 0.6 * 20 * total


def test_tinylfu_learns_new_habits() -> None:
    tier = Simulation(TinyLFU(), 10)
    old, new = numbered("old", 8), numbered("new", 8)
    for key in old * 200 + new * 60:
        tier.use(key, 1)
    assert [tier.use(key, 1) for key in new] == [True] * 8


def test_frequencies_are_halved_and_bounded() -> None:
    counts = Frequencies()
    for i in range(20_000):
        counts.add("often", most_keys=4)
        counts.add(f"once {i}", most_keys=4)
    assert len(counts) < 1000
    assert 10 < counts["often"] < 1000
    assert counts["once 3"] == counts["never"] == 0


# -- Belady -----------------------------------------------------------------------------------------------------------


def test_belady_evicts_what_is_used_last_of_all() -> None:
    policy = Belady("abcd" + "bcab")
    use(policy, "abcd")
    assert order(policy) == "dacb"
    access(policy, "bc")
    assert order(policy) == "cdba"


def test_belady_knows_that_what_came_in_is_used_at_once() -> None:
    policy = Belady("abxab")
    use(policy, "ab")
    insert(policy, "x")
    assert order(policy) == "bax"
    access(policy, "x")
    assert order(policy) == "xba"


def test_belady_forgets_outdated_entries() -> None:
    trace = numbered("layer", 50) * 40
    policy = Belady(trace)
    replay(trace, dict.fromkeys(trace, 1), 25, policy)
    assert len(policy._heap) <= 2 * 25 + 8
    for key in random.Random(0).sample(list(policy.victims()), 25):
        assert policy._heap[0][1] == next(policy.victims()), "the first victim is found at once"
        policy.remove(key)


# -- recorder ---------------------------------------------------------------------------------------------------------


def test_a_recorder_writes_down_uses_and_sizes() -> None:
    policy = Recorder(MRU())
    use(policy, "ab", nbytes=3)
    access(policy, "a")
    insert(policy, "p", nbytes=4)  # a prefetch is not a use
    policy.remove("b")
    use(policy, "b", nbytes=5)
    assert "".join(policy.trace) == "abab"
    assert policy.sizes == {"a": 3, "p": 4, "b": 5}
    assert order(policy) == "bap"
