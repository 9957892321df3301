"""An engine without threads, under a virtual clock: the whole store runs deterministically, and ordering bugs show.

The target of a copy holds poison from its start to its end, so whoever looks before the copy has ended sees it.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tierstore.backend import MemoryBackend
from tierstore.errors import TierStoreError
from tierstore.spec import raw_bytes
from tierstore.transfer.engine import Arrived, Done, Engine, Transfer, copy_value

POISON = 0xA5


class VirtualClock:
    """Seconds that pass only when told to, and what is due at which of them. `not_before`: when the next computation can begin."""

    def __init__(self) -> None:
        self.now = 0.0
        self.not_before = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def call_at(self, moment: float, action: Callable[[], None]) -> None:
        """Call `action` when the clock reaches `moment`; what is due at the same moment keeps its order."""
        heapq.heappush(self._due, (moment, self._count, action))
        self._count += 1

    def advance(self, seconds: float) -> None:
        """Let time pass, as computing does; what is due meanwhile happens."""
        until = max(self.now, self.not_before) + seconds
        while self._due and self._due[0][0] <= until:
            self.step()
        self.now = until

    def step(self) -> None:
        """Jump to what is due next; raise if nothing is, for then whoever waits would wait for ever."""
        if not self._due:
            raise TierStoreError("waiting for something that will never happen")
        moment, _, action = heapq.heappop(self._due)
        self.now = max(self.now, moment)
        action()


@dataclass(slots=True)
class Link:
    """One direction between two tiers: `bandwidth` in bytes per second, `latency` in seconds for each copy; one after the other."""

    bandwidth: float
    latency: float = 0.0
    free_at: float = 0.0
    copies: int = 0


class OrderedCopy:
    """A copy into `memory` that ends at `moment`: a computation that waits for it sees the value, and begins no earlier."""

    def __init__(self, clock: VirtualClock, moment: float, memory: torch.Tensor, value: torch.Tensor) -> None:
        self._clock = clock
        self._moment = moment
        self._memory = raw_bytes(memory)
        self._value = raw_bytes(value)

    def wait(self) -> None:
        self._memory.copy_(self._value)
        self._clock.not_before = max(self._clock.not_before, self._moment)

    def passed(self) -> bool:
        return self._clock.now >= self._moment

    def retire(self) -> None:
        """Memory is never used twice here."""

    def end(self, done: Done) -> None:
        self._memory.copy_(self._value)
        done(None)


class SimulatedEngine(Engine):
    """Copies take the time that their link needs; `fault` may name the error with which a copy ends. For one thread only.

    With `ordered`, values count as there when their copy into the fastest tier has begun, as on a device that does things
    in order: who computes waits, not who asks. Such copies do not fail.
    """

    def __init__(
        self,
        clock: VirtualClock,
        links: Mapping[tuple[int, int], Link],
        fault: Callable[[Transfer], BaseException | None] = lambda transfer: None,
        *,
        ordered: bool = False,
    ) -> None:
        self.clock = clock
        self.links = dict(links)
        self.computes_now = not ordered
        self._fault = fault
        self._ordered = ordered

    def start(self, transfer: Transfer, done: Done, arrived: Arrived) -> None:
        value = transfer.source.get(transfer.key).clone(memory_format=torch.preserve_format)
        target = transfer.target
        memory: torch.Tensor | None = None
        if isinstance(target, MemoryBackend):
            memory = target.allocate(transfer.key, transfer.spec)
            raw_bytes(memory).fill_(POISON)
            target.adopt(transfer.key, memory)
        ends = self._ends(transfer)
        if self._ordered and memory is not None and transfer.route[1] == 0:
            copy = OrderedCopy(self.clock, ends, memory, value)
            self.clock.call_at(ends, lambda: copy.end(done))
            arrived(copy)
        else:
            self.clock.call_at(ends, lambda: self._end(transfer, value, done))

    def _ends(self, transfer: Transfer) -> float:
        link = self.links.setdefault(transfer.route, Link(float("inf")))
        link.free_at = max(link.free_at, self.clock.now) + link.latency + transfer.spec.nbytes / link.bandwidth
        link.copies += 1
        return link.free_at

    def _end(self, transfer: Transfer, value: torch.Tensor, done: Done) -> None:
        error = self._fault(transfer)
        target = transfer.target
        if isinstance(target, MemoryBackend):
            if error is None:
                raw_bytes(target.get(transfer.key)).copy_(raw_bytes(value))
            else:
                target.delete(transfer.key)
        elif error is None:
            target.put(transfer.key, value)
        done(error)

    def carry(self, transfer: Transfer) -> None:
        if transfer.ready is not None:
            transfer.ready.wait()
        ends = self._ends(transfer)
        self.clock.advance(ends - self.clock.now)
        error = self._fault(transfer)
        if error is not None:
            raise error
        copy_value(transfer)

    def wait(self, lock: threading.Condition) -> None:
        lock.release()
        try:
            self.clock.step()
        finally:
            lock.acquire()

    def now(self) -> float:
        return self.clock.now

    def close(self) -> None:
        while self.clock._due:
            self.clock.step()
