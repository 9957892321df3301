"""The engine that stores use: real threads, the real clock."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from tierstore.backend import FileBackend, MemoryBackend
from tierstore.errors import CorruptionError
from tierstore.spec import raw_bytes
from tierstore.transfer.engine import Done, Engine, Transfer, copy_value
from tierstore.transfer.reader import Reader

_WORKERS = 4


class ThreadEngine(Engine):
    """Reads files straight into RAM with a `Reader`; every other copy goes through the backends, in a few worker threads.

    Threads start when they are first needed. The lock is held only to start or end them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: ThreadPoolExecutor | None = None
        self._reader = Reader()

    def carry(self, transfer: Transfer) -> None:
        copy_value(transfer)

    def start(self, transfer: Transfer, done: Done) -> None:
        source, target = transfer.source, transfer.target
        if isinstance(source, FileBackend) and isinstance(target, MemoryBackend) and target.device.type == "cpu":
            self._read(transfer, source, target, done)
            return
        with self._lock:
            if self._workers is None:
                self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="tierstore-copy")
            workers = self._workers
        workers.submit(self._work, transfer, done)

    def _read(self, transfer: Transfer, source: FileBackend, target: MemoryBackend, done: Done) -> None:
        held: list[torch.Tensor] = []

        def landed(error: BaseException | None) -> None:
            tensor = held.pop()
            if error is None:
                target.adopt(transfer.key, tensor)
            del tensor  # whoever is told may evict it, and need its memory, before this frame ends
            if isinstance(error, CorruptionError):
                error = CorruptionError(transfer.key, error.file, error.reason)  # the reader knows no keys
            done(error)

        try:
            extent = source.extent(transfer.key)
            held.append(target.allocate(transfer.spec))
            self._reader.submit(extent, raw_bytes(held[0]), landed)
        except Exception as error:  # noqa: BLE001  (handed to whoever waits for the value)
            done(error)

    @staticmethod
    def _work(transfer: Transfer, done: Done) -> None:
        try:
            copy_value(transfer)
        except BaseException as error:  # noqa: BLE001  (handed to whoever waits for the value)
            done(error)
        else:
            done(None)

    def wait(self, lock: threading.Condition) -> None:
        lock.wait()

    def now(self) -> float:
        return time.perf_counter()

    def close(self) -> None:
        self._reader.close()
        with self._lock:
            workers, self._workers = self._workers, None
        if workers is not None:
            workers.shutdown(wait=True)
