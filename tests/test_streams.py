"""The engine for accelerators over a fake device: whatever moves while something computes, values are right and every access is ordered."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tierstore.backend import Backend
from tierstore.backends.disk import DiskBackend
from tierstore.backends.scratch import ScratchBackend
from tierstore.planning.lane import Lane
from tierstore.planning.plan import Cost
from tierstore.planning.schedule import Schedule
from tierstore.spec import TensorSpec
from tierstore.store import TieredStore
from tierstore.testing.fake_backends import FakeMemory, FakeRam, FakeSlow
from tierstore.testing.fake_device import FakeDevice, FakeEvent, FakeStream
from tierstore.testing.stepped import SteppedEngine, Watch
from tierstore.tier import Tier
from tierstore.transfer.accelerator import Event, Stream
from tierstore.transfer.engine import Transfer
from tierstore.transfer.order import StreamOrder
from tierstore.transfer.staging import Staging
from tierstore.transfer.streams import StreamEngine
from tierstore.transfer.upload import Arrival, Landing, Uploads


def value(key: str, nbytes: int, version: int = 0) -> torch.Tensor:
    return torch.full((nbytes,), (sum(map(ord, key)) * 7 + version * 13) % 251, dtype=torch.uint8)


class Auto:
    """The policy "auto" without a cost for each transfer: sizes here are tens of bytes."""

    def __init__(self) -> None:
        self.schedule = Schedule(Cost())

    def __call__(self) -> Any:
        return Lane(self.schedule)


class WatchedDisk(DiskBackend):
    """A disk whose writes are known to the fake device as reads of the host."""

    fake: FakeDevice

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self.fake.touch(tensor, f"{key} is written to the disk")
        super().put(key, tensor)


class WatchedScratch(ScratchBackend):
    """A disk for the length of a test, which checks what is read, and whose writes are known as reads of the host."""

    def __init__(self, folder: Path, fake: FakeDevice) -> None:
        super().__init__(folder, verify="always")
        self._fake = fake

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._fake.touch(tensor, f"{key} is written to the disk")
        super().put(key, tensor)


CHAINS = ("ram", "slow", "ram, slow", "disk", "ram, disk")


class Run:
    """A store on a fake device, with the values that it should have, and the streams that compute with them."""

    def __init__(
        self, place: Path, seed: int, chain: str, sizes: dict[str, int], budgets: Sequence[int], policy: str, **options: Any
    ) -> None:
        self.random = random.Random(seed)
        self.fake = FakeDevice(seed, **options)
        self.expected = {key: value(key, nbytes) for key, nbytes in sizes.items()}
        self.versions = dict.fromkeys(sizes, 0)
        tiers = [Tier("gpu", FakeMemory(self.fake), budgets[0])]
        names = chain.split(", ")
        for name, budget in zip(names, [*budgets[1 : len(names)], None], strict=True):
            tiers.append(Tier(name, self.backend(name, place), budget))
        for key, tensor in self.expected.items():
            tiers[-1].backend.put(key, tensor)
        self.engine = SteppedEngine(self.fake, seed)
        self.store = TieredStore(tiers, Auto() if policy == "auto" else policy, self.engine)
        Watch(self.store.moves, self.fake)
        self.streams = [self.fake.default]

    def backend(self, name: str, place: Path) -> Backend:
        if name == "disk":
            return WatchedScratch(place, self.fake)
        return FakeRam(self.fake) if name == "ram" else FakeSlow(self.fake)

    def stream(self) -> FakeStream:
        return self.random.choice(self.streams)

    def use(self, *keys: str) -> None:
        """Compute with values on some stream, in memory that activations take and give back meanwhile."""
        with self.fake.on(self.stream()), self.store.lease(*keys) as tensors:
            for key, tensor in zip(keys, tensors, strict=True):
                assert torch.equal(tensor, self.expected[key]), f"{key} was handed out before it was there"
            self.activate(self.random.randrange(1, 60))
            self.engine.drift()
            for key, tensor in zip(keys, tensors, strict=True):
                assert torch.equal(tensor, self.expected[key]), f"{key} was overwritten while in use"
        self.check()

    def activate(self, nbytes: int) -> None:
        activation = self.fake.allocate(nbytes)
        self.fake.use(activation, "an activation", writes=True)
        activation.zero_()

    def write(self, key: str) -> None:
        """Change a value in place; between streams the user must order that, as with any tensor."""
        stream = self.stream()
        with self.fake.on(stream), self.store.lease(key) as (tensor,):
            self.next_version(key)
            for other in self.streams:
                stream.wait(other.record())
            self.fake.use(tensor, f"{key} is changed in place", writes=True)
            tensor.copy_(self.expected[key])
            self.store.changed(key)
            for other in self.streams:
                other.wait(stream.record())
            self.engine.drift()
        self.check()

    def put(self, key: str) -> None:
        self.next_version(key)
        with self.fake.on(self.stream()):
            (self.store.put if self.random.random() < 0.5 else self.store.fill)(key, self.expected[key])
        self.check()

    def fetch(self, key: str) -> None:
        """Start to bring a value up, and do not wait for it; most often change one's mind at once."""
        moves = self.store.moves
        with self.fake.on(self.stream()):
            with moves.lock:
                moves.fetch(moves.entry(key))
            kind = self.random.random()
            if kind < 0.3:
                self.store.offload([key])
                self.activate(self.expected[key].numel())
            elif kind < 0.5:
                self.store.flush()
            elif kind < 0.8:
                self.put(key)
                self.put(self.random.choice(list(self.expected)))
        self.check()

    def next_version(self, key: str) -> None:
        self.versions[key] += 1
        self.expected[key] = value(key, self.expected[key].numel(), self.versions[key])

    def check(self) -> None:
        self.engine.drift()
        self.fake.drift()
        self.fake.accesses.check()
        for name, tier in self.store.stats().tiers.items():
            assert tier.budget_bytes is None or tier.peak_bytes <= tier.budget_bytes, name

    def close(self) -> None:
        self.store.moves.settle()
        for tier in self.store.tiers:
            assert tier.ledger.used == sum(spec.nbytes for _, spec in tier.backend.entries())
        assert self.fake.memory.allocated == self.store.tiers[0].ledger.used
        self.store.close(flush=False)
        self.fake.accesses.check()


def random_run(place: Path, seed: int, chain: str, policy: str) -> Run:
    rng = random.Random(seed)
    sizes = {f"k{i}": rng.randrange(1, 40) for i in range(rng.randrange(5, 20))}
    total = sum(sizes.values())
    return Run(place, seed, chain, sizes, [rng.randrange(80, max(total, 81) + 1), rng.randrange(40, total + 41)], policy)


def mixed_work(run: Run, rounds: int = 15) -> None:
    """Cycles, jumps, changes in place, new values and offloading."""
    keys = list(run.expected)
    for _ in range(rounds):
        for key in keys if run.random.random() < 0.7 else run.random.choices(keys, k=8):
            kind = run.random.random()
            if kind < 0.04:
                run.write(key)
            elif kind < 0.08:
                run.put(key)
            elif kind < 0.1:
                run.store.offload([key])
            elif kind < 0.2:
                run.fetch(key)
            else:
                run.use(key)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("policy", ["auto", "lru"])
@pytest.mark.parametrize("chain", CHAINS)
def test_mixed_work_on_several_streams(chain: str, policy: str, seed: int, tmp_path: Path) -> None:
    run = random_run(tmp_path, seed, chain, policy)
    if seed % 2:
        run.streams += [run.fake.side_stream("side a"), run.fake.side_stream("side b")]
    mixed_work(run)
    run.close()


# -- planted defects --------------------------------------------------------------------------------------------------


def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arrival, "wait", lambda arrival: None)


def no_slot_free(monkeypatch: pytest.MonkeyPatch) -> None:
    really = Uploads.make_room

    def make_room(uploads: Uploads, landing: Landing) -> bool:
        made = really(uploads, landing)
        landing.free = uploads._stream.record()
        return made

    monkeypatch.setattr(Uploads, "make_room", make_room)


def source_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    really = Uploads._report
    monkeypatch.setattr(Uploads, "_report", lambda uploads, landing, kept, event: really(uploads, landing, [], event))


def done_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(uploads: Uploads, landing: Landing, kept: list[torch.Tensor], event: Event) -> None:
        landing.memory = None
        landing.arrived(Arrival(event, landing.owner, uploads._stalls))  # type: ignore[arg-type]
        kept.clear()
        landing.done(None)

    monkeypatch.setattr(Uploads, "_report", report)


def slab_back_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    really = Staging._copy

    def copy(staging: Staging, chunk: Any, slab: torch.Tensor) -> None:
        monkeypatch.setattr(staging, "_when", lambda event, then: then(None))
        really(staging, chunk, slab)

    monkeypatch.setattr(Staging, "_copy", copy)


def mark_on_the_wrong_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    really = Uploads._place

    def place(uploads: Uploads, landing: Landing) -> Event:
        really(uploads, landing)
        return uploads._accelerator.current().record()

    monkeypatch.setattr(Uploads, "_place", place)


def host_reads_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    really = StreamEngine._download

    def download(engine: StreamEngine, transfer: Transfer, lower: torch.Tensor) -> None:
        with monkeypatch.context() as context:
            context.setattr(FakeEvent, "synchronize", lambda event: None)
            really(engine, transfer, lower)

    monkeypatch.setattr(StreamEngine, "_download", download)


def down_before_computing_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    really = StreamEngine._download

    def download(engine: StreamEngine, transfer: Transfer, lower: torch.Tensor) -> None:
        with monkeypatch.context() as context:
            context.setattr(StreamOrder, "join", lambda order, stream: None)
            really(engine, transfer, lower)

    monkeypatch.setattr(StreamEngine, "_download", download)


def down_before_up_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    really = StreamEngine._download

    def download(engine: StreamEngine, transfer: Transfer, lower: torch.Tensor) -> None:
        really(engine, replace(transfer, ready=None), lower)

    monkeypatch.setattr(StreamEngine, "_download", download)


def not_retired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arrival, "retire", lambda arrival: None)


def side_streams_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamOrder, "part", lambda order, memory: None)


def allocated_on_any_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(order: StreamOrder, target: FakeMemory, key: str, spec: TensorSpec) -> tuple[torch.Tensor, Stream]:
        memory = target.allocate(key, spec)
        order.own(memory, order._latest)
        return memory, order._latest

    monkeypatch.setattr(StreamOrder, "allocate", allocate)


DEFECTS = {
    no_wait: CHAINS,
    no_slot_free: CHAINS,
    source_not_kept: ("ram", "ram, slow", "ram, disk"),
    done_too_early: ("ram, slow", "ram, disk"),
    slab_back_too_early: ("disk",),
    mark_on_the_wrong_stream: CHAINS,
    host_reads_too_early: ("ram", "ram, slow", "ram, disk"),
    down_before_computing_ended: ("ram", "slow"),
    down_before_up_ended: ("ram, slow", "ram, disk"),
    not_retired: ("ram", "slow", "disk"),
    side_streams_forgotten: ("ram", "slow", "disk"),
    allocated_on_any_stream: ("ram", "slow", "disk"),
}


@pytest.mark.parametrize(("plant", "chain"), [(plant, chain) for plant, chains in DEFECTS.items() for chain in chains])
def test_a_planted_defect_is_found(plant: Any, chain: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch)
    for seed in range(20):
        run = random_run(tmp_path, seed, chain, "auto" if seed % 3 else "lru")
        run.streams += [run.fake.side_stream("side a"), run.fake.side_stream("side b")]
        with suppress(AssertionError):  # a wrong value may show before the race is looked for
            mixed_work(run)
        if run.fake.accesses.races:
            return
    pytest.fail("nothing was found")
