"""Reads extents of files into CPU memory with a few threads, around the page cache wherever it does not have them already.

[Note: in order, and one after the other]
A device shares itself among the requests that it has. If several values are read at once they all arrive at the same time:
the one that is needed first comes as late as the one that is needed last, and then the device has nothing to do until the
first has been used and has left. So what is read around the page cache is read one value after the other, in one request
that the system takes apart: that keeps a device as busy as several (where the memory is in no cache of the processor), and
wakes fewer threads. The next value is prepared meanwhile, and when one has been read its thread goes on with that at once;
to tell of what was read is left to another thread, since that takes longer than a device should stand idle. Small values,
which alone do not keep it busy, wait for nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count, pairwise
from queue import SimpleQueue
from typing import Protocol

import torch

from tierstore.backend import FileExtent
from tierstore.checksum import PIECE
from tierstore.errors import ClosedError
from tierstore.open_file import PAGE, OpenFile, Readable

_LARGE = 4 << 20  # bytes of which one request keeps a device busy

Done = Callable[[BaseException | None], None]
Prepare = Callable[[], tuple[FileExtent, torch.Tensor] | None]


class Reader:
    """Serves requests of at most `request_bytes` in the order of `submit` with `threads` threads, started at the first one.

    Extents are cut into requests, so that the device has several at once also for one large value, unless one is enough (see
    the note). An extent holds a file descriptor from `submit` on, and one more while it is read. Safe to call from several
    threads; its lock is held while a file is opened and queued, never while one is read.
    """

    def __init__(self, threads: int = 4, request_bytes: int = 8 << 20) -> None:
        if threads < 1 or request_bytes < 1:
            raise ValueError(f"a reader needs at least one thread and one byte, got threads={threads}, request_bytes={request_bytes}")
        self._count = threads
        self._request_bytes = -(-request_bytes // PAGE) * PAGE  # so that each request ends at a page's border
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._queue: SimpleQueue[_Step | None] = SimpleQueue()
        self._closed = False
        self._numbers = count()
        self._line = _Line()

    def submit(self, extent: FileExtent, out: torch.Tensor, done: Done) -> None:
        """Read the bytes of `extent` into `out`, a contiguous uint8 CPU tensor of just that size, and call `done` once.

        The file is opened before this returns. `done` is called from a reader thread when nothing writes to `out` any more,
        with None or the first error (`OSError`; `CorruptionError` for a file that ends too early, or bytes that do not match
        the extent's proof). It must not raise, nor wait for another extent. `out` is kept alive until all is read, and no
        longer when `done` is called.
        """
        _check_memory(extent, out)
        with self._lock:
            self._check_open()
            for request in _requests(_Job(extent, out, done), self._request_bytes):
                self._queue.put(request)

    def begin(self, prepare: Prepare, done: Done) -> None:
        """Like `submit` of what `prepare` returns, which a reader thread calls when it comes to it.

        None means that nothing is left to read. What `prepare` raises is handed to `done` if it is an `Exception`.
        """
        with self._lock:
            self._check_open()
            self._queue.put(_Beginning(self, next(self._numbers), prepare, done))

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this reader is closed; make a new one")
        self._start()

    def share_out(self, job: _Job, number: int) -> list[_Request]:
        """Leave parts of `job` to whichever thread is free; return those that this thread has to read, after what comes before."""
        if job.in_one_go:
            if self._line.join(number, job):
                self._read_in_turn()
            return []
        requests = _requests(job, self._request_bytes)
        return requests[:1] if self._leave(requests[1:]) else requests

    def _read_in_turn(self) -> None:
        """Read one whole extent after the other until none is left."""
        job = self._line.next()
        while job is not None:
            request = _Request(job, 0, job.extent.nbytes)
            error = request.attempt()
            job = self._line.next()
            end = _End(request.job, error)
            if job is None or not self._leave([end]):
                end.serve()

    def _leave(self, steps: Sequence[_Step]) -> bool:
        """Leave steps to other threads; False if those are ending."""
        with self._lock:
            if not self._closed:
                for step in steps:
                    self._queue.put(step)
            return not self._closed

    def close(self) -> None:
        """Wait until everything submitted has been read, and end the threads. Not to be called from a `done`."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        while len(self._threads) < self._count:
            name = f"tierstore-read-{len(self._threads)}"
            thread = threading.Thread(target=_serve, args=(self._queue,), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)


class _Job:
    """One extent on its way: counts the requests that have not ended, and keeps the first error."""

    def __init__(self, extent: FileExtent, out: torch.Tensor, done: Done) -> None:
        self.extent = extent
        self.pending = 1
        self._memory = out.numpy().data  # keeps `out` alive
        self._done = done
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._file: Readable | None = None
        try:
            self._file = OpenFile.of(extent.path, extent.file)
        except OSError as error:
            self._error = error.with_traceback(None)

    @property
    def in_one_go(self) -> bool:
        """True if the system is to take it apart."""
        return self.extent.nbytes >= _LARGE and self.extent.proof is None and self._file is not None and self._file.direct

    def read(self, start: int, stop: int) -> None:
        """Read and check a part of the extent, unless an error has made it useless; start and stop count from its start."""
        if self._file is None or self._error is not None:
            return
        part = self._memory[start:stop]
        self._file.read(part, self.extent.offset + start)
        if part:
            self.extent.check(start, part)

    def end(self, error: BaseException | None) -> None:
        """Count one request as ended; the last one closes the file and reports."""
        with self._lock:
            self._error = self._error or error
            self.pending -= 1
            if self.pending:
                return
        if self._file is not None:
            self._file.close()
        self._memory = memoryview(b"")  # who is told may evict the value before this job is gone, and needs its memory
        self._done(self._error)


class _Line:
    """The extents that wait to be read one after the other, and whether a thread reads them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, _Job]] = []  # a heap
        self._reading = False

    def join(self, number: int, job: _Job) -> bool:
        """Let `job` wait; True if nobody reads, and then the caller has to, until `next` returns None."""
        with self._lock:
            heappush(self._waiting, (number, job))
            idle, self._reading = not self._reading, True
            return idle

    def next(self) -> _Job | None:
        """Take the job of the lowest number."""
        with self._lock:
            if self._waiting:
                return heappop(self._waiting)[1]
            self._reading = False
            return None


class _Step(Protocol):
    """What a thread does at one go."""

    def serve(self) -> None: ...


class _Beginning:
    """An extent that nobody has looked for yet."""

    def __init__(self, reader: Reader, number: int, prepare: Prepare, done: Done) -> None:
        self._reader = reader
        self._number = number
        self._prepare = prepare
        self._done = done

    def serve(self) -> None:
        for request in self._requests():
            request.serve()

    def _requests(self) -> list[_Request]:
        """Return what this thread reads; a function of its own, so that no frame holds the memory when the reading has ended."""
        try:
            prepared = self._prepare()
            if prepared is not None:
                _check_memory(*prepared)
        except Exception as error:  # noqa: BLE001  (handed to whoever waits for the value)
            self._done(error.with_traceback(None))
            return []
        if prepared is None:
            self._done(None)
            return []
        return self._reader.share_out(_Job(*prepared, self._done), self._number)


class _Request:
    """A part of an extent, read by one thread."""

    def __init__(self, job: _Job, start: int, stop: int) -> None:
        self.job = job
        self._start = start
        self._stop = stop

    def serve(self) -> None:
        self.job.end(self.attempt())

    def attempt(self) -> Exception | None:
        """Read it; return what went wrong, whatever that is: a value that is never reported would be waited for for ever."""
        try:
            self.job.read(self._start, self._stop)
        except Exception as failure:  # noqa: BLE001  (handed to whoever waits for the value)
            # with its traceback it would keep this frame, and so the memory, until the garbage collector comes
            return failure.with_traceback(None)
        return None


class _End:
    """The end of a request that another thread has read."""

    def __init__(self, job: _Job, error: Exception | None) -> None:
        self._job = job
        self._error = error

    def serve(self) -> None:
        self._job.end(self._error)


def _check_memory(extent: FileExtent, out: torch.Tensor) -> None:
    if out.dtype is not torch.uint8 or out.device.type != "cpu" or not out.is_contiguous() or out.numel() != extent.nbytes:
        raise ValueError(
            f"reading {extent.nbytes} bytes needs a contiguous uint8 CPU tensor of that size, "
            f"got {out.dtype} {tuple(out.shape)} on {out.device}"
        )


def _requests(job: _Job, size: int) -> list[_Request]:
    """Cut an extent into requests that end where the file's pages do, or where the pieces do that are checked one by one.

    An empty one still makes one request.
    """
    offset, nbytes = job.extent.offset, job.extent.nbytes
    step, first = (size, size - offset % PAGE) if job.extent.proof is None else (PIECE, PIECE)
    cuts = [0, *range(first, nbytes, step), nbytes]
    requests = [_Request(job, start, stop) for start, stop in pairwise(cuts)]
    job.pending = len(requests)
    return requests


def _serve(queue: SimpleQueue[_Step | None]) -> None:
    while _serve_next(queue):
        pass


def _serve_next(queue: SimpleQueue[_Step | None]) -> bool:
    """Take one step; a function of its own, so that a thread that waits holds no memory of the one before."""
    step = queue.get()
    if step is not None:
        step.serve()
    return step is not None
