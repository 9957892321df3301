"""What the engine for accelerators needs of one: streams, marks in them, copies, page-locked memory. It reaches them only here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch


class Event(ABC):
    """A mark in a stream, passed once all that was in the stream before it has ended."""

    @abstractmethod
    def passed(self) -> bool:
        """True if it is passed by now."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait in this thread until it is passed, while other threads run."""

    @abstractmethod
    def seconds_since(self, earlier: Event) -> float:
        """Return the device's time between two marks that `Stream.record_timer` made, both of them passed."""


class Stream(ABC):
    """Work that a device does in its order. There is one object for one stream, so `is` compares streams."""

    @abstractmethod
    def record(self) -> Event:
        """Return a mark behind all that is in the stream now."""

    @abstractmethod
    def record_timer(self) -> Event:
        """The same, with the time at which it is passed."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Let what is put into the stream from now on begin after `event` is passed; the thread does not wait."""


class Accelerator(ABC):
    """One device. Every thread has a current stream on it, into which its computations and copies go."""

    @abstractmethod
    def current(self) -> Stream:
        """Return the current stream of this thread."""

    @abstractmethod
    def new_stream(self) -> Stream:
        """Return a stream that nobody else computes with."""

    @abstractmethod
    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """Make `stream` the current one of this thread within a `with`; what is allocated inside belongs to it."""

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Put a copy between two contiguous uint8 tensors of one size, one of them on the device, into the current stream.

        The thread waits for its end only where the one in RAM is not page-locked.
        """

    @abstractmethod
    def share(self, memory: torch.Tensor, stream: Stream) -> None:
        """Tell the allocator of the device that `stream` uses `memory` too, which somebody else allocated."""

    @abstractmethod
    def page_locked(self, tensor: torch.Tensor) -> bool:
        """True if the device copies from the memory of `tensor`, which lies in RAM, by itself."""

    @abstractmethod
    def allocate_page_locked(self, nbytes: int) -> torch.Tensor:
        """Return page-locked memory as a uint8 tensor; its size should be a power of two, or more is taken."""
