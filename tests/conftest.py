"""Fixtures for all tests: small stores, and a look whether anything was left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rigs import MakeRig, Rig, Slow
from tierstore.backend import Backend
from tierstore.registry import open_backend
from tierstore.store import TieredStore
from tierstore.testing import Faults, wrap
from tierstore.testing.faults import Interference
from tierstore.tier import Tier


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith("tierstore")]
    for thread in left:
        thread.join(10)  # those of a pool that was collected end by themselves, but not at once
    left = [t for t in left if t.is_alive()]
    assert not left, f"threads left behind: {left}"


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory for the disk tier; must be empty again afterwards."""
    place = tmp_path / "scratch"
    place.mkdir()
    yield place
    left = [path for path in place.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert not left, f"files left behind: {left}"


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
