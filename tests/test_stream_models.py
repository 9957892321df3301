"""Whole models on a fake device: bit for bit the plain model's results, on any stream, with every access ordered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.plainly import gradients, largest, nbytes, restored, same, state, within_budget
from tests.test_models import MODELS, X, run
from tests.test_streams import WatchedScratch
from tierstore import Tiered, TieredStore
from tierstore.patch import attach, restore
from tierstore.patch.stored import StoredSource
from tierstore.testing.fake_backends import FakeMemory, FakeRam
from tierstore.testing.fake_device import FakeDevice
from tierstore.testing.happens import RaceError
from tierstore.testing.stepped import SteppedEngine, Watch
from tierstore.tier import Tier
from tierstore.transfer.order import StreamOrder
from tierstore.transfer.streams import StreamEngine


def session_on(fake: FakeDevice, model: nn.Module, disk: Path, *, gpu: int | None = None, cpu: bool = True, seed: int = 0) -> Tiered:
    """A third of the model on the device, or what one module needs, and below it RAM for another third, or none, and a disk."""
    total = nbytes(model)
    tiers = [Tier("gpu", FakeMemory(fake), max(total // 3, largest(model)) if gpu is None else gpu)]
    tiers += [Tier("cpu", FakeRam(fake), total // 3)] if cpu else []
    store = TieredStore([*tiers, Tier("disk", WatchedScratch(disk, fake))], "auto", SteppedEngine(fake, seed))
    Watch(store.moves, fake)
    return Tiered({"": model}, store, torch.device("cpu"))


def step_of(mode: str, x: torch.Tensor) -> Callable[[nn.Module], Any]:
    def step(model: nn.Module) -> Any:
        model.train(mode == "train")
        if mode == "inference":
            with torch.inference_mode():
                return model(x).clone()
        with torch.set_grad_enabled(mode in ("train", "eval")):
            return run(x)(model)

    return step


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_plain_on_any_stream(name: str, mode: str, scratch: Path) -> None:
    make, x = MODELS[name]
    seed = sum(map(ord, name + mode))
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    plain = make()
    objects = dict(model.named_parameters())
    step = step_of(mode, x)
    fake = FakeDevice(seed)
    streams = [fake.default, fake.side_stream("side")]
    with session_on(fake, model, scratch, cpu=bool(seed % 2), seed=seed) as session:
        for turn in range(5):
            stream = streams[turn % 2]
            with fake.on(stream):
                stream.wait(streams[1 - turn % 2].record())  # as any user has to who changes tensors on two streams
                torch.manual_seed(turn)
                result = step(model)
            torch.manual_seed(turn)
            assert same(result, step(plain))
            fake.accesses.check()
        assert same(state(model), state(plain))
        within_budget(session)
        assert session.stats().misses > 0
    fake.accesses.check()
    assert same(state(model), state(plain))
    assert same(gradients(model), gradients(plain))
    assert restored(model, objects)


def read_on_a_new_stream(fake: FakeDevice, scratch: Path) -> None:
    """Let a stream do nothing but read, without a lease, what then leaves; its memory is used again at once."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    with session_on(fake, model, scratch, gpu=nbytes(model) - 1) as session, torch.no_grad():
        for _ in range(4):
            model[0](X)
        assert session.store.moves.entries["0.weight"].handout is not None
        with fake.on(fake.side_stream("new")):
            model[0](X)
        session.offload(model[0])
        for size in (64, 256, 1024):
            activation = fake.allocate(size)
            fake.use(activation, "an activation", writes=True)
        fake.accesses.check()


def test_a_stream_that_only_reads_without_a_lease_is_known(scratch: Path) -> None:
    read_on_a_new_stream(FakeDevice(), scratch)


def test_a_stream_that_was_not_noted_is_found(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamOrder, "note", lambda order: order._latest)
    with pytest.raises(RaceError, match="read without a lease"):
        read_on_a_new_stream(FakeDevice(), scratch)


def written_on_a_side_stream(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write to weights on a side stream and leave the `with` on another one, which copies them to where they came from."""
    fake = FakeDevice()

    def settle(source: StoredSource, device: torch.device | None) -> None:
        for entry in source.stored:
            if entry.tensor is not None:
                fake.use(entry.tensor, "a copy on the way out")
        restore.settle(source, device)

    monkeypatch.setattr(attach, "settle", settle)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4))).requires_grad_(False)
    with session_on(fake, model, scratch), fake.on(fake.side_stream("side")):
        for layer in model:
            layer.weight.add_(1)
    fake.accesses.check()


def test_what_was_written_on_any_stream_comes_back(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written_on_a_side_stream(scratch, monkeypatch)


def test_a_session_that_does_not_wait_for_side_streams_is_found(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamEngine, "gather", lambda engine: None)
    with pytest.raises(RaceError, match="a copy on the way out"):
        written_on_a_side_stream(scratch, monkeypatch)
