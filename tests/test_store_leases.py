"""What is leased stays, and what fails loses nothing.

Sizes here are bytes of uint8 tensors, so that budgets can be read off the numbers.
"""

from __future__ import annotations

import pytest
import torch

from tests.rigs import MakeRig, value
from tierstore.errors import BudgetError, TierStoreError
from tierstore.testing import InjectedError

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:ComplexHalf")]


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


def test_the_short_way_to_a_lease_takes_all_or_none_and_moves_nothing(rig: MakeRig) -> None:
    r = rig(30, None)
    moves = r.store.moves
    for number, key in enumerate("abcd"):
        r.store.put(key, value(10, number))
    entries = [moves.entries[key] for key in "bcd"]
    hits, copies = moves.counters.hits, len(moves.timeline._copies)
    with moves.lock:
        assert not moves.lease_resident([moves.entries["a"], *entries], 0), "a was written down"
        assert not moves.lease_resident(entries, 1), "nothing would be left free of leases"
        assert moves.leased_bytes == 0
        assert moves.lease_resident(entries, 0)
        assert moves.lease_resident(entries[:1], 0), "what has a lease takes no more room"
        assert moves.leased_bytes == 30
        assert not moves.lease_unnoticed([moves.entries["a"]])
        moves.release(entries)
        moves.release(entries[:1])
        assert moves.leased_bytes == 0
    assert moves.counters.hits == hits + 4
    assert len(moves.timeline._copies) == copies
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
