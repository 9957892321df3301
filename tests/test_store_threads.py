"""Many threads at once: nobody hangs, nothing is lost, and waiting ends.

Sizes here are bytes of uint8 tensors, so that budgets can be read off the numbers.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.rigs import Background, MakeRig, Slow, in_threads, value
from tierstore.backend import SizingBackend
from tierstore.errors import BudgetError, MissingKeyError, TierStoreError
from tierstore.registry import open_backend
from tierstore.store import TieredStore
from tierstore.testing import Delays
from tierstore.tier import Tier

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:ComplexHalf")]


# -- threads ----------------------------------------------------------------------------------------------------------


def quiet() -> Delays:
    """Delays without sleeps: only its gate holds calls up."""
    return Delays(None)


def close_gate(delays: Delays, call: str, key: str) -> None:
    delays.gated = lambda kind, name: (kind, name) == (call, key)
    delays.gate.clear()


@pytest.mark.parametrize("seed", range(3))
def test_eight_threads_under_a_tight_budget(rig: MakeRig, seed: int) -> None:
    """Each thread writes its own keys and reads everybody's. Every byte of a value says which key it belongs to."""
    r = rig(300, 300, None, hook=lambda: Delays(seed, longest=0.0005))
    workers = [Worker(r.store, number, seed) for number in range(8)]
    assert in_threads(*[worker.run for worker in workers], timeout=100) == [None] * 8
    for worker in workers:
        for key, fill in worker.mine.items():
            assert torch.equal(r.store.get(key), worker.sized(key, fill)), key
    assert set(r.store) == {key for worker in workers for key in worker.mine}
    assert r.store.stats().evictions > 100
    r.check()


class Worker:
    """Random operations of one thread, whose values are all equal to its number modulo 8."""

    def __init__(self, store: TieredStore, number: int, seed: int) -> None:
        self._store = store
        self._number = number
        self._rng = random.Random(100 * seed + number)
        self.mine: dict[str, int] = {}

    def run(self) -> None:
        for _ in range(60):
            key = f"{self._number}.{self._rng.randrange(3)}"
            acts = [self.put, self.put, self.get, self.get, self.write, self.read_another, self.move, self.delete]
            self._rng.choice(acts if key in self.mine else [self.put])(key)

    @staticmethod
    def sized(key: str, fill: int) -> torch.Tensor:
        return value(20 * int(key[-1]) + 20, fill)

    def _fill(self) -> int:
        return self._number + 8 * self._rng.randrange(30)

    def put(self, key: str) -> None:
        self.mine[key] = self._fill()
        self._store.put(key, self.sized(key, self.mine[key]))

    def get(self, key: str) -> None:
        assert torch.equal(self._store.get(key), self.sized(key, self.mine[key]))

    def write(self, key: str) -> None:
        self.mine[key] = self._fill()
        with self._store.lease(key) as (tensor,):
            tensor.fill_(self.mine[key])
            self._store.changed(key)

    def read_another(self, key: str) -> None:
        number = self._rng.randrange(8)
        with suppress(MissingKeyError), self._store.lease(f"{number}.{key[-1]}") as (tensor,):
            assert bool((tensor % 8 == number).all())

    def move(self, key: str) -> None:
        self._rng.choice((self._store.offload, self._store.prefetch))(key)

    def delete(self, key: str) -> None:
        try:
            del self._store[key]
        except TierStoreError as error:
            if "is leased" not in str(error):  # by one that reads it
                raise
        else:
            del self.mine[key]


@pytest.mark.parametrize("turn", range(10))
def test_crosswise_leases_end_in_one_budget_error_never_in_a_hang(rig: MakeRig, turn: int) -> None:
    r = rig(20, None)
    for key in "abcd":
        r.store.put(key, value(10))
    both_hold = threading.Barrier(2)
    outcomes: list[str] = []

    def work(first: str, second: str) -> None:
        with r.store.lease(first):
            both_hold.wait(30)
            try:
                with r.store.lease(second):
                    outcomes.append("both")
            except BudgetError as error:
                outcomes.append("refused" if error.required_bytes > error.budget_bytes else str(error))

    assert in_threads(lambda: work("a", "c"), lambda: work("b", "d"), timeout=30) == [None, None]
    assert sorted(outcomes) == ["both", "refused"]
    r.check()


def test_a_lease_waits_for_another_threads_lease(rig: MakeRig) -> None:
    r = rig(20, None)
    r.store.put("a", value(20, 1))
    r.store.put("b", value(20, 2))
    with r.store.lease("a"):
        waiter = Background(lambda: r.store.get("b"))
        assert waiter.still_running()
        assert r.store.tier_of("b") == "slow"
    waiter.join()
    assert r.store.tier_of("b") == "fast"
    assert r.store.stats().stall_seconds > 0.05
    r.check()


def test_a_put_waits_for_another_threads_lease(rig: MakeRig) -> None:
    r = rig(20)
    r.store.put("a", value(20, 1))
    with r.store.lease("a"):
        waiter = Background(lambda: r.store.put("b", value(10)))
        assert waiter.still_running()
    with pytest.raises(BudgetError):  # the lease has ended, and still nothing can leave
        waiter.join()
    del r.store["a"]
    r.store.put("b", value(10))
    r.check()


def test_a_waiting_thread_is_not_refused_for_one_that_is_about_to_go_on(rig: MakeRig) -> None:
    """Both waiters are woken by the release; the first to look again must not take the other for stuck."""
    r = rig(100, None)
    for key, nbytes in (("c", 60), ("d", 90), ("b", 20), ("a", 60)):
        r.store.put(key, value(nbytes))
    holds, go = threading.Event(), threading.Event()

    def nested() -> None:
        with r.store.lease("b"):
            holds.set()
            go.wait(30)
            with r.store.lease("c"):
                pass

    with r.store.lease("a"):
        holder = Background(nested)
        assert holds.wait(30)
        others = [Background(lambda: r.store.get("d")) for _ in range(12)]  # of which some look again before the holder
        assert others[-1].still_running()
        go.set()
        assert holder.still_running()
    for waiter in (holder, *others):
        waiter.join()
    r.check()


def test_who_has_been_woken_no_longer_counts_as_waiting(rig: MakeRig) -> None:
    """The same below the surface, where the order of the threads is certain."""
    r = rig(100)
    for key in "ab":
        r.store.put(key, value(10))
    moves, waiting = r.store.moves, threading.Event()
    refusal = BudgetError("waiting", tier="fast", required_bytes=2, budget_bytes=1)

    def holder() -> None:
        with r.store.lease("b"), moves.lock:
            waiting.set()
            moves.wait_for_others(lambda: refusal)

    with moves.lock:
        moves.acquire([moves.entry("a")], "a test")
    other = Background(holder)
    assert waiting.wait(30)
    with moves.lock:  # from here on the holder waits, and cannot run before this thread waits too
        moves.release([moves.entry("a")])
        moves.wait_for_others(lambda: refusal)
    other.join()
    r.check()


def test_two_threads_may_want_the_same_value(rig: MakeRig) -> None:
    """One brings it up while the other still makes room for it; nobody is refused, and the room is given back."""
    r = rig(160, None, hook=quiet)
    for number, key in enumerate("xyz"):
        r.store.put(key, value(60, number))
    assert r.places() == {"x": "slow", "y": "fast", "z": "fast"}
    close_gate(r.delays(1), "put", "y")
    first = Background(lambda: r.store.get("x"))
    assert r.delays(1).entered.wait(30)
    assert torch.equal(r.store.get("x"), value(60, 0))
    assert first.still_running()
    r.delays(1).gate.set()
    first.join()
    r.check()


def test_a_value_is_fetched_once_for_all_who_wait(rig: MakeRig) -> None:
    r = rig(100, None, hook=quiet)
    for key in ("x", "z"):
        r.store.put(key, value(40))
    r.store.offload("x")
    close_gate(r.delays(1), "get", "x")
    waiters = [Background(lambda: r.store.get("x")) for _ in range(4)]
    assert r.delays(1).entered.wait(30)
    quick = Background(lambda: (r.store.get("z"), r.store.put("q", value(10)), r.store.stats()))
    quick.join()  # the lock is free during a transfer
    r.delays(1).gate.set()
    for waiter in waiters:
        waiter.join()
    assert r.copies("slow->fast") == 1
    r.check()


def test_a_put_waits_while_room_is_made_for_the_older_value(rig: MakeRig) -> None:
    r = rig(100, None, hook=quiet)
    r.store.put("x", value(60, 1))
    r.store.put("y", value(60, 2))
    assert r.places() == {"x": "slow", "y": "fast"}
    close_gate(r.delays(1), "put", "y")
    reader = Background(lambda: r.store.get("x"))
    assert r.delays(1).entered.wait(30)
    writer = Background(lambda: r.store.put("x", value(60, 3)))
    assert writer.still_running()
    r.delays(1).gate.set()
    reader.join()
    writer.join()
    assert torch.equal(r.store.get("x"), value(60, 3))
    assert torch.equal(r.store.get("y"), value(60, 2))
    r.check()


def test_a_value_that_is_prefetched_can_be_deleted(rig: MakeRig) -> None:
    """Room is being made for a value that nobody wants any more: it goes unused."""
    r = rig(100, None, hook=quiet)
    r.store.put("x", value(60))
    r.store.put("y", value(60))
    close_gate(r.delays(1), "put", "y")
    future = r.store.prefetch("x")
    assert r.delays(1).entered.wait(30)
    Background(lambda: r.store.__delitem__("x")).join()
    r.delays(1).gate.set()
    future.result(30)
    assert list(r.store) == ["y"]
    assert r.used("fast") == 0
    r.check()


def test_a_key_that_is_deleted_and_put_again_while_a_lease_waits(rig: MakeRig) -> None:
    r = rig(20, None)
    r.store.put("b", value(20, 1))
    r.store.put("a", value(20))
    with r.store.lease("a"):
        waiter = Background(lambda: r.store.get("b"))
        assert waiter.still_running()
        del r.store["b"]
        r.store.put("b", value(10, 2))
    with pytest.raises(MissingKeyError, match="'b'"):
        waiter.join()
    assert torch.equal(r.store.get("b"), value(10, 2))
    r.check()


def test_a_value_exists_once_its_first_put_is_complete(rig: MakeRig) -> None:
    r = rig(100, hook=quiet)
    close_gate(r.delays(0), "put", "new")
    writer = Background(lambda: r.store.put("new", value(10)))
    assert r.delays(0).entered.wait(30)
    assert "new" not in r.store
    assert len(r.store) == 0
    r.delays(0).gate.set()
    writer.join()
    assert torch.equal(r.store.get("new"), value(10))


class LateReturn(Slow):
    """Its put comes back late: the value is there, and the store does not know yet."""

    def __init__(self) -> None:
        super().__init__()
        self.late: str | None = None
        self.written, self.gate = threading.Event(), threading.Event()

    def put(self, key: str, tensor: torch.Tensor) -> None:
        super().put(key, tensor)
        if key == self.late:
            self.written.set()
            self.gate.wait(30)


def test_room_is_not_made_from_a_copy_that_is_being_replaced(rig: MakeRig) -> None:
    slow = LateReturn()
    r = rig(100, 200, slow=slow)
    r.store.put("k", value(60, 1))
    r.store.flush()
    with r.store.lease("k") as (tensor,):
        tensor.fill_(2)
        r.store.changed("k")
    slow.late = "k"
    demotion = Background(lambda: r.store.offload("k"))
    assert slow.written.wait(30)
    large = Background(lambda: r.store.put("large", value(110, 3)))  # 60 outdated + 60 new + 110 > 200
    assert large.still_running()
    slow.gate.set()
    demotion.join()
    large.join()
    assert torch.equal(slow.get("k"), value(60, 2))
    assert torch.equal(r.store.get("k"), value(60, 2))
    r.check()


class Paired(Slow):
    """A put that goes on only when another one, or as many as make `parties`, has begun; what `broken` names fails then."""

    def __init__(self, parties: int = 2) -> None:
        super().__init__()
        self.barrier = threading.Barrier(parties)
        self.broken = ""
        self.active = self.most = 0
        self._counting = threading.Lock()

    def put(self, key: str, tensor: torch.Tensor) -> None:
        with self._counting:
            self.active += 1
            self.most = max(self.most, self.active)
        try:
            self.barrier.wait(30)
            if key == self.broken:
                raise OSError("broken")
            super().put(key, tensor)
        finally:
            with self._counting:
                self.active -= 1


def test_a_flush_writes_several_values_at_the_same_time(rig: MakeRig) -> None:
    slow = Paired()
    r = rig(100, None, slow=slow)
    for number in range(6):
        r.store.put(str(number), value(10, number))
    r.store.flush()
    assert {key: int(slow.get(key)[0]) for key, _ in slow.entries()} == {str(number): number for number in range(6)}
    r.check()


class SizingPaired(Paired, SizingBackend):
    def stored_bytes(self, key: str) -> int:
        return self.get(key).nbytes


@pytest.mark.parametrize(("kind", "most"), [(Paired, 8), (SizingPaired, 2)])
def test_as_many_large_values_are_flushed_at_a_time(kind: type[Paired], most: int, rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight; two where each is encoded first, which takes memory beside it."""
    monkeypatch.setattr("tierstore.flights._MUCH", 10)
    slow = kind(most)
    r = rig(160, None, slow=slow)
    for number in range(16):
        r.store.put(str(number), value(10, number))
    r.store.flush()
    assert slow.most == most


def test_a_flush_begins_with_the_largest_values(rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierstore.writing._AT_ONCE", 1)
    slow = Slow()
    r = rig(100, None, slow=slow)
    for number in (3, 1, 4, 2):
        r.store.put(str(number), value(number))
    r.store.flush()
    assert [key for key, _ in slow.entries()] == list("4321")


def test_a_flush_of_which_one_value_fails_has_ended_when_it_says_so(rig: MakeRig) -> None:
    slow = Paired()
    r = rig(100, None, slow=slow)
    for number in range(6):
        r.store.put(str(number), value(10, number))
    slow.broken = "3"
    with pytest.raises(OSError, match="broken"):
        r.store.flush()
    assert slow.active == 0
    assert {key for key, _ in slow.entries()} == set("01245")
    r.check()
    slow.broken, slow.barrier = "", threading.Barrier(1)
    r.store.flush()
    assert torch.equal(slow.get("3"), value(10, 3))
    r.check()


def test_a_value_written_while_it_is_flushed_is_not_taken_for_clean(rig: MakeRig) -> None:
    slow = LateReturn()
    r = rig(100, None, slow=slow)
    r.store.put("w", value(60, 1))
    slow.late = "w"
    with r.store.lease("w") as (tensor,):
        flush = Background(r.store.flush)
        assert slow.written.wait(30)
        tensor.fill_(2)
        r.store.changed("w")
        slow.gate.set()
        flush.join()
    assert r.used("slow") == 60
    r.store.offload("w")
    assert torch.equal(r.store.get("w"), value(60, 2))
    r.check()


def test_settled_means_that_nothing_is_written_down_either(rig: MakeRig) -> None:
    """A demotion is no flight, but its bytes are reserved in one tier before they are there."""
    r = rig(100, None, hook=quiet)
    r.store.put("y", value(60))
    close_gate(r.delays(1), "put", "y")
    demotion = Background(lambda: r.store.offload("y"))
    assert r.delays(1).entered.wait(30)
    settling = Background(r.store.moves.settle)
    try:
        assert settling.still_running()
    finally:
        r.delays(1).gate.set()
    settling.join()
    demotion.join()
    r.check()


def test_settled_means_that_no_fetch_is_about_to_follow(rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch may land before whoever started it has the lock again, and goes on to start the next one."""
    r = rig(100, None, hook=quiet)
    moves = r.store.moves
    with moves.lock:
        monkeypatch.setattr(moves, "_pumping", True)
    settling = Background(moves.settle)
    assert settling.still_running()
    with moves.lock:
        monkeypatch.setattr(moves, "_pumping", False)
        moves.wake()
    settling.join()


def test_close_waits_for_what_is_under_way(rig: MakeRig) -> None:
    r = rig(100, None, hook=quiet)
    r.store.put("y", value(60))
    close_gate(r.delays(1), "put", "y")
    demotion = Background(lambda: r.store.offload("y"))
    assert r.delays(1).entered.wait(30)
    events: list[str] = []
    r.slow.close = lambda: events.append("closed")  # type: ignore[method-assign]
    closing = Background(lambda: r.store.close(flush=False))
    assert closing.still_running()
    assert not events
    r.delays(1).gate.set()
    demotion.join()
    closing.join()
    assert events == ["closed"]


def test_no_thread_and_no_memory_is_left_behind(rig: MakeRig) -> None:
    before = threading.active_count()
    store = TieredStore([Tier("fast", open_backend("device", "cpu"), 100), Tier("slow", Slow())])
    store.put("w", value(50))
    memory = StorageWeakRef(store.get("w").untyped_storage())
    store.prefetch("w").result(30)
    store.offload("w")
    assert memory.expired(), "what left the fast tier must not be kept alive by the store"
    store.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("change", ["another shape", "the same shape", "delete"])
def test_a_value_that_a_get_is_about_to_return_is_not_changed(rig: MakeRig, change: str) -> None:
    """Between the end of a fetch and the moment in which the thread that asked for it goes on, other threads come first."""
    r = rig(100, None)
    r.store.put("a", value(10, 1))
    entry = r.store.moves.entries["a"]
    with r.store.moves.lock:
        r.store.moves.acquire([entry], "get", passing=True)
    acts = {
        "another shape": lambda: r.store.put("a", value(20, 2)),
        "the same shape": lambda: r.store.put("a", value(10, 2)),
        "delete": lambda: r.store.__delitem__("a"),
    }
    before = entry.tensor
    other = Background(acts[change])
    assert other.still_running()
    assert entry.tensor is before
    assert torch.equal(before, value(10, 1))
    with r.store.moves.lock:
        r.store.moves.release([entry], passing=True)
    other.join()
    assert torch.equal(before, value(10, 1)), "who has it still reads it"
    assert ("a" in r.store) == (change != "delete")
    r.check()


def test_gets_and_puts_of_other_shapes_do_not_disturb_each_other(rig: MakeRig) -> None:
    r = rig(60, None, hook=lambda: Delays(3, longest=0.0003))
    r.store.put("a", value(10))
    r.store.put("b", value(50))

    def put() -> None:
        for number in range(100):
            r.store.put("a", value(10 + number % 2 * 30, number % 251))

    def get() -> None:
        for _ in range(100):
            found = r.store.get("a")
            assert torch.equal(found, found[:1].expand_as(found)), "torn"
            r.store.get("b")

    assert in_threads(put, *[get] * 6, timeout=100) == [None] * 7
    r.check()


@pytest.mark.parametrize("ahead", [True, False])
def test_a_fetch_gives_back_what_it_reserved_when_the_value_is_replaced_meanwhile(rig: MakeRig, ahead: bool) -> None:
    """Making room for a value releases the lock, and the value that it was made for may be another one afterwards."""
    r = rig(100, None)
    r.store.put("wanted", value(60, 1))
    r.store.offload("wanted")
    r.store.put("in the way", value(90, 2))
    moves, entry = r.store.moves, r.store.moves.entries["wanted"]
    evict = moves.evict

    def evict_slowly(victim: object, level: int) -> bool:
        moves.evict = evict  # type: ignore[method-assign]
        left = evict(victim, level)  # type: ignore[arg-type]
        moves.lock.release()
        try:
            r.store.fill("wanted", value(20, 3), fastest=1)
        finally:
            moves.lock.acquire()
        return left

    moves.evict = evict_slowly  # type: ignore[method-assign, assignment]
    with moves.lock:
        if ahead:
            policy = SimpleNamespace(wanted=lambda: "wanted", spare=lambda: iter(["in the way"]))
            assert not moves._fetch_ahead(0, policy)  # type: ignore[arg-type]
        else:
            assert moves.fetch(entry) is None
    assert torch.equal(r.store.get("wanted"), value(20, 3))
    r.check()


@pytest.mark.parametrize("look", ["get", "lease", "delete", "tier_of"])
def test_a_first_write_under_way_is_waited_for(rig: MakeRig, look: str) -> None:
    """Its last step may be done, and seen by other processes, before the store has taken note of it."""
    r = rig(None, hook=quiet)
    close_gate(r.delays(0), "put", "new")
    writer = Background(lambda: r.store.put("new", value(10, 1)))
    assert writer.still_running()
    acts: dict[str, Callable[[], object]] = {
        "get": lambda: r.store.get("new"),
        "lease": lambda: r.store.lease("new").__enter__()[0].sum(),
        "delete": lambda: r.store.__delitem__("new"),
        "tier_of": lambda: r.store.tier_of("new"),
    }
    reader = Background(acts[look])
    assert reader.still_running()
    r.delays(0).gate.set()
    writer.join()
    reader.join()
    assert ("new" in r.store) == (look != "delete")
