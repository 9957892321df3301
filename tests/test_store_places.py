"""Which tier holds what, who leaves, and what does not fit.

Sizes here are bytes of uint8 tensors, so that budgets can be read off the numbers.
"""

from __future__ import annotations

import pytest
import torch

from tests.rigs import MakeRig, Slow, in_threads, value
from tierstore.errors import BudgetError, TierStoreError
from tierstore.registry import open_backend
from tierstore.store import TieredStore
from tierstore.tier import Tier

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:ComplexHalf")]


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
