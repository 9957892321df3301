"""Drives a store and a plain dict at random: as a hypothesis state machine, or by a plain generator for millions of steps.

    python -m tierstore.testing.stateful --steps 1000000 --seed 0

prints what was tried on each set of tiers.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tierstore.registry import open_backend
from tierstore.store import TieredStore
from tierstore.testing.faults import Call, Moment
from tierstore.testing.twin import MakeStore, MakeTiers, Twin
from tierstore.testing.values import LAYOUTS, make_value
from tierstore.tier import Tier

KEYS = ("a", "b", "c", "d", "e", "f", "layers.0.weight", "../odd key", "\u00fc/\U0001f9ca", "A")
DTYPES = (torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e5m2, torch.int64)
CALLS: tuple[Call, ...] = ("put", "get", "delete", "adopt")
MOMENTS: tuple[Moment, ...] = ("before", "halfway")
BUDGETS = (0, 600, 900, 900, 1200, 1200, 1500)
POLICIES = ("lru", "auto")
MOST_LEASES = 3  # at once: more would leave nothing to evict
TOO_LARGE = 1500  # elements of the main dimension: more than a bounded tier here takes


def memory_only(directory: Path) -> list[Tier]:
    """Two memory tiers with little room below."""
    return [Tier("gpu", open_backend("device", "cpu"), 1200), Tier("cpu", open_backend("pinned"), 3000)]


def three_memories(directory: Path) -> list[Tier]:
    """Three memory tiers, the last without limit."""
    far = open_backend("device", "cpu")
    return [Tier("gpu", open_backend("device", "cpu"), 900), Tier("cpu", open_backend("pinned"), 1200), Tier("far", far)]


def disk_last(directory: Path) -> list[Tier]:
    """Memory over an unlimited disk."""
    return [Tier("cpu", open_backend("device", "cpu"), 1200), Tier("disk", open_backend("disk", directory / "disk"))]


def bounded_disk(directory: Path) -> list[Tier]:
    """Three tiers that can all be full."""
    disk = open_backend("disk", directory / "disk")
    return [Tier("gpu", open_backend("device", "cpu"), 900), Tier("cpu", open_backend("pinned"), 1200), Tier("disk", disk, 3500)]


def zarr_last(directory: Path) -> list[Tier]:
    """Memory over an unlimited zarr group."""
    return [Tier("cpu", open_backend("device", "cpu"), 1200), Tier("zarr", open_backend("zarr", directory / "zarr"))]


def disk_over_zarr(directory: Path) -> list[Tier]:
    """Two persistent tiers, of which the faster one must never bring an outdated value back."""
    disk, zarr = open_backend("disk", directory / "disk"), open_backend("zarr", directory / "zarr")
    return [Tier("cpu", open_backend("device", "cpu"), 900), Tier("disk", disk, 1500), Tier("zarr", zarr)]


def compressed_memory(directory: Path) -> list[Tier]:
    """Memory over compressed memory that can be full, over a disk."""
    ram = open_backend("compressed", open_backend("device", "cpu"), codec="zstd")
    disk = open_backend("disk", directory / "disk")
    return [Tier("gpu", open_backend("device", "cpu"), 900), Tier("ram", ram, 1200), Tier("disk", disk)]


def compressed_last(directory: Path) -> list[Tier]:
    """Memory over a compressed disk that can be full."""
    disk = open_backend("compressed", open_backend("disk", directory / "disk"), codec="zstd")
    return [Tier("cpu", open_backend("device", "cpu"), 900), Tier("disk", disk, 2500)]


def remote_last(directory: Path) -> list[Tier]:
    """Memory and a disk, its cache, over a remote tier."""
    remote = open_backend("remote", f"file://{directory}/remote")
    return [
        Tier("cpu", open_backend("device", "cpu"), 900),
        Tier("disk", open_backend("disk", directory / "disk"), 1500),
        Tier("remote", remote),
    ]


VARIANTS: dict[str, MakeTiers] = {
    make.__name__: make
    for make in (
        memory_only,
        three_memories,
        disk_last,
        bounded_disk,
        zarr_last,
        disk_over_zarr,
        compressed_memory,
        compressed_last,
        remote_last,
    )
}

_keys = st.sampled_from(KEYS)
_some_keys = st.lists(_keys, max_size=4)
_sizes = st.one_of(st.integers(0, 30), st.sampled_from((50, 100, TOO_LARGE)))
_tensors = st.builds(make_value, st.sampled_from(DTYPES), st.sampled_from(tuple(LAYOUTS)), _sizes, st.integers(0, 99), st.booleans())


class StoreMachine(RuleBasedStateMachine):
    """A store against a dict. Set `make_tiers` in a subclass: `make_tiers = staticmethod(disk_last)`."""

    make_tiers: ClassVar[MakeTiers]

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory(prefix="tierstore-stateful-")
        self.twin = Twin(type(self).make_tiers, Path(self._directory.name))

    def _holds(self) -> bool:
        return bool(self.twin.held)

    @rule(key=_keys, tensor=_tensors, fill=st.booleans())
    def put(self, key: str, tensor: torch.Tensor, fill: bool) -> None:
        self.twin.put(key, tensor, fill=fill)

    @rule(key=_keys, seed=st.integers(0, 99))
    def put_like(self, key: str, seed: int) -> None:
        self.twin.put_like(key, seed)

    @rule(key=_keys)
    def get(self, key: str) -> None:
        self.twin.get(key)

    @rule()
    def scan(self) -> None:
        self.twin.scan(KEYS)

    @rule(key=_keys)
    def delete(self, key: str) -> None:
        self.twin.delete(key)

    @precondition(lambda self: len(self.twin.held) < MOST_LEASES)
    @rule(keys=_some_keys)
    def lease(self, keys: list[str]) -> None:
        self.twin.lease(keys)

    @precondition(_holds)
    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        self.twin.release(number)

    @precondition(_holds)
    @rule(number=st.integers(0, 9), seed=st.integers(0, 99))
    def write(self, number: int, seed: int) -> None:
        self.twin.write(number, seed)

    @rule(keys=_some_keys)
    def prefetch(self, keys: list[str]) -> None:
        self.twin.prefetch(keys)

    @rule(keys=_some_keys)
    def offload(self, keys: list[str]) -> None:
        self.twin.offload(keys)

    @rule()
    def flush(self) -> None:
        self.twin.flush()

    @rule(level=st.integers(0, 1), budget=st.sampled_from(BUDGETS))
    def resize(self, level: int, budget: int) -> None:
        self.twin.resize(level, budget)

    @precondition(lambda self: self.twin.persistent)
    @rule()
    def reopen(self) -> None:
        self.twin.reopen()

    @rule(level=st.integers(0, 2), call=st.sampled_from(CALLS), nth=st.integers(1, 3), moment=st.sampled_from(MOMENTS))
    def arm(self, level: int, call: Call, nth: int, moment: Moment) -> None:
        self.twin.arm(level, call, nth, moment)

    @rule()
    def check_values(self) -> None:
        self.twin.check_values()

    @invariant()
    def agrees(self) -> None:
        self.twin.check()

    def teardown(self) -> None:
        try:
            self.twin.close()
        finally:
            self.twin.store.close(flush=False)
            self._directory.cleanup()


def _random_keys(rng: random.Random) -> list[str]:
    return rng.choices(KEYS, k=rng.randrange(5))


def _random_tensor(rng: random.Random) -> torch.Tensor:
    size = TOO_LARGE if rng.random() < 0.02 else rng.randrange(rng.choice((4, 20, 60)))
    return make_value(rng.choice(DTYPES), rng.choice(tuple(LAYOUTS)), size, rng.randrange(1 << 20), rng.random() < 0.4)


# how often, and what; the same operations as the rules of StoreMachine
_ACTIONS: tuple[tuple[int, Callable[[Twin, random.Random], None]], ...] = (
    (20, lambda twin, rng: twin.put(rng.choice(KEYS), _random_tensor(rng), fill=rng.random() < 0.2)),
    (8, lambda twin, rng: twin.put_like(rng.choice(KEYS), rng.randrange(1 << 20))),
    (30, lambda twin, rng: twin.get(rng.choice(KEYS))),
    (2, lambda twin, rng: twin.scan(KEYS)),
    (3, lambda twin, rng: twin.delete(rng.choice(KEYS))),
    (12, lambda twin, rng: twin.lease(_random_keys(rng)) if len(twin.held) < MOST_LEASES else twin.release(rng.randrange(9))),
    (18, lambda twin, rng: twin.release(rng.randrange(9)) if twin.held else None),
    (8, lambda twin, rng: twin.write(rng.randrange(9), rng.randrange(1 << 20)) if twin.held else None),
    (4, lambda twin, rng: twin.prefetch(_random_keys(rng))),
    (4, lambda twin, rng: twin.offload(_random_keys(rng))),
    (1, lambda twin, rng: twin.flush()),
    (2, lambda twin, rng: twin.resize(rng.randrange(len(twin.store.tiers)), rng.choice(BUDGETS))),
    (1, lambda twin, rng: twin.reopen()),
    (6, lambda twin, rng: twin.arm(rng.randrange(3), rng.choice(CALLS), rng.randrange(1, 4), rng.choice(MOMENTS))),
    (1, lambda twin, rng: twin.check_values()),
)
_WEIGHTS = [weight for weight, _ in _ACTIONS]


@dataclass(frozen=True)
class Driven:
    """What `drive` has tried: how often each outcome came, and how many copies left the fastest tier."""

    steps: int
    seconds: float
    outcomes: Counter[str]
    evictions: int

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        return f"{self.steps} steps in {self.seconds:.1f} s ({self.steps / self.seconds:.0f}/s), {self.evictions} evictions; {counts}"


def drive(steps: int, seed: int, make_tiers: MakeTiers = memory_only, policy: str = "lru", make_store: MakeStore = TieredStore) -> Driven:
    """Do `steps` random operations on a store, checking after each; raise `AssertionError` with the step."""
    rng, started = random.Random(seed), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tierstore-drive-") as directory:
        twin = Twin(make_tiers, Path(directory), policy, make_store)
        try:
            for key in KEYS:
                twin.put(key, _random_tensor(rng))
            evictions = sum(_step(twin, rng, f"step {step} of seed {seed} over {make_tiers.__name__}") for step in range(steps))
            twin.close()
        finally:
            twin.store.close(flush=False)
    return Driven(steps, time.perf_counter() - started, twin.outcomes, evictions)


def _step(twin: Twin, rng: random.Random, name: str) -> int:
    """Do one random operation and return how many evictions it took."""
    store, before = twin.store, twin.store.moves.counters.evictions
    try:
        rng.choices(_ACTIONS, _WEIGHTS)[0][1](twin, rng)
        twin.check()
    except Exception as error:
        raise AssertionError(f"{name}: {error}") from error
    return store.moves.counters.evictions - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="steps in all, shared out among the variants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=sorted(VARIANTS), action="append", help="default: all of them")
    options = parser.parse_args()
    variants = options.variant or list(VARIANTS)
    for name in variants:
        for policy in POLICIES:
            driven = drive(options.steps // len(variants) // len(POLICIES), options.seed, VARIANTS[name], policy)
            sys.stdout.write(f"{name} under {policy}: {driven}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
