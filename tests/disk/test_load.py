"""Eight threads and four processes on one durable store: linearizable, nothing leaked; ten minutes of it with `-m stress`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.disk.load import Load
from tierstore import Tier, TieredStore
from tierstore.backends.disk import DiskBackend
from tierstore.backends.memory import DeviceBackend

TEN_MINUTES = pytest.param(600, marks=[pytest.mark.stress, pytest.mark.timeout(3600)])
MOST_GROWTH = 16 << 20  # bytes, in the last third of ten minutes


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("seconds", [0, TEN_MINUTES])
@pytest.mark.parametrize("memory", [True, False])
def test_load(memory: bool, seconds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    disk = Tier("disk", DiskBackend(tmp_path / "store"), None)
    tiers = [Tier("cpu", DeviceBackend("cpu"), 700_000), disk] if memory else [disk]
    outcome = Load(TieredStore(tiers), tmp_path / "store", tmp_path / "logs", durable=not memory).run(seconds, operations=1500)
    with capsys.disabled():
        sys.stdout.write(f"\n{'RAM over a disk' if memory else 'a disk alone'}, {seconds} s or more: {outcome}\n")
    assert outcome.problems == []
    assert outcome.reads_elsewhere > 20
    assert not memory or (outcome.evictions > 20 and outcome.flushes > 3)
    assert outcome.growth <= MOST_GROWTH


class Forgetful(DiskBackend):
    """Returns now and then what it had returned before."""

    calls = 0

    def get(self, key: str) -> torch.Tensor:
        kept: dict[str, torch.Tensor] = self.__dict__.setdefault("kept", {})
        self.calls += 1
        if self.calls % 3 or key not in kept:
            kept[key] = super().get(key)
        return kept[key]


@pytest.mark.usefixtures("fork_server")
def test_a_store_that_forgets_is_found(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    store = TieredStore([Tier("disk", Forgetful(tmp_path / "store"), None)])
    outcome = Load(store, tmp_path / "store", tmp_path / "logs", durable=True).run(0, operations=1000)
    assert any("shared/" in problem or "own/" in problem for problem in outcome.problems)
