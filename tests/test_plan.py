"""Plans: bytes against what no schedule can go below, on cycles and on recorded requests; and what a run of them moves."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import cycle, islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces import RECORDED
from tierstore.errors import BudgetError
from tierstore.planning.classic import LRU
from tierstore.planning.cycle import Cycle
from tierstore.planning.frequency import TinyLFU
from tierstore.planning.lane import Lane
from tierstore.planning.offline import Belady, lower_bound
from tierstore.planning.plan import Cost, plan
from tierstore.planning.predictor import Predictor
from tierstore.planning.replay import Simulation, replay
from tierstore.planning.schedule import Schedule
from tierstore.testing import check_policy

MODELS = [name for name in RECORDED if name != "mixture"]


def auto(capacity: int) -> Lane:
    """Return the policy "auto" for the fast one of two tiers."""
    schedule = Schedule(Cost())
    lane = Lane(schedule)
    Lane(schedule)
    lane.budget(capacity)
    return lane


def use(fast: Lane, keys: Sequence[str]) -> None:
    """Use entries of 10 bytes in a tier that holds four of them and fetches nothing ahead."""
    present: set[str] = set()
    for key in keys:
        if key not in present:
            if len(present) == 4:
                victim = next(iter(fast.victims()))
                fast.remove(victim)
                present.remove(victim)
            fast.insert(key, 10)
            present.add(key)
        fast.access(key)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.data())
@settings(max_examples=300, deadline=None)
def test_a_cycle_moves_no_more_than_what_does_not_fit_and_a_ring(sizes_in_order: list[int], data: st.DataObject) -> None:
    """At most N - C and a ring, where no schedule moves less than N - C; the ring holds two neighbours at most."""
    sizes = {f"k{i}": nbytes for i, nbytes in enumerate(sizes_in_order)}
    keys, total, largest = list(sizes), sum(sizes_in_order), max(sizes_in_order)
    capacity = data.draw(st.integers(largest, total + 5))
    made = plan(keys, sizes, [capacity, None])
    resident = [key for key in keys if made.rest[key] == 0]
    kept = sum(sizes[key] for key in resident)
    assert made.link_bytes == (total - kept,)
    assert kept + made.ring_bytes[0] <= max(capacity, kept + 2 * largest)
    assert kept <= capacity
    assert made.link_bytes[0] >= max(0, total - capacity)
    assert made.link_bytes[0] <= max(0, total - capacity) + 2 * largest + largest
    assert made.order[0] == tuple(key for key in keys if key not in resident)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[str], dict[str, int], list[float]]:
    """Phases that take turns, each a loop over entries of its own, of a few sizes; and how long is computed after each access."""
    trace: list[str] = []
    sizes: dict[str, int] = {}
    for phase in range(draw(st.integers(1, 4))):
        own = draw(st.lists(st.sampled_from([1, 2, 4, 6, 8]), min_size=1, max_size=30))
        keys = {f"p{phase}.k{i}": nbytes << 14 for i, nbytes in enumerate(own)}
        sizes |= keys
        trace += list(keys) * draw(st.integers(1, 6))
    durations = draw(st.lists(st.integers(1, 100).map(float), min_size=len(trace), max_size=len(trace)))
    return trace, sizes, durations


@given(programs(), st.floats(0.1, 0.9), st.sampled_from([0, 16 << 10, 512 << 10]))
@settings(max_examples=300, deadline=None)
def test_whatever_the_ring_needs_what_stays_is_what_saves_most(
    program: tuple[list[str], dict[str, int], list[float]], share: float, fixed_bytes: int
) -> None:
    """What stays and the ring fit together in each tier, and save little less than the best choice beside the largest ring would.

    The best choice is the one that may divide entries (Dantzig 1957). A fifth is allowed for entries that count as equal.
    """
    trace, sizes, durations = program
    largest, total = max(sizes.values()), sum(sizes.values())
    budgets = [max(largest, int(share / 2 * total)), max(largest, int(share * total))]
    made = plan(trace, sizes, [*budgets, None], durations, cost=Cost(fixed_bytes, 64 * fixed_bytes))
    uses = Counter(trace)
    for level, budget in enumerate(budgets):
        stays = [key for key, rest in made.rest.items() if rest == level]
        kept = sum(sizes[key] for key in stays)
        assert kept + (made.ring_bytes[level] if made.order[level] else 0) <= budget
        free = budget - budget // 8 - 4 * largest
        best = 0.0
        for key in sorted((key for key in sizes if made.rest[key] >= level), key=lambda key: -uses[key] * (1 + fixed_bytes / sizes[key])):
            part = min(1.0, max(0, free) / sizes[key])
            best, free = best + part * uses[key] * (sizes[key] + fixed_bytes), free - sizes[key]
        assert sum(uses[key] * (sizes[key] + fixed_bytes) for key in stays) >= 0.8 * best


@pytest.mark.parametrize("count", [8, 40, 41])
def test_equal_blocks_move_what_does_not_fit_and_two_slots(count: int) -> None:
    sizes = {f"b{i}": 10 for i in range(count)}
    for room in range(1, count + 1):
        made = plan(list(sizes), sizes, [room * 10, None])
        missing = 10 * (count - room)
        assert made.link_bytes[0] <= missing + (made.ring_bytes[0] if missing else 0)
        assert made.ring_bytes[0] <= 20


def test_what_streams_is_spread_evenly() -> None:
    sizes = {f"b{i}": 10 for i in range(40)}
    made = plan(list(sizes), sizes, [220, None])
    streamed = [i for i, key in enumerate(sizes) if made.rest[key] == 1]
    gaps = {b - a for a, b in zip(streamed, [*streamed[1:], streamed[0] + 40], strict=True)}
    assert len(streamed) == 20
    assert gaps == {2}


def test_what_is_computed_long_hides_what_streams() -> None:
    """Entries after which much is computed are followed by streamed ones."""
    sizes = {f"b{i}": 10 for i in range(40)}
    durations = [9.0] * 20 + [1.0] * 20
    made = plan(list(sizes), sizes, [320, None], durations)
    streamed = [i for i, key in enumerate(sizes) if made.rest[key] == 1]
    assert sum(i <= 20 for i in streamed) >= 0.8 * len(streamed)


def test_what_is_used_most_stays() -> None:
    sizes = {"once": 10, "often": 10, "twice": 10, "also once": 10, "and once": 10}
    made = plan(["once", "often", "twice", "often", "also once", "often", "twice", "and once"], sizes, [30, None])
    assert made.rest == {"often": 0, "once": 1, "twice": 0, "also once": 1, "and once": 1}


def test_tiers_are_exclusive_and_times_predicted() -> None:
    sizes = {f"b{i}": 10 for i in range(40)}
    made = plan(list(sizes), sizes, [120, 130, None], [1.0] * 40, [10.0, 2.0])
    where = [sum(level == at for level in made.rest.values()) for at in (0, 1, 2)]
    assert where == [10, 10, 20]
    assert made.link_bytes == (300, 200)
    assert made.seconds == max(40.0, 300 / 10.0, 200 / 2.0)


def test_small_entries_stay_where_a_transfer_has_a_price() -> None:
    sizes = {f"{kind}{i}": nbytes for i in range(20) for kind, nbytes in (("large", 100), ("small", 1))}
    made = plan(list(sizes), sizes, [400, None], cost=Cost(10))
    assert all(made.rest[key] == 0 for key in sizes if key.startswith("small"))


def test_a_giant_stays_rather_than_needing_a_ring() -> None:
    sizes = {"giant": 50} | {f"b{i}": 5 for i in range(20)}
    assert plan(list(sizes), sizes, [80, None]).rest["giant"] == 0


def test_a_giant_in_pieces_stays_as_a_whole() -> None:
    """All of it that streams has to be there at once, so a part that stays saves nothing, small as it is."""
    giant = [f"giant{i}" for i in range(5)]
    sizes = dict.fromkeys([*giant, *(f"b{i}" for i in range(10))], 10)
    made = plan(list(sizes), sizes, [80, None], together=dict.fromkeys(giant, giant[0]))
    assert made.link_bytes == (90,)
    assert all(made.rest[key] == 0 for key in giant)


def test_an_entry_larger_than_the_tier_is_named() -> None:
    with pytest.raises(BudgetError, match="'b'"):
        plan(["a", "b"], {"a": 1, "b": 10}, [5, None])


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("name", MODELS)
def test_recorded_requests_move_little_more_than_the_optimum(name: str, share: float) -> None:
    """Once "auto" has seen three requests of a recorded kind, it moves at most 1.10 times what the offline optimum does."""
    trace, sizes = RECORDED[name]()
    request = trace[: len(trace) // 2]
    assert trace == request * 2
    capacity = int(share * sum(sizes[key] for key in set(trace)))
    simulation = Simulation(auto(capacity), capacity)
    moved = [sum(0 if simulation.use(key, sizes[key]) else sizes[key] for key in request) for _ in range(8)]
    optimum = steady(request, sizes, capacity)
    assert sum(moved[4:]) <= 1.10 * 4 * optimum
    assert sum(moved) >= lower_bound(request * 8, sizes, capacity)


def steady(request: list[str], sizes: dict[str, int], capacity: int) -> int:
    """Return the bytes that Belady's choice moves for one more repetition."""
    first, more = (replay(request * n, sizes, capacity, Belady(request * n)).bytes for n in (3, 5))
    return (more - first) // 2


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.9])
def test_a_mixture_moves_no_more_than_the_better_online_policy(share: float) -> None:
    """Where accesses depend on data, at most 1.10 times what LRU or frequency moves, whichever is better."""
    trace, sizes = RECORDED["mixture"]()
    capacity = int(share * sum(sizes[key] for key in set(trace)))
    best = min(replay(trace, sizes, capacity, policy).bytes for policy in (LRU(), TinyLFU()))
    assert replay(trace, sizes, capacity, auto(capacity)).bytes <= 1.10 * best


def test_auto_keeps_the_contract() -> None:
    check_policy(lambda: auto(500))


@pytest.mark.parametrize("seed", range(5))
def test_auto_keeps_the_contract_while_it_has_a_plan(seed: int) -> None:
    """Every key in the tier is a victim exactly once, whatever loops, jumps and prefetches came before."""
    rng = random.Random(seed)
    lane, present = auto(200), dict[str, int]()
    loops = [[f"{name}{i}" for i in range(rng.randrange(3, 30))] for name in "abc"]
    for _ in range(200):
        for key in rng.choice(loops):
            step(lane, present, key, prefetch=rng.random() < 0.5)
            victims = list(lane.victims())
            assert sorted(victims) == sorted(present)
            assert set(lane.spare()) <= set(present)
    assert lane._schedule.plan is not None


def step(lane: Lane, present: dict[str, int], key: str, *, prefetch: bool) -> None:
    """Use `key` in a tier of 20 places, then bring in what is wanted ahead where that is possible."""
    if key not in present:
        make_room(lane, present, {key})
        lane.insert(key, 10)
        present[key] = 10
    lane.access(key)
    wanted = lane.wanted() if prefetch else None
    spare = [other for other in lane.spare() if other != key]
    if wanted is not None and (len(present) < 20 or spare):
        assert wanted not in present
        if len(present) == 20:
            lane.remove(spare[0])
            del present[spare[0]]
        lane.insert(wanted, 10)
        present[wanted] = 10


def make_room(lane: Lane, present: dict[str, int], needed: set[str]) -> None:
    while len(present) >= 20:
        victim = next(key for key in lane.victims() if key not in needed)
        lane.remove(victim)
        del present[victim]


def test_a_ring_holds_neighbours() -> None:
    def cycle(*sizes: int, together: dict[str, str] | None = None) -> Cycle:
        return Cycle("abcd", [1.0] * 4, dict(zip("abcd", sizes, strict=True)), together or {})

    assert cycle(1, 2, 9, 4).ring(()) == 13
    assert cycle(1, 2, 9, 4).ring({"c"}) == 6
    assert cycle(5, 2, 9, 4).ring(set("abcd")) == 0
    assert cycle(1, 2, 9, 4).ring((), slots=1) == 9
    assert cycle(1, 2, 9, 4).ring((), slots=3) == 15
    assert cycle(1, 2, 9, 4, together={"a": "a", "b": "a", "c": "a"}).ring(()) == 16, "what is used at once, and the next one"
    assert cycle(1, 2, 9, 4, together={"a": "a", "b": "a", "c": "a"}).ring({"c"}) == 7


def test_two_neighbours_too_large_for_a_ring_leave_room_for_others() -> None:
    """Then nothing is fetched beside them, but the rest of the tier is not left empty."""
    sizes = {"table": 50, "head": 50} | {f"b{i}": 5 for i in range(20)}
    made = plan(list(sizes), sizes, [80, None])
    assert sum(sizes[key] for key, level in made.rest.items() if level == 0) == 30


def test_time_that_no_ring_can_use_counts_for_nothing() -> None:
    """After a long computation no more can be there than the ring holds: what streams is spread over the other accesses."""
    sizes = {f"b{i}": 10 for i in range(40)}
    durations = [1.0] * 39 + [1000.0]
    made = plan(list(sizes), sizes, [220, None], durations)
    streamed = [i for i, key in enumerate(sizes) if made.rest[key] == 1]
    gaps = [b - a for a, b in pairwise(streamed)]
    assert len(streamed) == 20
    assert max(gaps) <= 4


class TestPredictor:
    def test_a_loop_is_expected_from_its_second_time_on(self) -> None:
        predictor = Predictor()
        assert [predictor.see(key) for key in "abcabcabc"] == [False] * 4 + [True] * 5
        assert predictor.period == 3
        assert list(predictor.cycle()) == list("abc")

    def test_phases_are_recognised_by_how_they_begin(self) -> None:
        predictor = Predictor()
        for key in "xyzabcabcabcxyz":
            predictor.see(key)
        assert list(predictor.cycle())[:4] == list("abca")

    def test_the_longer_common_past_decides(self) -> None:
        predictor = Predictor()
        for key in "pqr1" + "stu2" + "..." + "pq":
            predictor.see(key)
        predictor.see("r")
        assert predictor.cycle()[0] == "1"

    def test_keys_that_depend_on_data_are_found(self) -> None:
        rng, predictor = random.Random(0), Predictor()
        for _ in range(100):
            for layer in range(4):
                for key in ("in", "out", f"expert{rng.randrange(8)}"):
                    predictor.see(f"{layer}.{key}")
        assert {key.split(".")[1][:6] for key in predictor.erratic} == {"expert"}
        assert len(predictor.erratic) == 32
        assert predictor.matched >= 100

    def test_the_history_is_bounded(self) -> None:
        predictor = Predictor(limit=50)
        for _ in range(40):
            for key in "abcdefg":
                predictor.see(key)
        assert len(predictor.history) < 100
        assert predictor.period is not None
        assert predictor.period % 7 == 0
        assert predictor.matched > 100


def test_a_ring_has_room_for_what_keeps_a_link_busy() -> None:
    """Where transfers cost something on top of their bytes several have to be on their way; but no more than an eighth of a budget."""
    sizes = {f"k{number}": 10 for number in range(100)}
    assert plan(list(sizes), sizes, [500, None]).ring_bytes == (20,)
    assert plan(list(sizes), sizes, [500, None], cost=Cost(1, 64)).ring_bytes == (70,)  # 10, and six more, of 64 and 500 / 8
    assert plan(list(sizes), sizes, [160, None], cost=Cost(1, 64)).ring_bytes == (30,)  # 160 / 8
    made = plan(list(sizes), sizes, [500, None], cost=Cost(1, 64))
    assert sum(sizes[key] for key, level in made.rest.items() if level == 0) + made.ring_bytes[0] <= 500


def test_what_is_held_is_not_offered() -> None:
    lane = auto(100)
    for key in "abc":
        lane.insert(key, 10)
    lane.hold("b")
    lane.access("b")
    assert list(lane._online.victims()) == ["a", "c"]
    lane.unhold("b")
    assert set(lane._online.victims()) == {"a", "b", "c"}
    lane.hold("b")
    lane.remove("b")
    lane.insert("b", 10)
    assert set(lane._online.victims()) == {"a", "b", "c"}


def test_what_no_plan_speaks_of_gives_way_to_what_a_slower_tier_is_to_keep() -> None:
    """A model that ran before the loop fills RAM; what the plan keeps there is fetched from the disk in its place."""
    schedule = Schedule()
    fast, ram, _ = Lane(schedule), Lane(schedule), Lane(schedule)
    fast.budget(40)
    ram.budget(60)
    for i in range(6):
        ram.insert(f"encoder{i}", 10)
    use(fast, [f"block{i}" for i in range(8)] * 6)
    assert schedule.plan is not None
    kept = [key for key, level in schedule.plan.rest.items() if level == 1]
    assert schedule.plan.ring_bytes[1] == 0
    assert kept
    spare = list(ram.spare())
    assert len(spare) == len(kept)
    assert all(key.startswith("encoder") for key in spare)


def test_a_slow_lane_that_a_fast_one_has_overtaken_goes_on() -> None:
    """What is in the fastest tier already, straight from the disk, keeps nothing else from being fetched into RAM: or it is so for ever."""
    schedule = Schedule(Cost())
    fast, ram, _ = Lane(schedule), Lane(schedule), Lane(schedule)
    fast.budget(40)
    ram.budget(100)
    keys = [f"block{i}" for i in range(8)]
    use(fast, keys * 6)
    assert schedule.plan is not None
    missing = [key for key in keys if schedule.plan.rest[key] == 1]
    above = [key for key in missing if fast.has(key)]
    assert above
    assert ram.wanted() in missing
    brought = []
    while (wanted := ram.wanted()) is not None:
        ram.insert(wanted, 10)
        brought.append(wanted)
    assert set(brought) == set(missing) - set(above)
    fast.remove(above[0])
    assert ram.wanted() == above[0], "it was passed over, and is nowhere now but on the disk"


def test_what_leaves_while_a_plan_settles_does_not_make_the_next_one_smaller() -> None:
    """A tier that is still full of what stayed before has too little room for a time; a plan leaves too little if it goes on."""
    schedule = Schedule(Cost())
    fast, _ = Lane(schedule), Lane(schedule)
    fast.budget(40)
    keys = [f"block{i}" for i in range(8)]
    schedule.sizes.update(dict.fromkeys(keys, 10))

    def kept() -> int:
        assert schedule.plan is not None
        return list(schedule.plan.rest.values()).count(0)

    uses = cycle(keys)
    while schedule.plan is None:
        schedule.seen(next(uses))
    schedule.squeezed(10, by_plan=True)
    for key in islice(uses, 3 * len(keys)):
        schedule.seen(key)
    assert kept() == 2, "it fits with a ring of two"
    schedule.squeezed(10, by_plan=True)
    for key in islice(uses, 3 * len(keys)):
        schedule.seen(key)
    assert kept() == 1


def test_what_no_plan_speaks_of_is_fetched_ahead_where_it_is_foreseen() -> None:
    """A model that is used once between loops comes into the fastest tier in the order of its use, before what is kept for the loop."""
    schedule = Schedule(Cost())
    fast, ram, _ = Lane(schedule), Lane(schedule), Lane(schedule)
    fast.budget(60)
    ram.budget(100)
    once, loop = [f"once{i}" for i in range(24)], [f"loop{i}" for i in range(4)]
    schedule.sizes.update(dict.fromkeys(once + loop, 10))
    request = once + loop * 3
    for key in [*request, *once[:22]]:
        schedule.seen(key)
    schedule._adopt(plan(loop, schedule.sizes, [60, 100, None]))
    assert [schedule.rest(key) for key in loop] == [0] * 4
    brought = []
    while (wanted := fast.wanted()) is not None and len(brought) < 6:
        fast.insert(wanted, 10)
        brought.append(wanted)
    assert brought == [*once[22:], *loop]
    assert ram.wanted() is None, "what only passes by has no place in RAM"
