"""The engine for a fastest tier in the memory of an accelerator: copies have streams of their own, and nobody waits for them.

See the note in `order` for why no copy meets a computation.
"""

from __future__ import annotations

from contextlib import suppress

import torch

from tierstore.backend import Backend, FileBackend, MemoryBackend
from tierstore.entry import Ready
from tierstore.errors import TierStoreError
from tierstore.spec import raw_bytes, typed_view
from tierstore.transfer.accelerator import Accelerator, Event
from tierstore.transfer.engine import Arrived, Done, Engine, Transfer
from tierstore.transfer.order import StreamOrder
from tierstore.transfer.reader import Reader
from tierstore.transfer.stalls import Stalls
from tierstore.transfer.threads import WORKERS, ThreadEngine
from tierstore.transfer.torch_streams import accelerator_of
from tierstore.transfer.upload import Arrival, Landing, Uploads


class StreamEngine(ThreadEngine):
    """Copies into and out of level 0 on streams of `accelerator`; everything else as its parent does.

    What lies in page-locked memory is put into the stream by whoever starts it; what has to be read first, by a worker or
    a reader. One thread waits for the ends of copies, in their order, and tells of them. A fetch that finds no memory
    ends with torch's `OutOfMemoryError`.
    """

    computes_now = False

    def __init__(self, accelerator: Accelerator, reader: Reader | None = None) -> None:
        super().__init__(reader)
        self._accelerator = accelerator
        self._order = StreamOrder(accelerator)
        self._stalls = Stalls(accelerator)
        self._uploads = Uploads(accelerator, self._order, self._stalls, self._reader, self._when)
        self._down = accelerator.new_stream()

    def computing(self) -> None:
        self._order.note()

    def gather(self) -> None:
        self._order.join(self._accelerator.current())

    def parting(self, tensor: torch.Tensor) -> None:
        self._order.part(tensor)

    def stall_seconds(self) -> float:
        return self._stalls.seconds()

    def put(self, target: Backend, level: int, key: str, tensor: torch.Tensor) -> Ready | None:
        if level != 0:
            return super().put(target, level, key, tensor)
        stream = self._order.note()
        target.put(key, tensor)  # allocates, and copies, on this thread's stream
        self._order.own(target.get(key), stream)
        return Arrival(stream.record(), stream, self._stalls)

    def start(self, transfer: Transfer, done: Done, arrived: Arrived) -> None:
        source, target = transfer.source, transfer.target
        if transfer.route[1] != 0 or not isinstance(target, MemoryBackend):
            super().start(transfer, done, arrived)
            return
        landing = Landing(transfer, target, done, arrived)
        if not self._uploads.make_room(landing):
            return
        if isinstance(source, FileBackend):
            self._pool("issue", 1).submit(self._read, landing, source)
        elif isinstance(source, MemoryBackend) and self._page_locked(source, transfer.key):
            self._uploads.copy(landing)
        else:
            self._pool("copy", WORKERS).submit(self._uploads.copy, landing)

    def _read(self, landing: Landing, source: FileBackend) -> None:
        if not self._uploads.read(landing, source):  # it has to be computed
            self._pool("copy", WORKERS).submit(self._uploads.copy, landing)

    def _page_locked(self, source: MemoryBackend, key: str) -> bool:
        """True if no thread has to wait for the copy of a value; one that cannot be got is left to a worker, who reports that."""
        with suppress(OSError, KeyError, TierStoreError):
            return self._accelerator.page_locked(source.get(key))
        return False

    def carry(self, transfer: Transfer) -> None:
        if transfer.route[0] != 0:
            super().carry(transfer)
            return
        target = transfer.target
        lower = _to_lower(transfer, target)
        self._download(transfer, lower)
        if isinstance(target, MemoryBackend):
            target.adopt(transfer.key, lower)
        else:
            target.put(transfer.key, lower)

    def _download(self, transfer: Transfer, lower: torch.Tensor) -> None:
        """Fill `lower` with the value on the device, and wait until it is: from now on the host may read it."""
        value = transfer.source.get(transfer.key)
        self._order.join(self._down)
        if isinstance(transfer.ready, Arrival):
            self._down.wait(transfer.ready.event)
        with torch.inference_mode(False), torch.no_grad(), self._accelerator.on(self._down):
            self._accelerator.copy(raw_bytes(lower), raw_bytes(value))
        self._down.record().synchronize()

    def _when(self, event: Event, then: Done) -> None:
        """Call `then` once `event` has passed, after all that were asked for before it."""
        self._pool("watch", 1).submit(_watch, event, then)

    def close(self) -> None:
        self._end("issue")  # before the reader, which it submits to
        super().close()
        self._end("watch")  # last, since all the others submit to it
        self._order.close()


def engine_for(fastest: Backend) -> Engine:
    """Return the engine for a store whose fastest tier is `fastest`."""
    accelerator = accelerator_of(fastest.device) if isinstance(fastest, MemoryBackend) else None
    return ThreadEngine() if accelerator is None else StreamEngine(accelerator)


def _watch(event: Event, then: Done) -> None:
    error: BaseException | None = None
    try:
        event.synchronize()
    except RuntimeError as failure:
        error = failure.with_traceback(None)
    then(error)


def _to_lower(transfer: Transfer, target: Backend) -> torch.Tensor:
    """Return memory for a value that comes down: the target's own where that is memory, else plain RAM for its `put`."""
    if isinstance(target, MemoryBackend):
        return target.allocate(transfer.key, transfer.spec)
    return typed_view(torch.empty(transfer.spec.nbytes, dtype=torch.uint8, device="cpu"), transfer.spec)
