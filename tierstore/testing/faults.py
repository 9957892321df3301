"""Backends for tests: the plainest one, and wrappers that make any other fail or wait.

A wrapper keeps the capabilities of what it wraps, because the store asks for the types.
Not `FileBackend`: a reader goes past the backend, so the calls of a wrapper would never see those reads.
"""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from tierstore.backend import Backend, DistantBackend, MappedBackend, MemoryBackend, ReadingBackend, SizingBackend, VolatileBackend
from tierstore.spec import TensorSpec, raw_bytes, typed_view

Call = Literal["put", "get", "delete", "adopt"]
Moment = Literal["before", "halfway"]


class DictBackend(Backend):
    """The contract and nothing else: keeps private copies in a dict and hands out private copies."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[TensorSpec, torch.Tensor]] = {}

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._values[key] = TensorSpec.of(tensor), raw_bytes(tensor).to("cpu", copy=True)

    def get(self, key: str) -> torch.Tensor:
        spec, raw = self._values[key]
        return typed_view(raw.clone(), spec)

    def delete(self, key: str) -> None:
        del self._values[key]

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        return ((key, spec) for key, (spec, _) in list(self._values.items()))


class InjectedError(OSError):
    """A failure that a test asked for."""


class Interference(ABC):
    """Decides what happens around each call of a wrapped backend."""

    @abstractmethod
    def around(self, call: Call, key: str, backend: Backend) -> None:
        """Run before the call: return to let it pass, or raise."""


class Faults(Interference):
    """Makes chosen calls fail with `InjectedError`, at the start or after half of the work was done and undone.

    Each `arm` is good for one failure. `fired` counts failures; `calls` counts all calls.
    """

    def __init__(self) -> None:
        self.calls: dict[Call, int] = {"put": 0, "get": 0, "delete": 0, "adopt": 0}
        self.fired = 0
        self._armed: list[tuple[Callable[[Call, str], bool], Moment]] = []

    def arm(self, call: Call, nth: int = 1, *, moment: Moment = "before") -> None:
        """Let the `nth` call of this kind from now on fail."""
        target = self.calls[call] + nth
        self.arm_if(lambda kind, _: kind == call and self.calls[call] >= target, moment=moment)

    def arm_if(self, condition: Callable[[Call, str], bool], *, moment: Moment = "before") -> None:
        """Let the next call fail for which `condition(call, key)` is true."""
        self._armed.append((condition, moment))

    def disarm(self) -> None:
        """Forget failures that have not happened."""
        self._armed.clear()

    def around(self, call: Call, key: str, backend: Backend) -> None:
        self.calls[call] += 1
        for armed in self._armed:
            condition, moment = armed
            if condition(call, key):
                self._armed.remove(armed)
                self.fired += 1
                if moment == "halfway":
                    _do_and_undo(call, key, backend)
                raise InjectedError(f"injected: {call} of {key!r} failed {moment}")


def _do_and_undo(call: Call, key: str, backend: Backend) -> None:
    """Start a call and roll it back, as an atomic backend does when it fails half way."""
    try:
        old = backend.get(key)
    except KeyError:
        old = None
    if call == "delete" and old is not None:
        backend.delete(key)
    elif call in ("put", "adopt"):
        backend.put(key, torch.full((3,), 0x55, dtype=torch.uint8))
        if old is None:
            backend.delete(key)
    if old is not None and isinstance(backend, MemoryBackend):
        backend.adopt(key, old)  # the live tensor itself: others hold it
    elif old is not None and call != "get":
        backend.put(key, old)


class Delays(Interference):
    """Makes calls take time, so that threads meet: short random sleeps from a seed, or a wait for `gate`.

    While `gate` is cleared, the calls for which `gated(call, key)` is true block; `entered` is set as soon as one does.
    With `seed=None` nothing sleeps. `longest` is in seconds.
    """

    def __init__(self, seed: int | None = 0, *, longest: float = 0.001) -> None:
        self.gated: Callable[[Call, str], bool] = lambda call, key: True
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self._random = None if seed is None else random.Random(seed)
        self._longest = longest

    def around(self, call: Call, key: str, backend: Backend) -> None:
        if not self.gate.is_set() and self.gated(call, key):
            self.entered.set()
            self.gate.wait()
        if self._random is not None:
            time.sleep(self._random.choice((0, 0, self._random.random() * self._longest)))  # sleep(0) yields


class Wrapper(Backend):
    """Passes every call on to `inner` after asking `interference`."""

    def __init__(self, inner: Backend, interference: Interference) -> None:
        self.inner = inner
        self.interference = interference

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self.interference.around("put", key, self.inner)
        self.inner.put(key, tensor)

    def get(self, key: str) -> torch.Tensor:
        self.interference.around("get", key, self.inner)
        return self.inner.get(key)

    def delete(self, key: str) -> None:
        self.interference.around("delete", key, self.inner)
        self.inner.delete(key)

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        return iter(self.inner.entries())

    def close(self) -> None:
        self.inner.close()


class MappedWrapper(Wrapper, MappedBackend):
    """A wrapper around a `MappedBackend`."""


class ReadingWrapper(Wrapper, ReadingBackend):
    """A wrapper around a `ReadingBackend`; reading into memory counts as a "get"."""

    def read_into(self, key: str, out: torch.Tensor) -> None:
        assert isinstance(self.inner, ReadingBackend)
        self.interference.around("get", key, self.inner)
        self.inner.read_into(key, out)


class DistantWrapper(ReadingWrapper, DistantBackend):
    """A wrapper around a `DistantBackend`."""


class SizingWrapper(Wrapper, SizingBackend):
    """A wrapper around a `SizingBackend`."""

    def stored_bytes(self, key: str) -> int:
        assert isinstance(self.inner, SizingBackend)
        return self.inner.stored_bytes(key)


class VolatileWrapper(Wrapper, VolatileBackend):
    """A wrapper around a `VolatileBackend`."""

    def trim(self) -> None:
        assert isinstance(self.inner, VolatileBackend)
        self.inner.trim()


class CodedWrapper(ReadingWrapper, SizingWrapper):
    """A wrapper around what compresses values."""


class VolatileCodedWrapper(CodedWrapper, VolatileWrapper):
    """A wrapper around what compresses values in memory."""


class MemoryWrapper(Wrapper, MemoryBackend):
    """A wrapper around a `MemoryBackend`."""

    inner: MemoryBackend

    def __init__(self, inner: Backend, interference: Interference) -> None:
        assert isinstance(inner, MemoryBackend)
        super().__init__(inner, interference)
        self.device = inner.device

    def adopt(self, key: str, tensor: torch.Tensor) -> None:
        self.interference.around("adopt", key, self.inner)
        self.inner.adopt(key, tensor)

    def allocate(self, key: str, spec: TensorSpec, phase: int = 0) -> torch.Tensor:
        return self.inner.allocate(key, spec, phase)

    def trim(self) -> None:
        self.inner.trim()


_CAPABILITIES = (MemoryBackend, MappedBackend, ReadingBackend, DistantBackend, SizingBackend, VolatileBackend)
_WRAPPERS = (
    Wrapper, MemoryWrapper, MappedWrapper, ReadingWrapper, DistantWrapper, SizingWrapper, VolatileWrapper, CodedWrapper,
    VolatileCodedWrapper,
)  # fmt: skip


def wrap(backend: Backend, interference: Interference) -> Wrapper:
    """Return `backend` under `interference` (`Faults` or `Delays`), with the same capabilities."""
    for wrapper in _WRAPPERS:
        if all(issubclass(wrapper, kind) is isinstance(backend, kind) for kind in _CAPABILITIES):
            return wrapper(backend, interference)
    raise TypeError(f"no wrapper has the capabilities of {type(backend).__name__}")
