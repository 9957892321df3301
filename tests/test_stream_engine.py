"""The engine for accelerators piece by piece: overlap, slabs, failures, references, threads and the end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.test_streams import Run, mixed_work, random_run, value
from tierstore import checksum, flights
from tierstore.errors import CorruptionError
from tierstore.open_file import PAGE
from tierstore.registry import open_backend
from tierstore.store import TieredStore
from tierstore.testing import Faults, InjectedError, wrap
from tierstore.testing.fake_backends import FakeMemory, FakeRam, FakeSlow
from tierstore.testing.fake_device import FakeDevice, FakeStream
from tierstore.testing.stepped import SteppedEngine, Watch
from tierstore.tier import Tier
from tierstore.transfer import staging
from tierstore.transfer.streams import StreamEngine, engine_for
from tierstore.transfer.threads import ThreadEngine

# -- overlap, by the device's time -----------------------------------------------------------------------------------------


class Timed:
    """Passes over equal blocks by a host that puts everything in and waits for nothing; one block computes for a second."""

    def __init__(self, place: Path, chain: str, count: int, room: int, seconds_each: float) -> None:
        sizes = {f"b{i}": 64 for i in range(count)}
        self.run = Run(place, 0, chain, sizes, [room * 64, 10**6], "auto", punctual=True, bandwidth=64 / seconds_each)

    def passes(self, count: int) -> float:
        """Return the seconds of the device for so many passes."""
        fake, engine = self.run.fake, self.run.engine
        before = fake.default.free_at
        for _ in range(count):
            for key in self.run.expected:
                with self.run.store.lease(key):
                    fake.default.compute(1.0)
                engine.run("issue", "copy", "read")
        return fake.default.free_at - before


@pytest.mark.parametrize("chain", ["ram", "slow", "disk"])
@pytest.mark.parametrize(("room", "seconds_each"), [(20, 1.0), (10, 1.0), (30, 2.0), (30, 4.0), (3, 0.5), (36, 8.0), (3, 2.0)])
def test_copies_run_beside_computations(
    chain: str, room: int, seconds_each: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass takes the longer of computing and copying, although the host is far ahead of the device all the time."""
    monkeypatch.setattr(flights, "_MUCH", 0)  # as if each block were large
    timed = Timed(tmp_path, chain, 40, room, seconds_each)
    timed.passes(8)
    before = sum(link.bytes for link in timed.run.store.stats().links.values())
    took = timed.passes(6) / 6
    timed.run.engine.run("watch")
    moved = (sum(link.bytes for link in timed.run.store.stats().links.values()) - before) / 64
    assert took <= 1.05 * max(40, (40 - room + 2) * seconds_each)
    assert moved > 0
    timed.run.close()


def test_what_computations_wait_for_is_measured_on_the_device(tmp_path: Path) -> None:
    timed = Timed(tmp_path, "ram", 10, 2, 4.0)
    took = timed.passes(5)
    fake = timed.run.fake
    assert timed.run.store.stats().stall_seconds < 0.5, "what has not ended does not count yet"
    fake.now = fake.default.free_at
    assert timed.run.store.stats().stall_seconds == pytest.approx(took - 50, abs=0.5)  # and the host's own milliseconds
    timed.run.close()


# -- slabs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SLAB_BYTES", 16)
    monkeypatch.setattr(staging, "SLABS", 3)
    monkeypatch.setattr(checksum, "PIECE", 16)  # a slab is read and checked at one go


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("chain", ["disk", "ram, disk"])
def test_values_larger_than_a_slab_come_in_chunks(chain: str, seed: int, tmp_path: Path) -> None:
    run = random_run(tmp_path, seed, chain, "auto" if seed % 2 else "lru")
    run.streams.append(run.fake.side_stream("side"))
    mixed_work(run)
    run.close()


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("nbytes", [0, 1, 15, 16, 17, 48, 100])
def test_chunks_cover_every_byte(nbytes: int, tmp_path: Path) -> None:
    run = Run(tmp_path, 0, "disk", {"k": nbytes}, [1000], "lru")
    content = torch.arange(nbytes, dtype=torch.uint8)
    run.store.put("k", content)
    run.store.offload(["k"])
    assert torch.equal(run.store.get("k"), content)
    assert run.fake.ram.allocated == 3 * (16 + PAGE), "each slab has room for bytes that begin anywhere in a page of their file"
    run.close()


@pytest.mark.usefixtures("small_slabs")
def test_a_damaged_file_is_an_error_that_names_the_key_and_takes_no_memory(tmp_path: Path) -> None:
    run = Run(tmp_path, 0, "disk", {"k": 200, "other": 100}, [1000], "lru")
    extent = run.store.tiers[1].backend.extent("k")  # type: ignore[attr-defined]
    with Path(f"/proc/self/fd/{extent.file.fileno()}").open("r+b") as file:
        file.seek(extent.offset + 100)
        file.write(b"\xff")
    with pytest.raises(CorruptionError, match="'k'"):
        run.store.get("k")
    run.use("other")
    run.store.moves.settle()
    assert run.fake.memory.allocated == 100
    run.store.close(flush=False)
    run.fake.accesses.check()


# -- failures, and what is referred to ----------------------------------------------------------------------------------


def failing_store(fake: FakeDevice, level: int, bottom: str = "ram") -> tuple[TieredStore, Faults]:
    """Two tiers, of which one fails on demand; "k" lies in the lower one."""
    lower = FakeRam(fake) if bottom == "ram" else FakeSlow(fake)
    lower.put("k", value("k", 100))
    tiers = [Tier("gpu", FakeMemory(fake), 1000), Tier("low", lower)]
    faults = Faults()
    tiers[level].backend = wrap(tiers[level].backend, faults)
    return TieredStore(tiers, "lru", SteppedEngine(fake)), faults


@pytest.mark.parametrize(("level", "call", "bottom"), [(0, "adopt", "ram"), (0, "adopt", "slow"), (1, "get", "slow")])
def test_a_fetch_that_fails_leaves_nothing_and_can_be_tried_again(level: int, call: str, bottom: str) -> None:
    fake = FakeDevice()
    store, faults = failing_store(fake, level, bottom)
    faults.arm_if(lambda kind, key: kind == call)
    with pytest.raises(InjectedError):
        store.get("k")
    store.moves.settle()
    assert fake.memory.allocated == store.tiers[0].ledger.used == 0
    faults.disarm()
    assert torch.equal(store.get("k"), value("k", 100))
    store.close()
    fake.accesses.check()


def test_a_fetch_without_memory_fails_and_can_be_tried_again() -> None:
    fake = FakeDevice(capacity=50)
    store, _ = failing_store(fake, 0)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            store.get("k")
    assert store.tiers[0].ledger.used == 0
    fake.memory.capacity = 100
    assert torch.equal(store.get("k"), value("k", 100))
    store.close()


def test_a_source_is_kept_until_its_copy_has_ended_and_no_longer() -> None:
    gc.disable()
    try:
        fake = FakeDevice(punctual=True)
        store, _ = failing_store(fake, 0)
        storage = StorageWeakRef(store.tiers[1].backend.get("k").untyped_storage())
        gone: list[bool] = []
        landed = store.moves._landed
        store.moves._landed = lambda flight, error: (gone.append(storage.expired()), landed(flight, error))  # type: ignore[assignment, func-returns-value]
        store.get("k")
        store.put("k", value("k", 100, 1))  # the old copy below is deleted at once
        assert not storage.expired()
        store.moves.settle()
        assert gone == [True], "whoever is told that a copy has ended may need the memory of its source"
        store.close()
        fake.accesses.check()
    finally:
        gc.enable()


def test_memory_of_a_value_that_leaves_is_free_at_once_whatever_is_under_way() -> None:
    fake = FakeDevice(punctual=True)
    store, _ = failing_store(fake, 0)
    with store.moves.lock:
        store.moves.fetch(store.moves.entry("k"))
    assert fake.memory.allocated == 100
    store.offload("k")
    assert fake.memory.allocated == 0
    activation = fake.allocate(100)
    fake.use(activation, "an activation", writes=True)
    fake.accesses.check()
    del activation
    store.close()


# -- threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bottom", [FakeRam, FakeSlow])
@pytest.mark.parametrize("policy", ["lru", "auto"])
def test_threads_compute_on_streams_of_their_own(policy: str, bottom: Callable[[FakeDevice], FakeRam | FakeSlow]) -> None:
    fake = FakeDevice(1)
    low = bottom(fake)
    keys = [f"k{i}" for i in range(20)]
    for key in keys:
        low.put(key, value(key, 100))
    store = TieredStore([Tier("gpu", FakeMemory(fake), 1000), Tier("low", low)], policy, StreamEngine(fake))
    Watch(store.moves, fake)
    wrong: list[str] = []

    def work(stream: FakeStream) -> None:
        with fake.on(stream):
            for turn in range(60):
                key = keys[(turn * 3 + len(stream.agent.name)) % 20] if turn % 3 else keys[turn % 20]
                with store.lease(key) as (tensor,):
                    if not torch.equal(tensor, value(key, 100)):
                        wrong.append(key)
                    activation = fake.allocate(60)
                    fake.use(activation, "an activation", writes=True)
                    activation.zero_()
                    del activation
                if turn % 7 == 0:
                    store.prefetch(keys[turn % 20])

    threads = [threading.Thread(target=work, args=(fake.side_stream("s" * n),)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.moves.settle()
    assert not wrong
    store.close()
    fake.accesses.check()
    assert fake.memory.allocated == 0


# -- which engine ---------------------------------------------------------------------------------------------------------


def test_memory_of_the_cpu_needs_no_streams() -> None:
    for backend in (open_backend("device", "cpu"), FakeSlow(FakeDevice())):
        engine = engine_for(backend)
        assert type(engine) is ThreadEngine
        engine.close()
