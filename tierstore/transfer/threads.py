"""The engine that stores use: real threads, the real clock."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor

import torch

from tierstore.backend import FileBackend, FileExtent, MemoryBackend
from tierstore.errors import CorruptionError
from tierstore.open_file import PAGE
from tierstore.spec import raw_bytes
from tierstore.transfer.engine import Arrived, Done, Engine, Transfer, copy_value
from tierstore.transfer.reader import Reader

WORKERS = 8  # most of them wait: a durable write does so for the device several times


class ThreadEngine(Engine):
    """Reads files straight into RAM with a `Reader`; every other copy goes through the backends, in a few worker threads.

    Threads start when they are first needed. The lock is held only to start or end them.

    [Note: who prepares a read]
    The thread that reads also looks for the file and allocates the memory. That takes both off the thread that computes, and
    what is allocated for a value (its tensor and storage objects, which live as long as it is resident) comes from another
    part of the heap. In the computing thread's part such objects, a few hundred bytes each, lie between buffers of many
    megabytes and keep freed ones from being joined: the heap grew by 10 to 20 % of the weights (glibc). And while all cores
    compute, each time that a thread has to be woken or waits for the interpreter may take a millisecond, as long as reading
    a few megabytes: so there is one thread from beginning to end, and as few system calls as there can be.
    """

    def __init__(self, reader: Reader | None = None) -> None:
        self._lock = threading.Lock()
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._reader = Reader() if reader is None else reader

    def carry(self, transfer: Transfer) -> None:
        copy_value(transfer)

    def start(self, transfer: Transfer, done: Done, arrived: Arrived) -> None:
        source, target = transfer.source, transfer.target
        if isinstance(source, FileBackend) and isinstance(target, MemoryBackend) and target.device.type == "cpu":
            read = _FileRead(transfer, source, target, done)
            self._reader.begin(read.prepare, read.landed)
        else:
            self._pool("copy", WORKERS).submit(self._work, transfer, done)

    def _pool(self, name: str, threads: int) -> Executor:
        with self._lock:
            if name not in self._pools:
                self._pools[name] = ThreadPoolExecutor(threads, thread_name_prefix=f"tierstore-{name}")
            return self._pools[name]

    def _work(self, transfer: Transfer, done: Done) -> None:
        try:
            self.carry(transfer)
        except BaseException as error:  # noqa: BLE001  (handed to whoever waits for the value)
            done(error)
        else:
            done(None)

    def wait(self, lock: threading.Condition) -> None:
        lock.wait()

    def now(self) -> float:
        return time.perf_counter()

    def close(self) -> None:
        self._end("copy")
        self._reader.close()

    def _end(self, name: str) -> None:
        """End the threads of a pool after all that was submitted to it."""
        with self._lock:
            pool = self._pools.pop(name, None)
        if pool is not None:
            pool.shutdown(wait=True)


class _FileRead:
    """A value on its way from a file into memory of the tier that it goes to."""

    def __init__(self, transfer: Transfer, source: FileBackend, target: MemoryBackend, done: Done) -> None:
        self._transfer = transfer
        self._source = source
        self._target = target
        self._done = done
        self._tensor: torch.Tensor | None = None

    def prepare(self) -> tuple[FileExtent, torch.Tensor] | None:
        """Find the bytes and allocate memory for them; a value that no file has as it is is put there at once."""
        key, spec = self._transfer.key, self._transfer.spec
        extent = self._source.extent(key)
        if extent is None:
            self._tensor = self._target.allocate(key, spec)
            self._source.fill(key, self._tensor)
            return None
        phase = extent.offset % PAGE
        self._tensor = self._target.allocate(key, spec, phase if phase % spec.dtype.itemsize == 0 else 0)
        return extent, self._tensor if spec.is_bytes else raw_bytes(self._tensor)

    def landed(self, error: BaseException | None) -> None:
        tensor, self._tensor = self._tensor, None
        if error is None and tensor is not None:
            self._target.adopt(self._transfer.key, tensor)
        del tensor  # whoever is told may evict it, and need its memory, before this frame ends
        if isinstance(error, CorruptionError):
            error = CorruptionError(self._transfer.key, error.file, error.reason)  # the reader knows no keys
        self._done(error)
