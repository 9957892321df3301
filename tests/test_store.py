"""What a user of `TieredStore` sees: values, places, budgets, leases, failures, and many threads at once.

Sizes here are bytes of uint8 tensors, so that budgets can be read off the numbers.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.samples import all_samples, assert_identical
from tierstore.backend import Backend, MemoryBackend
from tierstore.errors import BudgetError, ClosedError, MissingKeyError, TierStoreError, UnsupportedTensorError
from tierstore.planning.classic import LRU
from tierstore.registry import open_backend
from tierstore.spec import TensorSpec
from tierstore.store import TieredStore
from tierstore.testing import Delays, DictBackend, Faults, InjectedError, wrap
from tierstore.testing.faults import Interference
from tierstore.tier import Tier

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:ComplexHalf")]


def value(nbytes: int, fill: int = 0) -> torch.Tensor:
    return torch.full((nbytes,), fill, dtype=torch.uint8)


class Slow(DictBackend):
    """A tier below memory that its test keeps, so that what it holds can be looked at and reopened."""


@dataclass
class Rig:
    """A store over the tiers "fast", "mid" and "slow" (as many as there are budgets), with a hand on each backend."""

    store: TieredStore
    hooks: list[Interference]
    slow: Backend

    def faults(self, level: int) -> Faults:
        hook = self.hooks[level]
        assert isinstance(hook, Faults)
        return hook

    def delays(self, level: int) -> Delays:
        hook = self.hooks[level]
        assert isinstance(hook, Delays)
        return hook

    def used(self, name: str) -> int:
        return self.store.stats().tiers[name].used_bytes

    def copies(self, link: str) -> int:
        return self.store.stats().links[link].copies

    def places(self) -> dict[str, str]:
        return {key: self.store.tier_of(key) for key in self.store}

    def check(self) -> None:
        """Ledgers agree with what backends hold, and nothing is leased or moving any more."""
        for tier in self.store.tiers:
            assert tier.ledger.used == sum(spec.nbytes for _, spec in tier.backend.entries()), tier
            assert tier.ledger.budget is None or tier.ledger.peak <= tier.ledger.budget, tier
        assert self.store.moves.leased_bytes == 0
        assert not any(entry.busy or entry.leases for entry in self.store.moves.entries.values())


MakeRig = Callable[..., Rig]


@pytest.fixture
def rig() -> Iterator[MakeRig]:
    """Make rigs: `rig(100, 200, None)`; the last tier is a `Slow`, the others are memory."""
    stores: list[TieredStore] = []

    def make(*budgets: int | None, hook: Callable[[], Interference] = Faults, slow: Backend | None = None) -> Rig:
        memories = [open_backend("device", "cpu") for _ in budgets[1:]]
        last = slow or (Slow() if len(budgets) > 1 else open_backend("device", "cpu"))
        hooks = [hook() for _ in budgets]
        names = ("fast", "mid", "slow")[: len(budgets)] if len(budgets) != 2 else ("fast", "slow")
        tiers = [Tier(*parts) for parts in zip(names, map(wrap, [*memories, last], hooks), budgets, strict=True)]
        store = TieredStore(tiers)
        stores.append(store)
        return Rig(store, hooks, last)

    yield make
    for store in stores:
        store.close(flush=False)


def in_threads(*tasks: Callable[[], object], timeout: float = 60) -> list[BaseException | None]:
    """Run all tasks at once and return what each raised."""
    raised: list[BaseException | None] = [None] * len(tasks)

    def run(number: int) -> None:
        try:
            tasks[number]()
        except BaseException as error:  # noqa: BLE001  (handed to the test)
            raised[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return raised


class Background:
    """Runs one task in a thread; `join` raises what it raised."""

    def __init__(self, task: Callable[[], object]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(task,), daemon=True)
        self._thread.start()

    def _run(self, task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001  (raised again by join)
            self._error = error

    def still_running(self, seconds: float = 0.1) -> bool:
        self._thread.join(seconds)
        return self._thread.is_alive()

    def join(self) -> None:
        assert not self.still_running(30), "the thread hangs"
        if self._error is not None:
            raise self._error


# -- values -----------------------------------------------------------------------------------------------------------


def test_every_dtype_and_layout_survives_eviction(rig: MakeRig) -> None:
    r = rig(300, 600, None)
    samples = all_samples()
    for key, tensor in samples.items():
        (r.store.put if TensorSpec.of(tensor).nbytes <= 300 else r.store.fill)(key, tensor)
    assert r.copies("fast->mid") > 100
    assert r.copies("mid->slow") > 100
    for key, tensor in samples.items():
        if TensorSpec.of(tensor).nbytes <= 300:
            assert_identical(r.store.get(key), tensor)
        else:  # never resident, so never brought up
            with pytest.raises(BudgetError):
                r.store.get(key)
    r.check()


def test_put_takes_a_copy_without_history(rig: MakeRig) -> None:
    r = rig(1000)
    source = torch.ones(4, requires_grad=True)
    r.store.put("w", source * 2)
    with torch.no_grad():
        source.zero_()
    found = r.store.get("w")
    assert not found.requires_grad
    assert torch.equal(found, torch.full((4,), 2.0))


def test_lazy_views_are_resolved(rig: MakeRig) -> None:
    r = rig(1000)
    source = torch.tensor([1 + 2j, 3 - 4j])
    r.store.put("conjugate", source.conj())
    r.store.put("negative", source.conj().imag)
    assert torch.equal(r.store.get("conjugate"), source.conj().resolve_conj())
    assert torch.equal(r.store.get("negative"), -source.imag)
    assert not r.store.get("conjugate").is_conj()


@pytest.mark.parametrize(
    "bad",
    [torch.empty(3, device="meta"), torch.eye(3).to_sparse(), [1.0], None],
    ids=lambda v: type(v).__name__,
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(rig: MakeRig, bad: torch.Tensor) -> None:
    r = rig(1000)
    with pytest.raises(UnsupportedTensorError):
        r.store.put("w", bad)
    assert "w" not in r.store
    r.check()


def test_a_key_is_a_string(rig: MakeRig) -> None:
    r = rig(1000)
    with pytest.raises(TierStoreError, match="int"):
        r.store.put(3, value(1))  # type: ignore[arg-type]
    assert 3 not in r.store


def test_it_counts_like_a_dict(rig: MakeRig) -> None:
    r = rig(30, None)
    for key in "abcde":
        r.store.put(key, value(10))
    r.store.put("a", value(20))
    del r.store["c"]
    assert len(r.store) == 4
    assert set(r.store) == set("abde")
    assert "c" not in r.store
    assert "a" in r.store


@pytest.mark.parametrize("act", ["get", "lease", "delete", "tier_of", "spec_of", "prefetch", "offload", "changed"])
def test_a_missing_key_is_a_key_error_that_names_it(rig: MakeRig, act: str) -> None:
    r = rig(100)
    acts: dict[str, Callable[[], object]] = {
        "lease": lambda: r.store.lease("gone").__enter__(),
        "delete": lambda: r.store.__delitem__("gone"),
    }
    with pytest.raises(KeyError, match=r"^no entry is called 'gone'$") as caught:
        acts.get(act, lambda: getattr(r.store, act)("gone"))()
    assert isinstance(caught.value, MissingKeyError)


def test_a_new_value_may_have_another_shape(rig: MakeRig) -> None:
    r = rig(100, None)
    r.store.put("w", value(60, 1))
    r.store.put("w", torch.ones(3, 5))
    assert r.store.spec_of("w") == TensorSpec.of(torch.ones(3, 5))
    assert torch.equal(r.store.get("w"), torch.ones(3, 5))
    assert r.used("fast") == 60
    r.check()


# -- places: who leaves, where to, and at what cost --------------------------------------------------------------------


def test_the_least_recently_used_leaves_first(rig: MakeRig) -> None:
    r = rig(30, None)
    for key in "abc":
        r.store.put(key, value(10))
    r.store.get("a")
    with r.store.lease("b"):
        pass
    r.store.put("d", value(10))
    assert r.places() == {"a": "fast", "b": "fast", "c": "slow", "d": "fast"}
    r.store.put("e", value(20))
    assert r.places() == {"a": "slow", "b": "slow", "c": "slow", "d": "fast", "e": "fast"}


def test_what_leaves_goes_down_one_tier_at_a_time(rig: MakeRig) -> None:
    r = rig(10, 20, None)
    for number in range(5):
        r.store.put(str(number), value(10, number))
    assert r.places() == {"0": "slow", "1": "slow", "2": "mid", "3": "mid", "4": "fast"}
    assert (r.copies("fast->mid"), r.copies("mid->slow"), r.copies("fast->slow")) == (4, 2, 0)
    assert torch.equal(r.store.get("0"), value(10, 0))


def test_a_value_too_large_for_the_tier_below_skips_it(rig: MakeRig) -> None:
    r = rig(50, 20, None)
    r.store.put("large", value(50))
    r.store.put("other", value(50))
    assert r.places() == {"large": "slow", "other": "fast"}


def test_put_goes_where_it_fits(rig: MakeRig) -> None:
    r = rig(10, 20, None)
    r.store.put("a", value(15))
    r.store.put("b", value(25))
    assert r.places() == {"a": "mid", "b": "slow"}


def test_fill_evicts_nothing(rig: MakeRig) -> None:
    r = rig(10, 20, None)
    for number in range(5):
        r.store.fill(str(number), value(10))
    assert list(r.places().values()) == ["fast", "mid", "mid", "slow", "slow"]
    assert r.store.stats().evictions == 0


def test_a_clean_value_is_dropped_not_written(rig: MakeRig) -> None:
    """Weights are immutable in inference: going round a cycle writes each of them down once and never again."""
    r = rig(20, None)
    for number in range(4):
        r.store.put(str(number), value(10, number))
    r.store.flush()
    writes = r.faults(1).calls["put"]
    for _ in range(5):
        for number in range(4):
            assert torch.equal(r.store.get(str(number)), value(10, number))
    assert r.faults(1).calls["put"] == writes == 4
    assert r.store.stats().evictions >= 18


def test_a_changed_value_is_written_before_it_is_dropped(rig: MakeRig) -> None:
    r = rig(10, None)
    r.store.put("w", value(10, 1))
    r.store.flush()
    with r.store.lease("w") as (tensor,):
        tensor.fill_(2)
        r.store.changed("w")
    r.store.put("other", value(10))
    assert r.store.tier_of("w") == "slow"
    assert torch.equal(r.store.get("w"), value(10, 2))
    r.check()


def test_an_outdated_file_stays_until_the_new_value_replaces_it(rig: MakeRig) -> None:
    r = rig(10, 100)
    r.store.put("w", value(10, 1))
    r.store.flush()
    with r.store.lease("w") as (tensor,):
        tensor.fill_(2)
        r.store.changed("w")
    assert torch.equal(r.slow.get("w"), value(10, 1)), "a crash now would lose both versions"
    assert r.used("slow") == 10, "what lies there must be counted"
    r.store.flush()
    assert torch.equal(r.slow.get("w"), value(10, 2))
    assert r.used("slow") == 10
    r.check()


def test_outdated_files_make_room_first(rig: MakeRig) -> None:
    r = rig(30, 60)
    for key in "abc":
        r.store.put(key, value(10))
    r.store.flush()
    with r.store.lease("a"):
        r.store.changed("a")
    r.store.put("large", value(40))  # 30 + 40 do not fit, 20 + 40 do
    assert {key for key, _ in r.slow.entries()} == {"b", "c", "large"}
    assert r.places() == {"a": "fast", "b": "fast", "c": "fast", "large": "slow"}
    r.check()


def test_the_last_tier_gives_up_what_a_faster_one_has(rig: MakeRig) -> None:
    """Tiers are exclusive where bytes are short: 20 + 20 bytes hold four values of 10."""
    r = rig(20, 20)
    for number in range(4):
        r.store.put(str(number), value(10, number))
    assert sorted(r.places().values()) == ["fast", "fast", "slow", "slow"]
    del r.store["3"]
    for number in (0, 1, 2, 0, 1, 2):
        assert torch.equal(r.store.get(str(number)), value(10, number))
    r.check()


def test_the_last_tier_gives_up_a_copy_for_one_that_has_no_other(rig: MakeRig) -> None:
    r = rig(20, 20)
    for number, key in enumerate("abc"):
        r.store.put(key, value(10, number))
    r.store.get("a")  # in both tiers now, and c only in the fast one
    r.store.put("d", value(10, 3))
    assert r.places() == {"a": "fast", "b": "slow", "c": "slow", "d": "fast"}
    assert {key for key, _ in r.slow.entries()} == {"b", "c"}
    r.check()


def test_deleting_gives_all_bytes_back(rig: MakeRig) -> None:
    r = rig(10, 10, None)
    for number in range(3):
        r.store.put("w", value(10, number))  # leaves an outdated copy below
        r.store.offload("w")
        r.store.flush()
        r.store.get("w")
    del r.store["w"]
    assert [r.used(name) for name in ("fast", "mid", "slow")] == [0, 0, 0]
    assert not list(r.slow.entries())
    r.check()


def test_prefetch_brings_up_what_fits_and_leaves_the_rest(rig: MakeRig) -> None:
    r = rig(30, None)
    for key in "abcdef":
        r.store.put(key, value(10))
    r.store.prefetch("a").result(30)
    assert r.store.tier_of("a") == "fast"
    with r.store.lease("a"):
        r.store.prefetch(key for key in "bcdef" if key in r.store).result(30)  # a generator may ask the store itself
        assert r.store.tier_of("a") == "fast"
    assert r.used("fast") == 30
    r.store.offload(list("abc"))
    r.store.put("big", value(31))
    r.store.prefetch("big").result(30)
    assert r.store.tier_of("big") == "slow"
    r.check()


def test_offload_takes_out_all_but_leased_values(rig: MakeRig) -> None:
    r = rig(30, None)
    for key in "abc":
        r.store.put(key, value(10))
    with r.store.lease("b"):
        r.store.offload(key for key in "abc" if key in r.store)
        assert r.places() == {"a": "slow", "b": "fast", "c": "slow"}
    r.store.offload("b")
    assert r.used("fast") == 0


def test_offload_without_a_place_to_go_is_a_budget_error(rig: MakeRig) -> None:
    r = rig(30)
    r.store.put("a", value(10))
    with pytest.raises(BudgetError, match="offloading 'a'"):
        r.store.offload("a")
    assert r.store.tier_of("a") == "fast"


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_too_much_at_once_fails_before_anything_moves(rig: MakeRig) -> None:
    r = rig(30, None)
    for key in "abcde":
        r.store.put(key, value(10))
    before = r.places(), r.store.stats().links
    with pytest.raises(BudgetError, match=r"'a', 'b', 'c', 'd' needs 40 bytes .*'fast'.* 30 bytes; raise") as caught:
        r.store.lease("a", "b", "c", "d").__enter__()
    assert (caught.value.required_bytes, caught.value.budget_bytes, caught.value.tier) == (40, 30, "fast")
    assert isinstance(caught.value, MemoryError)
    assert (r.places(), r.store.stats().links) == before


def test_a_value_that_fits_nowhere_fails_before_anything_moves(rig: MakeRig) -> None:
    r = rig(30, 50)
    for key in "abcde":
        r.store.put(key, value(10))
    before = r.places()
    for key in ("a", "new"):
        with pytest.raises(BudgetError, match=f"putting '{key}' needs 51 bytes"):
            r.store.put(key, value(51))
    assert r.places() == before
    assert torch.equal(r.store.get("a"), value(10))
    r.check()


def test_a_value_that_fits_nowhere_fails_at_once_also_while_others_hold_leases(rig: MakeRig) -> None:
    r = rig(30)
    r.store.put("a", value(10))
    with r.store.lease("a"):
        assert isinstance(in_threads(lambda: r.store.put("b", value(31)), timeout=10)[0], BudgetError)


def test_when_all_tiers_are_full_the_older_values_stay(rig: MakeRig) -> None:
    r = rig(20, 20)
    for key in "abcd":
        r.store.put(key, value(10))
    with pytest.raises(BudgetError, match="delete"):
        r.store.put("e", value(10))
    assert sorted(r.store) == list("abcd")
    r.check()


def test_a_full_store_still_takes_new_values_of_old_keys(rig: MakeRig) -> None:
    r = rig(20)
    r.store.put("a", value(20, 1))
    r.store.put("a", value(20, 2))  # there is no room for two
    assert torch.equal(r.store.get("a"), value(20, 2))
    with pytest.raises(BudgetError):
        r.store.put("a", torch.ones(5))
    assert torch.equal(r.store.get("a"), value(20, 2))
    r.check()


def test_leases_that_leave_no_room_are_named(rig: MakeRig) -> None:
    r = rig(30, None)
    for key in "abcd":
        r.store.put(key, value(10))
    with r.store.lease("a", "b"), pytest.raises(BudgetError, match="20 bytes of it are leased") as caught:
        r.store.lease("c", "d").__enter__()
    assert caught.value.required_bytes == 40
    r.check()


def test_shrinking_evicts_and_growing_does_not(rig: MakeRig) -> None:
    r = rig(40, None)
    for key in "abcd":
        r.store.put(key, value(10))
    r.store.resize("fast", "20B")
    assert r.places() == {"a": "slow", "b": "slow", "c": "fast", "d": "fast"}
    assert r.store.stats().tiers["fast"].budget_bytes == 20
    r.store.resize("fast", None)
    r.store.get("a")
    assert r.used("fast") == 30


def test_shrinking_below_what_is_leased_keeps_the_budget(rig: MakeRig) -> None:
    r = rig(40, None)
    for key in "abcd":
        r.store.put(key, value(10))
    with r.store.lease("a", "b"), pytest.raises(BudgetError, match=r"shrinking to 10 bytes.*'fast'.*leases"):
        r.store.resize("fast", 10)
    assert r.store.stats().tiers["fast"].budget_bytes == 40
    with pytest.raises(TierStoreError, match=r"'gpu'.*'fast'.*'slow'"):
        r.store.resize("gpu", 10)
    with pytest.raises(ValueError, match="8GiB"):
        r.store.resize("fast", "much")


def test_what_a_tier_already_holds_must_fit_its_budget() -> None:
    slow = Slow()
    slow.put("w", value(50))
    closed: list[str] = []
    memory = open_backend("device", "cpu")
    memory.close = lambda: closed.append("fast")  # type: ignore[method-assign]
    with pytest.raises(BudgetError, match="opening what 'slow' already holds needs 50 bytes"):
        TieredStore([Tier("fast", memory, 10), Tier("slow", slow, 40)])
    assert closed == ["fast"], "a store that fails to open must not keep a directory locked"


# -- leases -----------------------------------------------------------------------------------------------------------


def test_a_leased_value_stays_where_it_is(rig: MakeRig) -> None:
    r = rig(30, None)
    r.store.put("w", value(10, 7))
    with r.store.lease("w") as (tensor,):
        for number in range(10):
            r.store.put(str(number), value(10))
        assert r.store.tier_of("w") == "fast"
        assert torch.equal(tensor, value(10, 7))
        assert r.store.get("w").data_ptr() == tensor.data_ptr()
    r.store.put("x", value(30))
    assert r.store.tier_of("w") == "slow"
    r.check()


def test_leased_values_come_in_order_and_by_key(rig: MakeRig) -> None:
    r = rig(30, None)
    for number in range(3):
        r.store.put(str(number), value(10, number))
    with r.store.lease("2", "0", "2") as tensors:
        assert [int(tensor[0]) for tensor in tensors] == [2, 0, 2]
        assert int(tensors["0"][0]) == 0
        assert tensors.keys() == ("2", "0", "2")
        assert [key for key, _ in tensors.items()] == ["2", "0", "2"]
        assert len(tensors.values()) == 3
        assert len(tensors[1:]) == 2
    with r.store.lease() as nothing:
        assert tuple(nothing) == ()
    r.check()


def test_leases_nest_and_end_in_any_order(rig: MakeRig) -> None:
    r = rig(20, None)
    for key in "abc":
        r.store.put(key, value(10))
    first, second = r.store.lease("a"), r.store.lease("a", "b")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(BudgetError):
        r.store.get("c")
    second.__exit__(None, None, None)
    second.__exit__(None, None, None)  # a second end is no end of another's lease
    r.store.get("c")
    r.check()


def test_a_lease_is_held_once_at_a_time(rig: MakeRig) -> None:
    r = rig(20)
    r.store.put("a", value(10))
    lease = r.store.lease("a")
    for _ in range(2):
        with lease, pytest.raises(TierStoreError, match="already held"):
            lease.__enter__()
    r.check()


def test_a_leased_value_can_be_replaced_in_place_only(rig: MakeRig) -> None:
    r = rig(100, None)
    r.store.put("w", value(10, 1))
    r.store.flush()
    with r.store.lease("w") as (tensor,):
        r.store.put("w", value(10, 2))
        assert torch.equal(tensor, value(10, 2)), "holders of the lease see the new value"
        with pytest.raises(TierStoreError, match="leased"):
            r.store.put("w", value(11))
        with pytest.raises(TierStoreError, match="leased"):
            del r.store["w"]
    r.store.offload("w")
    assert torch.equal(r.store.get("w"), value(10, 2))
    r.check()


def test_changed_belongs_inside_a_lease(rig: MakeRig) -> None:
    """Without a lease the value may be on its way down at this moment, and would be lost with its memory."""
    r = rig(100, None)
    r.store.put("w", value(10))
    with pytest.raises(TierStoreError, match="lease"):
        r.store.changed("w")
    r.store.offload("w")
    with pytest.raises(TierStoreError, match="lease"):
        r.store.changed("w")


def test_a_lease_that_fails_half_way_gives_everything_back(rig: MakeRig) -> None:
    r = rig(30, None)
    for key in "abc":
        r.store.put(key, value(10))
    r.store.offload(list("abc"))
    r.faults(1).arm("get", 2)
    with pytest.raises(InjectedError):
        r.store.lease("a", "b", "c").__enter__()
    r.check()
    with r.store.lease("a", "b", "c"):
        pass


def test_held_and_leased_bytes_add_up(rig: MakeRig) -> None:
    r = rig(30, None)
    r.store.put("w", value(10))
    moves = r.store.moves
    with moves.lock:
        moves.hold(moves.entry("w"))
    with r.store.lease("w"):
        assert moves.leased_bytes == 10
        with moves.lock:
            moves.unhold(moves.entry("w"))
        assert moves.leased_bytes == 10
    r.check()


# -- counters ---------------------------------------------------------------------------------------------------------


def test_every_counter_moves(rig: MakeRig) -> None:
    r = rig(20, None)
    r.store.put("a", value(10))
    r.store.put("b", value(15))
    r.store.get("b")
    r.store.get("a")
    stats = r.store.stats()
    assert (stats.hits, stats.misses, stats.evictions) == (1, 1, 2)
    assert stats.stall_seconds > 0
    fast, slow = stats.tiers["fast"], stats.tiers["slow"]
    assert (fast.budget_bytes, fast.used_bytes, fast.peak_bytes, fast.entries) == (20, 10, 15, 1)
    assert (slow.budget_bytes, slow.used_bytes, slow.entries) == (None, 25, 2)
    assert stats.links["fast->slow"].bytes == 25
    assert stats.links["slow->fast"].bytes == 10
    assert stats.links["slow->fast"].seconds > 0
    assert set(stats.links) == {"fast->slow", "slow->fast"}


def test_tiers_are_checked() -> None:
    with pytest.raises(TierStoreError, match="at least one"):
        TieredStore([])
    with pytest.raises(TierStoreError, match="differ"):
        TieredStore([Tier("a", DictBackend()), Tier("a", DictBackend())])
    with pytest.raises(TierStoreError, match=r"'a' needs a tierstore\.Backend, got dict"):
        Tier("a", {})  # type: ignore[arg-type]


def test_a_policy_of_the_user_decides(rig: MakeRig) -> None:
    class Newest(LRU):
        def victims(self) -> Iterator[str]:
            return iter(list(reversed(self._order)))

    with TieredStore([Tier("fast", open_backend("device", "cpu"), 20), Tier("slow", DictBackend())], policy=Newest) as store:
        for key in "abc":
            store.put(key, value(10))
        assert {key: store.tier_of(key) for key in store} == {"a": "fast", "b": "slow", "c": "fast"}


def test_one_tier_that_is_no_memory_works_too() -> None:
    with TieredStore([Tier("only", DictBackend(), 30)]) as store:
        store.put("a", value(10, 1))
        store.put("a", value(10, 2))
        assert torch.equal(store.get("a"), value(10, 2))
        with store.lease("a") as (tensor,):
            tensor.fill_(9)
            with pytest.raises(TierStoreError, match="use put"):  # what was written is a copy
                store.changed("a")
        assert torch.equal(store.get("a"), value(10, 2))


class Elsewhere(MemoryBackend):
    """Memory of a device that is not the one of files."""

    device = torch.device("meta")

    def __init__(self) -> None:
        self._inner = DictBackend()

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._inner.put(key, tensor)

    def get(self, key: str) -> torch.Tensor:
        return self._inner.get(key)

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        return self._inner.entries()

    def adopt(self, key: str, tensor: torch.Tensor) -> None:
        raise AssertionError(f"asked to adopt a tensor on {tensor.device}")

    def allocate(self, key: str, spec: TensorSpec) -> torch.Tensor:
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=self.device)


def test_a_mapped_file_is_not_adopted_by_another_device(tmp_path: Path) -> None:
    with TieredStore([Tier("gpu", Elsewhere(), 20), Tier("disk", open_backend("disk", tmp_path / "d"))]) as store:
        store.fill("big", value(20, 1))
        store.put("w", value(20, 2))
        assert torch.equal(store.get("big"), value(20, 1))


# -- flush and close ---------------------------------------------------------------------------------------------------


def test_flush_writes_everything_down_and_moves_nothing_out(rig: MakeRig) -> None:
    r = rig(20, 20, None)
    for number in range(6):
        r.store.put(str(number), value(10, number))
    before = r.places()
    r.store.flush()
    assert r.places() == before
    assert {key: int(r.slow.get(key)[0]) for key, _ in r.slow.entries()} == {str(number): number for number in range(6)}
    writes = r.faults(2).calls["put"]
    r.store.flush()
    assert r.faults(2).calls["put"] == writes


def test_flush_into_too_small_a_tier_says_so_and_moves_nothing(rig: MakeRig) -> None:
    """The last tier gives up what a faster one has, so writing on would only drop what was just written."""
    r = rig(20, 20)
    for number in range(3):
        r.store.put(str(number), value(10, number))
    writes = r.faults(1).calls["put"]
    with pytest.raises(BudgetError, match=r"flushing needs 30 bytes.*'slow'.* 20 bytes.*close\(flush=False\)"):
        r.store.flush()
    assert r.faults(1).calls["put"] == writes
    r.store.prefetch("0").result(30)
    with pytest.raises(BudgetError):
        r.store.close()
    r.store.prefetch("0").result(30)  # a close that failed leaves a working store
    del r.store["0"]
    r.store.close()
    assert {key for key, _ in r.slow.entries()} == {"1", "2"}


@pytest.mark.parametrize("names", [("device", "disk"), ("device", "zarr"), ("device", "disk", "zarr")])
def test_what_was_closed_is_found_again_in_its_newest_version(tmp_path: Path, names: tuple[str, ...]) -> None:
    def open_store() -> TieredStore:
        files = [Tier(name, open_backend(name, tmp_path / name), 60 if name == "disk" else None) for name in names[1:]]
        return TieredStore([Tier("fast", open_backend("device", "cpu"), 20), *files])

    with open_store() as store:
        for number in range(4):
            store.put(str(number), value(10, number))
        store.flush()
        store.offload(list("0123"))  # so that each tier has a copy that will be outdated
        for number in range(4):
            store.fill(str(number), value(10, number))
            store.offload(str(number))
        for number in range(4):
            with store.lease(str(number)) as (tensor,):
                tensor.fill_(10 + number)
                store.changed(str(number))
        del store["3"]
    for _ in range(2):
        with open_store() as store:
            assert {key: int(store.get(key)[0]) for key in store} == {"0": 10, "1": 11, "2": 12}


def test_close_without_flush_leaves_the_last_tier_as_it_was(rig: MakeRig) -> None:
    r = rig(20, None)
    r.store.put("w", value(10))
    r.store.close(flush=False)
    assert not list(r.slow.entries())


def test_a_with_block_closes_also_after_an_error(rig: MakeRig) -> None:
    r = rig(20, None)

    def fail_inside() -> None:
        with r.store:
            r.store.put("w", value(10))
            r.store.prefetch("w")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert dict(r.slow.entries()).keys() == {"w"}
    with pytest.raises(ClosedError):
        r.store.get("w")


def test_a_store_is_closed_once(rig: MakeRig) -> None:
    r = rig(20, None)
    r.store.put("w", value(10))
    closes: list[int] = []
    r.slow.close = lambda: closes.append(1)  # type: ignore[method-assign]
    assert in_threads(*[r.store.close] * 4) == [None] * 4
    r.store.close()
    assert closes == [1]


AFTER_CLOSE: dict[str, Callable[[TieredStore], object]] = {
    "len": len,
    "iter": list,
    "in": lambda store: "w" in store,
    "get": lambda store: store.get("w"),
    "put": lambda store: store.put("w", value(1)),
    "delete": lambda store: store.__delitem__("w"),
    "lease": lambda store: store.lease("w").__enter__(),
    "changed": lambda store: store.changed("w"),
    "prefetch": lambda store: store.prefetch("w"),
    "offload": lambda store: store.offload("w"),
    "resize": lambda store: store.resize("fast", 5),
    "tier_of": lambda store: store.tier_of("w"),
    "flush": lambda store: store.flush(),
}


@pytest.mark.parametrize("act", AFTER_CLOSE)
def test_a_closed_store_refuses_everything(rig: MakeRig, act: str) -> None:
    r = rig(20, None)
    r.store.put("w", value(10))
    r.store.close()
    with pytest.raises(ClosedError, match="this store is closed; open a new one"):
        AFTER_CLOSE[act](r.store)
    assert r.store.stats().tiers["fast"].budget_bytes == 20  # what happened can still be read


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "halfway"])
@pytest.mark.parametrize("call", ["put", "get"])
def test_a_failed_demotion_loses_nothing(rig: MakeRig, call: str, moment: str) -> None:
    r = rig(10, None)
    r.store.put("dirty", value(10, 1))
    level = 1 if call == "put" else 0
    r.faults(level).arm(call, moment=moment)  # type: ignore[arg-type]
    with pytest.raises(InjectedError):
        r.store.put("new", value(10, 2))
    assert r.places() == {"dirty": "fast"}
    r.check()
    r.store.put("new", value(10, 2))  # neither key is stuck
    assert torch.equal(r.store.get("dirty"), value(10, 1))
    assert torch.equal(r.store.get("new"), value(10, 2))
    r.check()


def test_a_failed_eviction_below_loses_nothing(rig: MakeRig) -> None:
    r = rig(10, 10, None)
    r.store.put("a", value(10, 1))
    r.store.put("b", value(10, 2))
    r.faults(2).arm("put")
    with pytest.raises(InjectedError):
        r.store.put("c", value(10, 3))
    r.store.put("c", value(10, 3))
    assert [int(r.store.get(key)[0]) for key in "abc"] == [1, 2, 3]
    r.check()


def test_a_failed_put_keeps_the_older_value(rig: MakeRig) -> None:
    r = rig(30, None)
    r.store.put("w", value(10, 1))
    for moment in ("before", "halfway"):
        r.faults(0).arm("put", moment=moment)  # type: ignore[arg-type]
        with pytest.raises(InjectedError):
            r.store.put("w", value(12, 2))
        assert torch.equal(r.store.get("w"), value(10, 1))
        r.faults(0).arm("put", moment=moment)  # type: ignore[arg-type]
        with pytest.raises(InjectedError):
            r.store.put("new", value(12, 2))
        assert "new" not in r.store
        r.check()


def test_a_failed_delete_keeps_the_value_and_never_an_older_one(rig: MakeRig) -> None:
    r = rig(30, None)
    r.store.put("w", value(10, 1))
    r.store.flush()
    r.store.put("w", value(10, 2))  # version 1 is below, outdated
    r.faults(1).arm("delete")
    with pytest.raises(InjectedError):
        del r.store["w"]
    assert torch.equal(r.store.get("w"), value(10, 2))
    r.faults(0).arm("delete")
    with pytest.raises(InjectedError):
        del r.store["w"]
    assert torch.equal(r.store.get("w"), value(10, 2))
    assert not list(r.slow.entries())
    del r.store["w"]
    r.check()


def test_an_outdated_copy_that_resists_deletion_is_counted_and_tried_again(rig: MakeRig) -> None:
    r = rig(10, 10, None)
    r.store.put("w", value(10, 1))
    r.store.offload("w")
    r.store.get("w")
    assert dict(r.store.tiers[1].backend.entries()).keys() == {"w"}
    r.faults(1).arm("delete")
    with r.store.lease("w") as (tensor,):
        tensor.fill_(2)
        r.store.changed("w")  # the new value is there, so this cannot fail
    assert r.used("mid") == 10
    r.check()
    r.store.put("other", value(10))
    assert torch.equal(r.store.get("w"), value(10, 2))
    r.check()


def test_a_failed_flush_can_be_repeated(rig: MakeRig) -> None:
    r = rig(30, None)
    for key in "abc":
        r.store.put(key, value(10))
    r.faults(1).arm("put", 2)
    with pytest.raises(InjectedError):
        r.store.flush()
    r.check()
    r.store.flush()
    assert dict(r.slow.entries()).keys() == set("abc")


def test_a_failed_prefetch_is_told_by_its_future(rig: MakeRig) -> None:
    r = rig(30, None)
    r.store.put("a", value(10))
    r.store.offload("a")
    r.faults(1).arm("get")
    with pytest.raises(InjectedError):
        r.store.prefetch("a").result(30)
    r.store.prefetch("a").result(30)
    assert r.store.tier_of("a") == "fast"
    r.check()


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
    for act in (r.store.get, r.store.tier_of, r.store.spec_of):
        with pytest.raises(MissingKeyError):
            act("new")
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
