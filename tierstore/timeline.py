"""What moved when, for a viewer: the Trace Event Format that Perfetto and chrome://tracing read."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

_EVENTS = 200_000  # copies and stalls remembered; older ones are forgotten

Event = dict[str, object]


class Timeline:
    """Copies, stalls and the bytes in each tier over time. Changed under the store's lock."""

    def __init__(self) -> None:
        self._copies: deque[tuple[str, tuple[int, int], int, float, float]] = deque(maxlen=_EVENTS)
        self._stalls: deque[tuple[str, float, float]] = deque(maxlen=_EVENTS)
        self._used: deque[tuple[float, tuple[int, ...]]] = deque(maxlen=_EVENTS)

    def copied(self, key: str, route: tuple[int, int], nbytes: int, start: float, end: float, used: tuple[int, ...]) -> None:
        """Note a copy between two levels, and the bytes `used` in every tier when it had ended; times in seconds."""
        self._copies.append((key, route, nbytes, start, end))
        self._used.append((end, used))

    def stalled(self, operation: str, start: float, end: float) -> None:
        """Note that computing waited from `start` to `end`."""
        self._stalls.append((operation, start, end))

    def events(self, tiers: Sequence[str]) -> list[Event]:
        """Return the events, one row for each link and one for stalls; `tiers` are names by level."""
        events: list[Event] = []
        for key, (source, target), nbytes, start, end in self._copies:
            events.append(_span(key, f"{tiers[source]}->{tiers[target]}", start, end, bytes=nbytes))
        for operation, start, end in self._stalls:
            events.append(_span(operation, "stalls", start, end))
        for moment, used in self._used:
            counts = dict(zip(tiers, used, strict=True))
            events.append({"name": "bytes in tiers", "ph": "C", "pid": 1, "ts": moment * 1e6, "args": counts})
        return events

    def write(self, file: str | os.PathLike[str], tiers: Sequence[str]) -> None:
        """Write the events to `file` as JSON."""
        Path(file).write_text(json.dumps({"traceEvents": self.events(tiers), "displayTimeUnit": "ms"}))


def _span(name: str, row: str, start: float, end: float, **details: object) -> Event:
    return {"name": name, "cat": row, "ph": "X", "pid": 1, "tid": row, "ts": start * 1e6, "dur": (end - start) * 1e6, "args": details}
