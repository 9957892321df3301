"""Carries values between backends: the only place with threads, and with a clock."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tierstore.backend import Backend, MappedBackend, MemoryBackend, ReadingBackend
from tierstore.entry import Ready
from tierstore.spec import TensorSpec, raw_bytes

Done = Callable[[BaseException | None], None]
Arrived = Callable[[Ready], None]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One copy of the value of `key`, described by `spec`, from the tier at level `route[0]` to that at `route[1]`.

    `ready`: what must come before the source is read, if that may still be filled on the device.
    """

    key: str
    spec: TensorSpec
    source: Backend
    target: Backend
    route: tuple[int, int]
    ready: Ready | None = None


class Engine(ABC):
    """Copies values, at once or in the background. Called without the store's lock, except for `wait` and `now`.

    `computes_now`: the time that passes between two uses of values is that of computing with them. It is not where a device
    computes behind the host's back.
    """

    computes_now = True

    @abstractmethod
    def carry(self, transfer: Transfer) -> None:
        """Copy now, in this thread."""

    @abstractmethod
    def start(self, transfer: Transfer, done: Done, arrived: Arrived) -> None:
        """Copy in the background; `done` is called once, with what went wrong or None, when the target has all the bytes.

        An engine whose device does things in order may call `arrived` before that, once, when the target can be used by
        whoever waits for what it is given; then nothing may go wrong any more. Both may be called from another thread, or
        before this returns.
        """

    def put(self, target: Backend, level: int, key: str, tensor: torch.Tensor) -> Ready | None:
        """Write a new value into the tier at `level`, in this thread; who reads it waits for what this returns, if anything."""
        target.put(key, tensor)
        return None

    def computing(self) -> None:  # noqa: B027  (only a device with streams of its own has to know)
        """Take note that this thread is about to compute with values of the fastest tier, whether or not it holds the store's lock."""

    def gather(self) -> None:  # noqa: B027  (likewise)
        """Let what this thread does from now on come after all computations with values so far, whoever made them."""

    def parting(self, tensor: torch.Tensor) -> None:  # noqa: B027  (likewise)
        """Let whatever is done with the memory of `tensor`, which leaves the fastest tier, come after all that used it.

        The store's lock is held.
        """

    def stall_seconds(self) -> float:
        """Seconds that computations waited for copies on the device, as far as that is known by now."""
        return 0.0

    @abstractmethod
    def wait(self, lock: threading.Condition) -> None:
        """Release `lock`, which the caller holds, until something that was started may have ended, and take it again."""

    @abstractmethod
    def now(self) -> float:
        """Seconds since some fixed moment."""

    @abstractmethod
    def close(self) -> None:
        """End what runs in the background, after what was started has ended."""


def copy_value(transfer: Transfer) -> None:
    """Copy through the two backends.

    Where the target is plain memory, a map of a file becomes the value itself, and a source that can read into it does.
    """
    taker = transfer.target
    if isinstance(transfer.source, ReadingBackend) and isinstance(taker, MemoryBackend) and taker.device.type == "cpu":
        place = taker.allocate(transfer.key, transfer.spec)
        transfer.source.read_into(transfer.key, raw_bytes(place))
        taker.adopt(transfer.key, place)
        return
    tensor = transfer.source.get(transfer.key)
    if isinstance(transfer.source, MappedBackend) and isinstance(taker, MemoryBackend) and tensor.device == taker.device:
        taker.adopt(transfer.key, tensor)
    else:
        taker.put(transfer.key, tensor)
