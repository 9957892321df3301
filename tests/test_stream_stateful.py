"""Random operations with failing backends, a store on a fake device against a plain dict, with every access ordered."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.test_streams import WatchedDisk
from tierstore.store import TieredStore
from tierstore.testing.fake_backends import FakeMemory, FakeRam, FakeSlow
from tierstore.testing.fake_device import FakeDevice
from tierstore.testing.stateful import POLICIES, drive
from tierstore.testing.stepped import SteppedEngine, Watch
from tierstore.tier import Tier


class OnDevice:
    """Makes stores on one fake device."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.fake = FakeDevice(seed)
        self.slow = FakeSlow(self.fake)  # found again by the next store

    def ram_last(self, directory: Path) -> list[Tier]:
        return [Tier("gpu", FakeMemory(self.fake), 900), Tier("cpu", FakeRam(self.fake), 3000)]

    def ram_between(self, directory: Path) -> list[Tier]:
        return [Tier("gpu", FakeMemory(self.fake), 900), Tier("cpu", FakeRam(self.fake), 1200), Tier("far", self.slow)]

    def disk_below(self, directory: Path) -> list[Tier]:
        disk = WatchedDisk(directory / "disk")
        disk.fake = self.fake
        return [Tier("gpu", FakeMemory(self.fake), 1200), Tier("disk", disk)]

    def store(self, tiers: Sequence[Tier], policy: str) -> TieredStore:
        store = TieredStore(tiers, policy, SteppedEngine(self.fake, self.seed))
        Watch(store.moves, self.fake)
        return store


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("variant", "steps"), [("ram_last", 3000), ("ram_between", 3000), ("disk_below", 1000)])
def test_a_store_on_a_device_is_a_dict(variant: str, steps: int, policy: str) -> None:
    made = OnDevice(seed=1)
    driven = drive(steps, 1, getattr(made, variant), policy, made.store)
    assert driven.evictions > steps / 40
    for outcome in ("put", "put failed", "get", "get failed", "lease", "write", "delete", "offload", "prefetch", "flush"):
        assert driven.outcomes[outcome], f"{outcome!r} never happened: {driven}"
    made.fake.accesses.check()
    gc.collect()
    assert made.fake.memory.allocated == 0
