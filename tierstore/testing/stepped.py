"""The engine for accelerators on a fake device, without threads: what they would do is done in some order from a seed.

`watch` records what a store's users compute with, and when, so that the device can tell of accesses that nothing orders.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

import torch

from tierstore.backend import FileExtent
from tierstore.entry import Entry
from tierstore.errors import TierStoreError
from tierstore.open_file import OpenFile
from tierstore.shield import shielded
from tierstore.spec import raw_bytes
from tierstore.testing.fake_device import FakeDevice
from tierstore.transfer.reader import Done, Prepare, Reader
from tierstore.transfer.streams import StreamEngine
from tierstore.writing import Moves

P = ParamSpec("P")
T = TypeVar("T")


class Steps(Executor):
    """Runs what is submitted one at a time, in its order, when `step` is called; each as a thread of its own would."""

    def __init__(self, fake: FakeDevice) -> None:
        self._fake = fake
        self._todo: deque[Callable[[], object]] = deque()

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        self._todo.append(lambda: function(*args, **kwargs))
        return Future()

    def __len__(self) -> int:
        return len(self._todo)

    def step(self) -> None:
        with self._fake.on(self._fake.default):
            self._todo.popleft()()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        while self._todo:
            self.step()


class SteppedReader(Reader):
    """Reads each extent at once when its turn comes, and records that the host wrote to its target."""

    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self.steps = Steps(fake)
        self._fake = fake

    def submit(self, extent: FileExtent, out: torch.Tensor, done: Done) -> None:
        self.steps.submit(self._serve, extent, [out], done)

    def begin(self, prepare: Prepare, done: Done) -> None:
        self.steps.submit(self._prepare, prepare, done)

    def _prepare(self, prepare: Prepare, done: Done) -> None:
        try:
            prepared = prepare()
        except Exception as error:  # noqa: BLE001  (handed to whoever waits for the value)
            done(error.with_traceback(None))
            return
        if prepared is None:
            done(None)
            return
        held = [prepared[1]]
        extent = prepared[0]
        del prepared
        self._serve(extent, held, done)

    def _serve(self, extent: FileExtent, held: list[torch.Tensor], done: Done) -> None:
        error: BaseException | None = None
        self._fake.touch(held[0], f"a file is read ({extent.path})", writes=True)
        try:
            file = OpenFile.of(extent.path, extent.file)
            try:
                extent.prove(file)
                file.read(held[0].numpy().data, extent.offset)
            finally:
                file.close()
        except OSError as failure:
            error = failure.with_traceback(None)
        held.clear()
        done(error)

    def close(self) -> None:
        self.steps.shutdown()
        super().close()


class SteppedEngine(StreamEngine):
    """Does in the caller's thread what threads would do: whenever somebody waits, and when `drift` is called."""

    def __init__(self, fake: FakeDevice, seed: int = 0) -> None:
        self._fake = fake
        self._random = random.Random(seed)
        reader = SteppedReader(fake)
        self._steps = {"read": reader.steps}
        super().__init__(fake, reader)

    def _pool(self, name: str, threads: int) -> Executor:
        return self._steps.setdefault(name, Steps(self._fake))

    def _end(self, name: str) -> None:
        self._pool(name, 1).shutdown()

    def step(self) -> None:
        """Let one thread go on; raise if none has anything to do, for then whoever waits would wait for ever."""
        busy = [steps for steps in self._steps.values() if steps]
        if not busy:
            raise TierStoreError("waiting for something that will never happen")
        self._random.choice(busy).step()

    def drift(self, chance: float = 0.5) -> None:
        """Let some threads go on, or none."""
        while any(self._steps.values()) and self._random.random() < chance:
            self.step()

    def run(self, *names: str) -> None:
        """Let the threads of these names go on as far as they can."""
        while busy := [name for name in names if self._steps.get(name)]:
            self._steps[busy[0]].step()

    def wait(self, lock: threading.Condition) -> None:
        lock.release()
        try:
            self.step()
        finally:
            lock.acquire()


class Watch:
    """Records on a fake device that whoever has a lease on a value may compute with it from the lease's start to its end."""

    def __init__(self, moves: Moves, fake: FakeDevice) -> None:
        self._fake = fake
        self._here = threading.local()
        self._real: dict[str, Callable[..., Any]] = {}
        for name in ("acquire", "lease_resident", "lease_unnoticed", "release", "outdate"):
            self._real[name] = getattr(moves, name)
            setattr(moves, name, getattr(self, f"_{name}"))
        moves.noted = Noted(moves, fake)

    def _acquire(self, entries: Iterable[Entry], *args: Any, **kwargs: Any) -> bool:
        wanted = list(entries)
        self._here.inside = True  # a lease that is given back in there was never used
        try:
            leased: bool = self._real["acquire"](wanted, *args, **kwargs)
        finally:
            self._here.inside = False
        if leased:
            self._use(wanted, "is leased")
        return leased

    def _lease_resident(self, entries: Sequence[Entry], headroom: int) -> bool:
        leased: bool = self._real["lease_resident"](entries, headroom)
        if leased:
            self._use(list(entries), "is leased")
        return leased

    def _lease_unnoticed(self, entries: Sequence[Entry]) -> bool:
        leased: bool = self._real["lease_unnoticed"](entries)
        if leased:
            self._use(list(entries), "is leased for a lookup")
        return leased

    def _release(self, entries: Iterable[Entry], owner: int | None = None, *, passing: bool = False) -> None:
        wanted = list(entries)
        if not getattr(self._here, "inside", False):
            self._use(wanted, "was leased till now")
        self._real["release"](wanted, owner, passing=passing)

    def _outdate(self, entry: Entry) -> None:
        self._use([entry], "is changed", writes=True)
        self._real["outdate"](entry)

    def _use(self, entries: list[Entry], what: str, *, writes: bool = False) -> None:
        with shielded():
            for entry in entries:
                if entry.tensor is not None:
                    self._fake.use(raw_bytes(entry.tensor), f"{entry.key} {what}", writes=writes)


class Noted(deque[str]):
    """The uses without a lease, each recorded when it begins."""

    def __init__(self, moves: Moves, fake: FakeDevice) -> None:
        super().__init__()
        self._moves = moves
        self._fake = fake

    def extend(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.append(key)

    def append(self, key: str) -> None:
        tensor = self._moves.entries[key].tensor
        assert tensor is not None
        with shielded():
            self._fake.use(raw_bytes(tensor), f"{key} is read without a lease")
        super().append(key)
