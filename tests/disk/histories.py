"""Whether a history of reads and writes of one key could have come from a store that does one operation after the other.

Every value is written once, so a read says which write it has seen. `start` and `end` are moments of one clock, between
which the operation took place.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

MISSING = 0
"""The value of a key that is deleted, or not written yet: the only one that may be written more than once."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One read or write of a key; `after` is the moment up to which a read has to have seen what had ended by then."""

    value: int
    start: float
    end: float
    after: float

    @classmethod
    def of(cls, value: int, start: float, end: float) -> Operation:
        return cls(value, start, end, start)


@dataclass(slots=True)
class _Zone:
    """When a value was the key's: from `low`, by which it was written or read, to `high`, when its last read began."""

    write: Operation
    low: float
    high: float
    reads: list[Operation] = field(default_factory=list)


def check_register(writes: Sequence[Operation], reads: Sequence[Operation]) -> str | None:
    """Return what is not linearizable in a history of a key that is never deleted, whoever writes it; None if all is well.

    A value's zone lies between the first end and the last start of its operations. The history is linearizable exactly if no
    two zones that run forward overlap and none that runs backward lies inside one that runs forward (Gibbons and Korach,
    Testing Shared Memories, 1997).
    """
    zones = {write.value: _Zone(write, write.end, write.start) for write in writes}
    for read in reads:
        zone = zones.get(read.value)
        if zone is None:
            return f"{read} saw what nobody wrote"
        if read.end < zone.write.start:
            return f"{read} saw {zone.write} before that began"
        zone.low, zone.high = min(zone.low, read.end), max(zone.high, read.start)
    forward = sorted((zone for zone in zones.values() if zone.low < zone.high), key=lambda zone: zone.low)
    for one, next_one in pairwise(forward):
        if next_one.low < one.high:
            return f"{one.write} and {next_one.write} were each seen after the other"
    starts = [zone.low for zone in forward]
    for zone in zones.values():
        if zone.low >= zone.high:
            around = forward[bisect_left(starts, zone.high) - 1] if bisect_left(starts, zone.high) else None
            if around is not None and around.low < zone.high and zone.low < around.high:
                return f"{zone.write} took place while {around.write} was seen before and after"
    return None


def check_single_writer(writes: Sequence[Operation], reads: Sequence[Operation]) -> str | None:
    """Return what is not linearizable in a history of a key that one thread at a time writes and deletes.

    Reads in the order of their starts take the oldest write that they can have seen: not older than the last that had ended
    `after` the moment from which a read must see, nor than what a read that ended before had seen.
    """
    begun, ended = [write.start for write in writes], [write.end for write in writes]
    by_value: dict[int, list[int]] = {}
    for number, write in enumerate(writes):
        by_value.setdefault(write.value, []).append(number)
    seen: list[tuple[float, int]] = []  # by end, with the highest number that was seen by then
    for read in sorted(reads, key=lambda each: each.start):
        before = bisect_left(seen, (read.start, -1)) - 1
        lowest = max(bisect_left(ended, read.after) - 1, seen[before][1] if before >= 0 else -1, 0)
        highest = bisect_right(begun, read.end) - 1
        numbers = by_value.get(read.value, [])
        place = bisect_left(numbers, lowest)
        if place == len(numbers) or numbers[place] > highest:
            return f"{read} saw none of the {highest - lowest + 1} writes that it can have seen, from {writes[lowest]} on"
        _note(seen, read.end, numbers[place])
    return None


def _note(seen: list[tuple[float, int]], end: float, number: int) -> None:
    """Insert into `seen`, in which ends and numbers both rise."""
    place = bisect_left(seen, (end, -1))
    if place and seen[place - 1][1] >= number:
        return
    last = place
    while last < len(seen) and seen[last][1] <= number:
        last += 1
    seen[place:last] = [(end, number)]


def check_stale_reader(writes: Sequence[Operation], reads: Sequence[Operation]) -> str | None:
    """Return what is wrong in reads of one process that sees a key, which is never deleted, as it was at some moment since `after`.

    It must not see what nobody wrote, what had been replaced by that moment, or a value that is older than one it saw before.
    """
    by_value = {write.value: write for write in writes}
    by_end = sorted(writes, key=lambda write: write.end)
    ends, latest = [write.end for write in by_end], list[float]()
    for write in by_end:
        latest.append(max(write.start, latest[-1] if latest else write.start))
    newest = -1.0
    for read in sorted(reads, key=lambda each: each.start):
        write = by_value.get(read.value)
        if write is None:
            return f"{read} saw what nobody wrote"
        if read.end < write.start:
            return f"{read} saw {write} before that began"
        place = bisect_left(ends, read.after) - 1
        if place >= 0 and latest[place] > write.end:
            return f"{read} saw {write}, which had been replaced by {read.after}"
        if write.end < newest:
            return f"{read} saw {write}, older than what had been seen before"
        newest = max(newest, write.start)
    return None
