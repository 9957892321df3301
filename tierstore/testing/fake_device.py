"""A device that is none: streams that run late and in any order that their waits allow, in memory that is reused at once.

Computing happens at once, on CPU tensors, in "eager" streams: the default one and those that tests make. What the engine
puts into streams of its own is done as late as possible, or at a random moment after all that it waits for. Until then its
target holds poison. Every access is recorded, so that a missing wait is found also where nothing went wrong.

Time is that of the device, in seconds that nobody waits for: a stream is free again when what was put into it has ended.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tierstore.testing.fake_memory import Pool
from tierstore.testing.happens import Accesses, Agent, Clock
from tierstore.transfer.accelerator import Accelerator, Event, Stream


@dataclass(slots=True)
class Copy:
    """Bytes to be moved between two addresses; `kept` are tensors over memory of which nobody else takes care."""

    target: int
    source: int
    nbytes: int
    kept: tuple[torch.Tensor, ...]

    def run(self) -> None:
        ctypes.memmove(self.target, self.source, self.nbytes)
        self.kept = ()


class FakeEvent(Event):
    """A mark; `moment` is when it is passed by the device's time, `done` whether that has been acted out."""

    def __init__(self, stream: FakeStream, clock: Clock, moment: float) -> None:
        self.stream = stream
        self.clock = clock
        self.moment = moment
        self.done = False

    def passed(self) -> bool:
        return self.stream.device.has_passed(self)

    def synchronize(self) -> None:
        self.stream.device.wait_for(self)

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, FakeEvent)
        assert self.done
        assert earlier.done
        return self.moment - earlier.moment


class FakeStream(Stream):
    """A queue of copies, of marks to set and of marks to wait for. An eager one is always empty."""

    def __init__(self, device: FakeDevice, name: str, *, eager: bool) -> None:
        self.device = device
        self.eager = eager
        self.agent = Agent(name)
        self.free_at = 0.0
        self.queue: deque[Copy | FakeEvent] = deque()

    def record(self) -> Event:
        with self.device.lock:
            self.agent.learn(self.device.accesses.host.clock)
            event = FakeEvent(self, dict(self.agent.clock), max(self.free_at, self.device.now))
            self.device.enqueue(self, event)
            return event

    def record_timer(self) -> Event:
        return self.record()

    def wait(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        with self.device.lock:
            self.agent.learn(event.clock)
            self.free_at = max(self.free_at, event.moment)
            self.device.enqueue(self, event)

    def compute(self, seconds: float) -> None:
        """Put in a computation that takes a while; which memory it uses is told to `FakeDevice.use`."""
        self.free_at = max(self.free_at, self.device.now) + seconds


class FakeDevice(Accelerator):
    """The device, its allocator, and the record of all accesses. Safe to call from several threads.

    `capacity`: bytes that its allocator gives out at once. `bandwidth`: bytes per second of a copy. With `punctual`, marks
    are passed when `now`, the host's time, has reached them; else at random, from `seed`.
    """

    def __init__(self, seed: int = 0, *, capacity: int = 1 << 40, bandwidth: float = 1e9, punctual: bool = False) -> None:
        self.lock = threading.RLock()
        self.accesses = Accesses()
        self.now = 0.0
        self.bandwidth = bandwidth
        self.memory = Pool(capacity)
        self.ram = Pool()
        self.default = FakeStream(self, "default", eager=True)
        self._random = random.Random(seed)
        self._punctual = punctual
        self._lazy: list[FakeStream] = []
        self._current = threading.local()

    # -- streams ------------------------------------------------------------------------------------------------

    def current(self) -> FakeStream:
        found: FakeStream = getattr(self._current, "stream", self.default)
        return found

    def new_stream(self) -> FakeStream:
        stream = FakeStream(self, f"copies {len(self._lazy)}", eager=False)
        self._lazy.append(stream)
        return stream

    def side_stream(self, name: str) -> FakeStream:
        """Return another stream to compute on."""
        return FakeStream(self, name, eager=True)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        assert isinstance(stream, FakeStream)
        before = self.current()
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    # -- memory -------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return memory of the device in the pool of the current stream, as the allocator of a real one does."""
        return self.memory.allocate(nbytes, self.current().agent.name)

    def allocate_page_locked(self, nbytes: int) -> torch.Tensor:
        return self.ram.allocate(nbytes, "ram")

    def page_locked(self, tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() in self.ram

    def share(self, memory: torch.Tensor, stream: Stream) -> None:
        """Nothing to do: memory of this device is always allocated through it, so its owner is known."""

    def use(self, tensor: torch.Tensor, what: str, *, writes: bool = False) -> None:
        """Record that this thread computes with `tensor`, on its current stream."""
        self._access(self.current().agent, tensor, what, writes=writes)

    def touch(self, tensor: torch.Tensor, what: str, *, writes: bool = False) -> None:
        """Record that the host itself reads or writes the memory of `tensor`."""
        if tensor.data_ptr() in self.memory:
            self.accesses.races.append(f"the host touches memory of the device: {what}")
        self._access(self.accesses.host, tensor, what, writes=writes)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.numel() == source.numel()
        assert target.dtype is source.dtype is torch.uint8
        stream = self.current()
        with self.lock:
            source = self._source(source, stream)
            self._access(stream.agent, target, "target of a copy", writes=True)
            stream.free_at = max(stream.free_at, self.now) + target.numel() / self.bandwidth
            kept = tuple(side for side in (target, source) if not self._ours(side))
            self.enqueue(stream, Copy(target.data_ptr(), source.data_ptr(), target.numel(), kept))
            if not self._ours(target):
                stream.record().synchronize()

    def _source(self, source: torch.Tensor, stream: FakeStream) -> torch.Tensor:
        """Return what the device reads: of memory that is not page-locked, what the driver has put aside before it returns."""
        if self._ours(source):
            self._access(stream.agent, source, "source of a copy", writes=False)
            return source
        self.touch(source, "pageable source of a copy")
        return source.clone()

    def _access(self, agent: Agent, tensor: torch.Tensor, what: str, *, writes: bool) -> None:
        with self.lock:
            storage = tensor.untyped_storage()
            start = tensor.data_ptr() if tensor.is_contiguous() else storage.data_ptr()
            nbytes = tensor.nbytes if tensor.is_contiguous() else storage.nbytes()
            self.accesses.add(agent, start, nbytes, writes=writes, what=what)

    def _ours(self, tensor: torch.Tensor) -> bool:
        return not tensor.numel() or tensor.data_ptr() in self.memory or tensor.data_ptr() in self.ram

    # -- acting out ---------------------------------------------------------------------------------------------

    def enqueue(self, stream: FakeStream, item: Copy | FakeEvent) -> None:
        """Put something into a stream; some of what waits in others may happen now."""
        stream.queue.append(item)
        while stream.eager and stream.queue:
            self._run_next(stream)
        self.drift()

    def drift(self) -> None:
        """Let some of what is in the streams happen, or nothing."""
        with self.lock:
            while not self._punctual and self._random.random() < 0.3:
                stream = self._random.choice(self._lazy) if self._lazy else self.default
                if stream.queue and not self._blocked(stream):
                    self._run_next(stream)

    def has_passed(self, event: FakeEvent) -> bool:
        with self.lock:
            self.drift()
            if self._punctual and event.moment > self.now:
                return False
            if self._punctual:
                self._force(event)
            if event.done:
                self.accesses.host.learn(event.clock)
            return event.done

    def wait_for(self, event: FakeEvent) -> None:
        with self.lock:
            self._force(event)
            self.now = max(self.now, event.moment)
            self.accesses.host.learn(event.clock)

    def _force(self, event: FakeEvent) -> None:
        while not event.done:
            self._run_next(event.stream)

    @staticmethod
    def _blocked(stream: FakeStream) -> bool:
        head = stream.queue[0]
        return isinstance(head, FakeEvent) and head.stream is not stream and not head.done

    def _run_next(self, stream: FakeStream) -> None:
        head = stream.queue[0]
        if isinstance(head, Copy):
            stream.queue.popleft().run()  # type: ignore[union-attr]
            return
        if head.stream is stream:
            head.done = True
        else:
            self._force(head)
        stream.queue.popleft()
