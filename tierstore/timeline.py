"""What moved when, for a viewer: the Trace Event Format that Perfetto and chrome://tracing read."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

_EVENTS = 1 << 15  # copies, stalls and so on remembered, in up to 20 MiB; older ones are forgotten

Event = dict[str, object]


class Timeline:
    """Copies, stalls, what was where and the bytes in each tier over time. Changed under the store's lock."""

    def __init__(self) -> None:
        self._copies: deque[tuple[str, tuple[int, int], int, float, float]] = deque(maxlen=_EVENTS)
        self._moves: deque[tuple[float, str, int, bool]] = deque(maxlen=_EVENTS)  # when which value came into a tier, or left it
        self.stalls: deque[tuple[str, float, float]] = deque(maxlen=_EVENTS)
        self.used: deque[tuple[float, tuple[int, ...]]] = deque(maxlen=_EVENTS)

    def copied(self, key: str, route: tuple[int, int], nbytes: int, start: float, end: float, used: tuple[int, ...]) -> None:
        """Note a copy between two levels, and the bytes `used` in every tier when it had ended; times in seconds."""
        self._copies.append((key, route, nbytes, start, end))
        self.used.append((end, used))

    def stalled(self, operation: str, start: float, end: float) -> None:
        """Note that computing waited from `start` to `end`."""
        self.stalls.append((operation, start, end))

    def moved(self, moment: float, key: str, level: int, *, came: bool) -> None:
        """Note that a value came into the tier at `level`, or left it."""
        self._moves.append((moment, key, level, came))

    def stays(self, level: int) -> dict[str, list[tuple[float, float]]]:
        """Return from when to when each value was in a tier; what is still there until the last thing that was noted."""
        stays: dict[str, list[tuple[float, float]]] = {}
        since: dict[str, float] = {}
        moment = 0.0
        for moment, key, where, came in self._moves:
            if where != level:
                continue
            if came:
                since.setdefault(key, moment)
                stays.setdefault(key, [])
            elif key in since:
                stays[key].append((since.pop(key), moment))
        for key, start in since.items():
            stays[key].append((start, moment))
        return stays

    def events(self, tiers: Sequence[str]) -> list[Event]:
        """Return the events, one row for each link and one for stalls; `tiers` are names by level."""
        events: list[Event] = []
        for key, (source, target), nbytes, start, end in self._copies:
            events.append(_span(key, f"{tiers[source]}->{tiers[target]}", start, end, bytes=nbytes))
        for operation, start, end in self.stalls:
            events.append(_span(operation, "stalls", start, end))
        for moment, used in self.used:
            counts = dict(zip(tiers, used, strict=True))
            events.append({"name": "bytes in tiers", "ph": "C", "pid": 1, "ts": moment * 1e6, "args": counts})
        return events

    def write(self, file: str | os.PathLike[str], tiers: Sequence[str]) -> None:
        """Write the events to `file` as JSON."""
        Path(file).write_text(json.dumps({"traceEvents": self.events(tiers), "displayTimeUnit": "ms"}))


def _span(name: str, row: str, start: float, end: float, **details: object) -> Event:
    return {"name": name, "cat": row, "ph": "X", "pid": 1, "tid": row, "ts": start * 1e6, "dur": (end - start) * 1e6, "args": details}
