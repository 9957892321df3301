"""What a user of `TieredStore` sees: values, counters, what is found again.

Sizes here are bytes of uint8 tensors, so that budgets can be read off the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.rigs import MakeRig, in_threads, value
from tests.samples import all_samples, assert_identical
from tierstore.backend import MemoryBackend
from tierstore.errors import BudgetError, ClosedError, MissingKeyError, TierStoreError, UnsupportedTensorError
from tierstore.planning.classic import LRU
from tierstore.registry import open_backend
from tierstore.spec import TensorSpec
from tierstore.store import TieredStore
from tierstore.testing import DictBackend
from tierstore.tier import Tier

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:ComplexHalf")]


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

    def allocate(self, key: str, spec: TensorSpec, phase: int = 0) -> torch.Tensor:
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
