"""The engine that stores use: real threads, the real clock."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from tierstore.transfer.engine import Done, Engine, Transfer, copy_value

_WORKERS = 4


class ThreadEngine(Engine):
    """Copies through the backends in a few worker threads, which start with the first background copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: ThreadPoolExecutor | None = None

    def carry(self, transfer: Transfer) -> None:
        copy_value(transfer)

    def start(self, transfer: Transfer, done: Done) -> None:
        with self._lock:
            if self._workers is None:
                self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="tierstore-copy")
            workers = self._workers
        workers.submit(self._work, transfer, done)

    def _work(self, transfer: Transfer, done: Done) -> None:
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
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.shutdown(wait=True)
