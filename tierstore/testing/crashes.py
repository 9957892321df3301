"""What a disk may look like after the power went: builds the states that a crash can leave after each call of a recording.

The rules are those that file systems promise, and no more. What was written to a file since it was last flushed is there or
not for each sector of 512 bytes by itself, and so is each change of its length. What has happened to a name since its
directory was last flushed is there or not, and a rename as a whole. The database of the index is SQLite's to protect: it is
taken as it is at that moment, and in the middle of a commit with any of the log's sectors that the commit writes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tierstore.testing.recording import DATABASE, Bind, Database, Node, Op, Parts, Recorder, Resize, Sync, Write

SECTOR = 512  # bytes

Keep = Callable[[], bool]


@dataclass
class Disk:
    """What is on the device for certain after some of the calls, and what may be."""

    root: Node
    files: dict[Node, bytes] = field(default_factory=dict)
    names: dict[Node, dict[str, Node]] = field(default_factory=dict)
    pending: dict[Node, list[Write | Resize | Bind]] = field(default_factory=dict)
    parts: Parts = field(default_factory=dict)

    def apply(self, op: Op) -> None:
        """Take one more call into account."""
        if isinstance(op, Write | Resize):
            self.pending.setdefault(op.node, []).append(op)
        elif isinstance(op, Bind):
            self.pending.setdefault(op.folder, []).append(op)
        elif isinstance(op, Database):
            self.parts = op.parts
        elif isinstance(op, Sync):
            if op.node.folder:
                self.names[op.node] = self.names_with(op.node, _always)
            else:
                self.files[op.node] = self.bytes_with(op.node, _always)
            self.pending.pop(op.node, None)

    def bytes_with(self, node: Node, keep: Keep) -> bytes:
        """Return a file's bytes with those of the pending changes that `keep` says yes to."""
        data = bytearray(self.files.get(node, b""))
        for op in self.pending.get(node, ()):
            if isinstance(op, Resize):
                if keep():
                    data[op.nbytes :] = bytes(max(0, op.nbytes - len(data)))
            elif isinstance(op, Write):
                _write_sectors(data, op, keep)
        return bytes(data)

    def names_with(self, node: Node, keep: Keep) -> dict[str, Node]:
        """Return a directory's names with those of the pending changes that `keep` says yes to."""
        names = dict(self.names.get(node, {}))
        for op in self.pending.get(node, ()):
            if not isinstance(op, Bind) or not keep():
                continue
            if op.old is not None:
                names.pop(op.old, None)
            if op.node is None:
                names.pop(op.name, None)
            else:
                names[op.name] = op.node
        return names

    def write_to(self, place: Path, keep: Keep, parts: Parts | None = None) -> None:
        """Build the state as a real directory at `place`, which is made."""
        self._build(self.root, place, keep)
        for name, data in (self.parts if parts is None else parts).items():
            place.joinpath(name).write_bytes(data)

    def _build(self, node: Node, place: Path, keep: Keep) -> None:
        place.mkdir()
        for name, child in self.names_with(node, keep).items():
            if child.folder:
                self._build(child, place / name, keep)
            elif name not in DATABASE:
                place.joinpath(name).write_bytes(self.bytes_with(child, keep))


def crash_states(recorder: Recorder, rng: random.Random, chosen: int) -> Iterator[tuple[int, Callable[[Path], None]]]:
    """Yield, for each call of the log, how many had been made, and functions that build what a crash then may leave.

    Those are: everything kept (the process alone died), nothing kept that was not flushed, and `chosen` others at random.
    """
    disk = Disk(recorder.root, *recorder.before())
    for made in range(len(recorder.log) + 1):
        yield made, lambda place: disk.write_to(place, _always)
        yield made, lambda place: disk.write_to(place, lambda: False)
        for _ in range(chosen):
            share = rng.choice((0.1, 0.5, 0.9))
            yield made, lambda place, share=share: disk.write_to(place, lambda: rng.random() < share)  # type: ignore[misc]
        if made == len(recorder.log):
            return
        op = recorder.log[made]
        if isinstance(op, Database) and op.torn:
            for _ in range(chosen):
                parts = _torn(disk.parts, op.parts, rng)
                yield made, lambda place, parts=parts: disk.write_to(place, lambda: rng.random() < 0.5, parts)  # type: ignore[misc]
        disk.apply(op)


def _always() -> bool:
    return True


def _write_sectors(data: bytearray, op: Write, keep: Keep) -> None:
    end = op.offset + len(op.data)
    for start in range(op.offset - op.offset % SECTOR, end, SECTOR):
        first, last = max(start, op.offset), min(start + SECTOR, end)
        if keep():
            data.extend(bytes(max(0, last - len(data))))
            data[first:last] = op.data[first - op.offset : last - op.offset]


def _torn(before: Parts, after: Parts, rng: random.Random) -> Parts:
    """Return the database with some of the sectors of its log that a commit has written."""
    parts = dict(before)
    log = DATABASE[1]
    if log in after:
        data = bytearray(before.get(log, b""))
        for start in range(0, len(after[log]), SECTOR):
            sector = after[log][start : start + SECTOR]
            if sector != data[start : start + SECTOR] and rng.random() < 0.5:
                data.extend(bytes(max(0, start + len(sector) - len(data))))
                data[start : start + len(sector)] = sector
        parts[log] = bytes(data)
    return parts
