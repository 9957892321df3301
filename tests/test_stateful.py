"""Random operations on a store and a plain dict at once, over every kind of tiers, with failing backends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tierstore.testing.stateful import POLICIES, VARIANTS, StoreMachine, drive
from tierstore.testing.values import make_value
from tierstore.tier import Tier
from tierstore.writing import Moves

# examples of 40 steps; the rest of the default run is left to `drive`, which does ten times as many steps a second
EXAMPLES = {
    "memory_only": 50, "three_memories": 50, "disk_last": 30, "bounded_disk": 30, "zarr_last": 10, "disk_over_zarr": 10,
    "compressed_memory": 20, "compressed_last": 20, "remote_last": 10,
}  # fmt: skip
DRIVEN = {
    "memory_only": 4000, "three_memories": 4000, "disk_last": 1500, "bounded_disk": 1500, "zarr_last": 500, "disk_over_zarr": 500,
    "compressed_memory": 1500, "compressed_last": 1500, "remote_last": 1000,
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_store_is_a_dict(variant: str) -> None:
    class Machine(StoreMachine):
        make_tiers = staticmethod(VARIANTS[variant])

    fixed = settings(
        max_examples=EXAMPLES[variant],
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=fixed)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_driven_store_is_a_dict(variant: str, policy: str) -> None:
    driven = drive(DRIVEN[variant], seed=1, make_tiers=VARIANTS[variant], policy=policy)
    assert driven.steps == DRIVEN[variant]
    assert driven.evictions > driven.steps / 40, f"budgets too wide for anything to move: {driven}"
    assert bool(driven.outcomes["foreseen"]) is (policy == "auto")
    for outcome in ("put", "put failed", "get", "get missing", "lease", "write", "delete", "offload", "prefetch", "flush"):
        assert driven.outcomes[outcome], f"{outcome!r} never happened: {driven}"


def test_a_drive_repeats_from_its_seed() -> None:
    first, second = (drive(400, seed=7) for _ in range(2))
    assert first.outcomes == second.outcomes
    assert first.evictions == second.evictions


def test_a_lost_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine itself must be able to fail, and then say where."""
    monkeypatch.setattr(Moves, "_write_in_place", lambda moves, entry, tensor: None)
    with pytest.raises(AssertionError, match=r"step \d+ of seed 0 over memory_only: .*other bits"):
        drive(5000, seed=0)


def test_it_runs_from_the_command_line() -> None:
    command = [sys.executable, "-m", "tierstore.testing.stateful", "--steps", "300", "--seed", "3", "--variant", "three_memories"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, cwd=Path(__file__).parents[1])
    printed = [line.partition(" steps")[0] for line in done.stdout.splitlines()]
    assert printed == [f"three_memories under {policy}: 150" for policy in POLICIES]


@pytest.mark.stress
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_million_steps(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A million in all; TIERSTORE_STEPS and TIERSTORE_SEED change how many, and which."""
    total = int(os.environ.get("TIERSTORE_STEPS", "1000000"))
    driven = drive(total // len(VARIANTS), int(os.environ.get("TIERSTORE_SEED", "0")), VARIANTS[variant])
    with capsys.disabled():
        sys.stdout.write(f"\n{variant}: {driven}\n")


def test_a_ledger_that_keeps_what_compression_saved_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tier, "written", lambda tier, key, reserved: None)
    with pytest.raises(AssertionError, match=r"over compressed_memory: ram: the ledger says"):
        drive(500, seed=0, make_tiers=VARIANTS["compressed_memory"])


def test_compressed_variants_compress(tmp_path: Path) -> None:
    """Random bits would all be kept as they are, and the sizes that differ never be met."""
    tiers = VARIANTS["compressed_memory"](tmp_path)
    for seed in range(20):
        tiers[1].backend.put(str(seed), make_value(size=30, seed=seed, sparse=seed % 2 == 0))
    raw = sum(spec.nbytes for _, spec in tiers[1].backend.entries())
    assert raw / 3 < tiers[1].held_bytes() < 0.9 * raw
    for tier in tiers:
        tier.backend.close()
