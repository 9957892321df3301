"""Brings files onto a device through a few page-locked slabs: no memory in RAM as large as the value is needed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from tierstore.backend import FileExtent
from tierstore.checksum import PIECE
from tierstore.open_file import PAGE
from tierstore.transfer.accelerator import Accelerator, Event, Stream
from tierstore.transfer.reader import Reader

SLAB_BYTES = PIECE  # one request of the reader, with one checksum; a copy of this size reaches nine tenths of a link's bandwidth
SLABS = 8

Done = Callable[[BaseException | None], None]
When = Callable[[Event, Done], None]
"""Calls its second argument, from some other thread, once an event has passed or has failed."""


class Staging:
    """Reads chunks of files into slabs, in the order of `bring`, and copies each on `stream` as soon as it is read.

    A slab is used again after its copy has passed. Slabs are made when they are first needed. No call waits for a file or
    for the device; the lock is held only to match chunks and slabs.
    """

    def __init__(self, accelerator: Accelerator, stream: Stream, reader: Reader, when: When) -> None:
        self._accelerator = accelerator
        self._stream = stream
        self._reader = reader
        self._when = when
        self._lock = threading.Lock()
        self._waiting: deque[_Chunk] = deque()
        self._free: list[torch.Tensor] | None = None

    def bring(self, extent: FileExtent, target: torch.Tensor, free: Event, done: Done) -> None:
        """Fill `target`, contiguous uint8 memory of the device that may be written to after `free`, with the bytes of `extent`.

        `done` is called once, from another thread, when the last copy is in the stream, or with the first error once no
        chunk is under way any more. `target` is not referred to by then. The file must keep its name until then.
        """
        job = _Job(extent, target, free, done)
        with self._lock:
            if self._free is None:
                self._free = [self._accelerator.allocate_page_locked(PAGE + SLAB_BYTES) for _ in range(SLABS)]
            self._waiting += job.chunks()
        self._go_on()

    def _go_on(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or not self._free:
                    return
                chunk, slab = self._waiting.popleft(), self._free.pop()
            self._read(chunk, slab)

    def _read(self, chunk: _Chunk, slab: torch.Tensor) -> None:
        if chunk.job.error is not None:  # of no use any more
            self._give_back(slab)
            chunk.job.end(None)
            return
        try:
            self._reader.submit(chunk.extent(), chunk.part_of(slab), partial(self._was_read, chunk, slab))
        except Exception as error:  # noqa: BLE001  (handed to whoever waits for the value)
            self._give_back(slab)
            chunk.job.end(error.with_traceback(None))

    def _was_read(self, chunk: _Chunk, slab: torch.Tensor, error: BaseException | None) -> None:
        if error is None:
            try:
                self._copy(chunk, slab)
            except RuntimeError as failure:
                error = failure.with_traceback(None)
        if error is not None:
            self._give_back(slab)
            self._go_on()
        chunk.job.end(error)

    def _copy(self, chunk: _Chunk, slab: torch.Tensor) -> None:
        self._stream.wait(chunk.job.free)
        with torch.inference_mode(False), torch.no_grad(), self._accelerator.on(self._stream):
            self._accelerator.copy(chunk.target(), chunk.part_of(slab))
        self._when(self._stream.record(), partial(self._copied, slab))

    def _copied(self, slab: torch.Tensor, error: BaseException | None) -> None:
        self._give_back(slab)  # also after an error: then the device is lost, and what comes must fail, not wait
        self._go_on()

    def _give_back(self, slab: torch.Tensor) -> None:
        with self._lock:
            assert self._free is not None
            self._free.append(slab)


class _Job:
    """One value on its way: counts the chunks that have not ended, and keeps the first error."""

    def __init__(self, extent: FileExtent, target: torch.Tensor, free: Event, done: Done) -> None:
        self.extent = extent
        self.free = free
        self.target: torch.Tensor | None = target
        self.error: BaseException | None = None
        self._done = done
        self._lock = threading.Lock()
        self._pending = 0

    def chunks(self) -> list[_Chunk]:
        """Cut it into chunks of a slab each; an empty value is one empty chunk."""
        chunks = [_Chunk(self, start) for start in range(0, max(self.extent.nbytes, 1), SLAB_BYTES)]
        self._pending = len(chunks)
        return chunks

    def end(self, error: BaseException | None) -> None:
        """Count one chunk as ended; the last one reports."""
        with self._lock:
            self.error = self.error or error
            self._pending -= 1
            if self._pending:
                return
        self.target = None
        self._done(self.error)


class _Chunk:
    """A part of a value that one slab holds; `start` counts from the value's first byte."""

    def __init__(self, job: _Job, start: int) -> None:
        self.job = job
        self.start = start
        self.nbytes = min(SLAB_BYTES, job.extent.nbytes - start)

    def extent(self) -> FileExtent:
        return self.job.extent.part(self.start, self.nbytes)

    def part_of(self, slab: torch.Tensor) -> torch.Tensor:
        """Return where it goes in a slab: as far after a page as in the file, so that it can be read around the page cache."""
        phase = (self.job.extent.offset + self.start) % PAGE
        return slab[phase : phase + self.nbytes]

    def target(self) -> torch.Tensor:
        assert self.job.target is not None
        return self.job.target[self.start : self.start + self.nbytes]
