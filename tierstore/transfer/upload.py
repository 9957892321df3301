"""Copies into the memory of an accelerator, on a stream of their own."""

from __future__ import annotations

from functools import partial

import torch

from tierstore.backend import FileBackend, MemoryBackend
from tierstore.entry import Ready
from tierstore.errors import CorruptionError
from tierstore.spec import raw_bytes
from tierstore.transfer.accelerator import Accelerator, Event, Stream
from tierstore.transfer.engine import Arrived, Done, Transfer
from tierstore.transfer.order import StreamOrder
from tierstore.transfer.reader import Reader
from tierstore.transfer.staging import Staging, When
from tierstore.transfer.stalls import Stalls


class Arrival(Ready):
    """What follows `event`, the mark behind whatever filled a value in memory of `owner`."""

    def __init__(self, event: Event, owner: Stream, stalls: Stalls) -> None:
        self.event = event
        self._owner = owner
        self._stalls = stalls

    def wait(self) -> None:
        if not self.event.passed():
            self._stalls.wait(self.event)

    def passed(self) -> bool:
        return self.event.passed()

    def retire(self) -> None:
        self._owner.wait(self.event)


class Landing:
    """One value on its way into `target`. `memory`, of `owner`, is referred to until the value has arrived or has failed.

    `free`: the mark after which the memory may be written to.
    """

    __slots__ = ("arrived", "done", "free", "memory", "owner", "target", "transfer")

    def __init__(self, transfer: Transfer, target: MemoryBackend, done: Done, arrived: Arrived) -> None:
        self.transfer = transfer
        self.target = target
        self.done = done
        self.arrived = arrived
        self.memory: torch.Tensor | None = None
        self.owner: Stream | None = None
        self.free: Event | None = None

    def raw(self) -> torch.Tensor:
        """Return the memory as bytes."""
        assert self.memory is not None
        with torch.inference_mode(False), torch.no_grad():
            return raw_bytes(self.memory)


class Uploads:
    """Fills new memory of the device and reports: `arrived` as soon as the copy is in the stream, `done` when it has ended.

    A value that fails is reported when nothing writes to its memory any more. Safe to call from several threads.
    """

    def __init__(self, accelerator: Accelerator, order: StreamOrder, stalls: Stalls, reader: Reader, when: When) -> None:
        self._accelerator = accelerator
        self._order = order
        self._stalls = stalls
        self._when = when
        self._stream = accelerator.new_stream()
        self._staging = Staging(accelerator, self._stream, reader, when)

    def make_room(self, landing: Landing) -> bool:
        """Allocate memory for a value, first of all; False, and reported, if there is none.

        Whoever starts a fetch does this at once: what is put into the owner later, which may be much when the host runs
        ahead of the device, need not end before the copy begins.
        """
        try:
            landing.memory, landing.owner = self._order.allocate(landing.target, landing.transfer.key, landing.transfer.spec)
            landing.free = landing.owner.record()
        except Exception as error:  # noqa: BLE001  (handed to whoever waits for the value)
            self._fail(landing, [], error)
            return False
        return True

    def copy(self, landing: Landing) -> None:
        """Copy what the source hands out. Waits for the copy where that is not page-locked memory."""
        kept: list[torch.Tensor] = []  # the device reads it: nobody may have its memory before the copy has ended
        try:
            kept.append(raw_bytes(landing.transfer.source.get(landing.transfer.key)))
            assert landing.free is not None
            self._stream.wait(landing.free)
            with torch.inference_mode(False), torch.no_grad(), self._accelerator.on(self._stream):
                self._accelerator.copy(landing.raw(), kept[0])
            event = self._place(landing)
        except Exception as error:  # noqa: BLE001  (handed to whoever waits for the value)
            self._fail(landing, kept, error)
        else:
            self._report(landing, kept, event)

    def read(self, landing: Landing, source: FileBackend) -> bool:
        """Read the value's file into slabs and copy these; returns before that is done. False if no file has it as it is."""
        try:
            extent = source.extent(landing.transfer.key)
            if extent is None:
                return False
            assert landing.free is not None
            self._staging.bring(extent, landing.raw(), landing.free, partial(self._was_read, landing))
        except Exception as error:  # noqa: BLE001  (handed to whoever waits for the value)
            self._fail(landing, [], error)
        return True

    def _was_read(self, landing: Landing, error: BaseException | None) -> None:
        if isinstance(error, CorruptionError):
            error = CorruptionError(landing.transfer.key, error.file, error.reason)  # the reader knows no keys
        if error is not None:
            self._fail(landing, [], error)
            return
        try:
            event = self._place(landing)
        except Exception as failure:  # noqa: BLE001  (handed to whoever waits for the value)
            self._fail(landing, [], failure)
        else:
            self._report(landing, [], event)

    def _place(self, landing: Landing) -> Event:
        """Hand the memory, whose copies are in the stream, to the backend."""
        event = self._stream.record()
        assert landing.memory is not None
        landing.target.adopt(landing.transfer.key, landing.memory)
        return event

    def _report(self, landing: Landing, kept: list[torch.Tensor], event: Event) -> None:
        assert landing.owner is not None
        landing.memory = None  # it is the entry's: who evicts that must be the last to refer to it
        try:
            landing.arrived(Arrival(event, landing.owner, self._stalls))
        finally:
            self._when(event, partial(_end, kept, landing.done))

    def _fail(self, landing: Landing, kept: list[torch.Tensor], error: BaseException) -> None:
        error = error.with_traceback(None)  # whose frames refer to memory
        if landing.memory is None:
            landing.done(error)
            return
        try:
            event = self._stream.record()
        except RuntimeError:  # the device is lost
            self._failed(landing, kept, error, None)
        else:
            self._when(event, partial(self._failed, landing, kept, error))

    def _failed(self, landing: Landing, kept: list[torch.Tensor], error: BaseException, _: BaseException | None) -> None:
        assert landing.memory is not None
        self._order.forget(landing.memory)
        landing.memory = None
        kept.clear()
        landing.done(error)


def _end(kept: list[torch.Tensor], done: Done, error: BaseException | None) -> None:
    kept.clear()
    done(error)
