"""Eviction order, and the arithmetic on used bytes."""

from __future__ import annotations

import random

import pytest

from tierstore.errors import TierStoreError
from tierstore.ledger import Ledger
from tierstore.planning.classic import LRU
from tierstore.planning.names import policy_factory
from tierstore.testing import check_policy


@pytest.mark.parametrize("name", ["auto", "lru"])
def test_named_policies_keep_the_contract(name: str) -> None:
    check_policy(policy_factory(name))


def test_lru_evicts_what_was_used_longest_ago() -> None:
    policy = LRU()
    for key in "abc":
        policy.insert(key, 1)
    assert list(policy.victims()) == ["a", "b", "c"]
    policy.access("a")
    assert list(policy.victims()) == ["b", "c", "a"]
    policy.insert("b", 2)  # came back with a new value
    assert list(policy.victims()) == ["c", "a", "b"]
    policy.remove("a")
    assert list(policy.victims()) == ["c", "b"]


def test_a_policy_can_be_a_class_of_the_user() -> None:
    class Mine(LRU):
        pass

    assert policy_factory(Mine) is Mine
    assert policy_factory("lru")() is not policy_factory("lru")()


def test_an_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(TierStoreError, match=r"'clock'.*'lru'.*callable"):
        policy_factory("clock")


def test_a_reservation_is_taken_whole_or_not_at_all() -> None:
    ledger = Ledger(100)
    assert ledger.reserve(60)
    assert not ledger.reserve(41)
    assert ledger.used == 60
    assert ledger.reserve(40)
    assert ledger.used == 100
    assert ledger.reserve(0)
    assert not ledger.reserve(1)


def test_peak_is_the_highest_use_ever() -> None:
    ledger = Ledger(100)
    ledger.reserve(70)
    ledger.release(70)
    ledger.reserve(30)
    ledger.reserve(500)
    assert (ledger.used, ledger.peak) == (30, 70)


def test_without_a_budget_everything_fits() -> None:
    ledger = Ledger(None)
    assert ledger.fits(1 << 60)
    assert ledger.reserve(1 << 60)


def test_fits_is_about_an_empty_tier() -> None:
    ledger = Ledger(100)
    ledger.reserve(100)
    assert ledger.fits(100)
    assert not ledger.fits(101)


@pytest.mark.parametrize("nbytes", [-1, 11])
def test_a_wrong_release_is_caught(nbytes: int) -> None:
    ledger = Ledger(100)
    ledger.reserve(10)
    with pytest.raises(AssertionError):
        ledger.release(nbytes)


def test_random_reservations_never_exceed_the_budget() -> None:
    rng, ledger, taken, highest = random.Random(0), Ledger(1000), [], 0
    for _ in range(5000):
        if taken and rng.random() < 0.5:
            ledger.release(taken.pop(rng.randrange(len(taken))))
        else:
            nbytes = rng.randrange(400)
            fits = sum(taken) + nbytes <= 1000
            assert ledger.reserve(nbytes) is fits
            taken += [nbytes] * fits
        highest = max(highest, sum(taken))
        assert ledger.used == sum(taken) <= 1000
        assert ledger.peak == highest
