"""How long computations wait for copies, by the device's own clock."""

from __future__ import annotations

import threading
from collections import deque

from tierstore.transfer.accelerator import Accelerator, Event

_MANY = 64  # measurements that are left open before those that are known by now are added up


class Stalls:
    """Adds up the time between the moments before and after a stream waited. Nobody waits to know it. Thread-safe."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._lock = threading.Lock()
        self._open: deque[tuple[Event, Event]] = deque()
        self._seconds = 0.0

    def wait(self, event: Event) -> None:
        """Let the current stream of this thread wait for `event`, and measure how long it does."""
        stream = self._accelerator.current()
        before = stream.record_timer()
        stream.wait(event)
        after = stream.record_timer()
        with self._lock:
            self._open.append((before, after))
            if len(self._open) > _MANY:
                self._close_passed()

    def seconds(self) -> float:
        """Return the seconds waited so far; waits that have not ended do not count yet."""
        with self._lock:
            self._close_passed()
            return self._seconds

    def _close_passed(self) -> None:
        while self._open and self._open[0][1].passed():
            before, after = self._open.popleft()
            self._seconds += after.seconds_since(before)
