"""How torch is asked for streams: the names and arguments that it has, and the real engine over a stand-in without a device."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tierstore.registry import open_backend
from tierstore.store import TieredStore
from tierstore.tier import Tier
from tierstore.transfer.streams import StreamEngine
from tierstore.transfer.torch_streams import TorchAccelerator, accelerator_of


class StubEvent:
    """Passed as soon as it is recorded; takes the arguments that `torch.cuda.Event` takes."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.timed = enable_timing
        self.blocking = blocking
        self.recorded = False

    def record(self, stream: StubStream) -> None:
        assert isinstance(stream, StubStream)
        self.recorded = True

    def query(self) -> bool:
        assert self.recorded
        return True

    def synchronize(self) -> None:
        assert self.recorded

    def elapsed_time(self, end: StubEvent) -> float:
        assert self.timed
        assert end.timed
        return 250.0


class StubStream:
    device = torch.device("cuda", 0)

    def __init__(self, number: int) -> None:
        self.stream_id = number
        self.waits = 0

    def wait_event(self, event: StubEvent) -> None:
        assert isinstance(event, StubEvent)
        assert event.recorded
        self.waits += 1


class StubModule(ModuleType):
    """A device module like `torch.cuda`; each question for the current stream makes a new object, as torch does."""

    def __init__(self) -> None:
        super().__init__("stub")
        self.number = 0
        self.made = 100
        self.Event = StubEvent

    def Stream(self, device: torch.device) -> StubStream:  # noqa: N802  (torch's name)
        self.made += 1
        return StubStream(self.made)

    def current_stream(self, device: int) -> StubStream:
        return StubStream(self.number)

    @contextmanager
    def stream(self, stream: StubStream) -> Iterator[None]:
        before, self.number = self.number, stream.stream_id
        try:
            yield
        finally:
            self.number = before


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> StubModule:
    module = StubModule()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: SimpleNamespace(stream_id=module.number))
    return module


def test_one_object_for_one_stream(stub: StubModule) -> None:
    accelerator = TorchAccelerator(torch.device("cuda", 0))
    default, own = accelerator.current(), accelerator.new_stream()
    assert accelerator.current() is default
    with accelerator.on(own):
        assert accelerator.current() is own
        with accelerator.on(default):
            assert accelerator.current() is default
        assert accelerator.current() is own
    assert accelerator.current() is default
    assert own is not accelerator.new_stream()


def test_marks_let_a_waiting_thread_sleep_and_timers_know_the_time(stub: StubModule) -> None:
    accelerator = TorchAccelerator(torch.device("cuda", 0))
    stream: Any = accelerator.new_stream()
    event: Any = stream.record()
    assert event.event.blocking
    assert event.passed()
    event.synchronize()
    first, second = stream.record_timer(), stream.record_timer()
    assert second.seconds_since(first) == 0.25
    stream.wait(event)
    assert stream.stream.waits == 1


@pytest.mark.parametrize("bottom", ["device", "disk"])
def test_the_engine_asks_it_for_nothing_else(stub: StubModule, bottom: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchAccelerator, "allocate_page_locked", lambda accelerator, nbytes: torch.empty(nbytes, dtype=torch.uint8))
    below = open_backend("device", "cpu") if bottom == "device" else open_backend("disk", tmp_path / "store")
    values = {str(number): torch.full((300, 10 + number), float(number)) for number in range(12)}
    for key, value in values.items():
        below.put(key, value)
    store = TieredStore([Tier("gpu", open_backend("device", "cpu"), 60_000), Tier("low", below)], "lru")
    store.moves.engine.close()
    store.moves.engine = StreamEngine(TorchAccelerator(torch.device("cuda", 0)))
    for turn in range(3):
        for key, value in values.items():
            with stub.stream(StubStream(turn)), store.lease(key) as (tensor,):
                assert torch.equal(tensor, value + turn)
                tensor.add_(1)
                store.changed(key)
    store.close(flush=False)


def test_torch_has_what_is_asked_for() -> None:
    """On a build for CPUs too the Python side of CUDA is there."""
    assert {"enable_timing", "blocking"} <= inspect.signature(torch.cuda.Event.__new__).parameters.keys()
    for name in ("record", "query", "synchronize", "elapsed_time"):
        assert hasattr(torch.cuda.Event, name)
    for owner, names in (
        (torch.cuda.Stream, ("wait_event",)),
        (torch.cuda, ("stream", "current_stream", "Stream")),
        (torch.accelerator, ("current_stream", "current_device_index", "empty_cache", "memory_allocated")),
    ):
        assert all(hasattr(owner, name) for name in names)


def test_devices_without_streams_have_none() -> None:
    for name in ("cpu", "meta", "mps"):
        assert accelerator_of(torch.device(name)) is None
