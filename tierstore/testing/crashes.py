"""What a disk may look like after the power went: records the file calls of a workload, and builds the states a crash can leave.

The rules are those that file systems promise, and no more. What was written to a file since it was last flushed is there or
not for each sector of 512 bytes by itself, and so is each change of its length. What has happened to a name since its
directory was last flushed is there or not, and a rename as a whole. The database of the index is SQLite's to protect: it is
taken as it is at that moment, and in the middle of a commit with any of the log's sectors that the commit writes.
"""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tierstore.file_system import FileSystem

SECTOR = 512  # bytes
DATABASE = ("index.sqlite", "index.sqlite-wal")

Parts = dict[str, bytes]


@dataclass(eq=False)
class Node:
    """A file or a directory, whatever it is called."""

    folder: bool = False


@dataclass(frozen=True)
class Write:
    node: Node
    offset: int
    data: bytes


@dataclass(frozen=True)
class Resize:
    node: Node
    nbytes: int


@dataclass(frozen=True)
class Sync:
    node: Node


@dataclass(frozen=True)
class Bind:
    """A name in a directory refers to `node` from now on, or to nothing; with a rename, `old` ends at the same time."""

    folder: Node
    name: str
    node: Node | None
    old: str | None = None


@dataclass(frozen=True)
class Database:
    """The files of the database changed; `torn` if a crash may come in the middle."""

    parts: Parts
    torn: bool


@dataclass(frozen=True)
class Mark:
    """Something that the workload says."""

    text: str


Op = Write | Resize | Sync | Bind | Database | Mark


class Recorder(FileSystem):
    """The real file system, which writes down what happens below `root`; what is there already is on the device.

    Not for several threads at once. `end` it after the last call.
    """

    def __init__(self, root: Path) -> None:
        self.log: list[Op] = []
        self.root = Node(folder=True)
        self._path = root
        self._before: dict[Node, bytes] = {}
        self._tree: dict[Node, dict[str, Node]] = {}
        self._scan(self.root, root)
        self._names_before = {node: dict(names) for node, names in self._tree.items()}
        self._open: dict[int, Node] = {}
        self._size: dict[Node, int] = {}
        self._peeked: dict[tuple[str, int], int] = {}
        self._parts: Parts = {}

    def mark(self, text: str) -> None:
        self._note(Mark(text))

    def disk(self) -> Disk:
        """Return what was on the device at first."""
        return Disk(self.root, dict(self._before), {node: dict(names) for node, names in self._names_before.items()})

    def end(self) -> None:
        """See what the database has become, and let go of it."""
        self._look_at_database(torn=False)
        for descriptor in self._peeked.values():
            os.close(descriptor)

    def open(self, name: str, flags: int, *, folder: int | None = None, mode: int = 0o666) -> int:
        descriptor = super().open(name, flags, folder=folder, mode=mode)
        place = self._place(name, folder)
        if isinstance(place, Node):
            self._open[descriptor] = place
        elif place is not None:
            parent, last = place
            if last not in self._tree[parent]:
                self._bind(parent, last, Node())
            self._open[descriptor] = self._tree[parent][last]
        return descriptor

    def open_unnamed(self, folder: int) -> int:
        descriptor = super().open_unnamed(folder)
        self._open[descriptor] = Node()
        return descriptor

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._open.pop(descriptor, None)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        count = super().write(descriptor, data, offset)
        node = self._open[descriptor]
        self._size[node] = max(self._size.get(node, 0), offset + count)
        self._note(Write(node, offset, bytes(data[:count])))
        return count

    def reserve(self, descriptor: int, offset: int, nbytes: int) -> bool:
        done = super().reserve(descriptor, offset, nbytes)
        node = self._open[descriptor]
        if done and offset + nbytes > self._size.get(node, 0):
            self._resize(node, offset + nbytes)
        return done

    def truncate(self, descriptor: int, nbytes: int) -> None:
        super().truncate(descriptor, nbytes)
        self._resize(self._open[descriptor], nbytes)

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        if descriptor in self._open:
            self._note(Sync(self._open[descriptor]))

    def link(self, descriptor: int, folder: int, name: str) -> None:
        super().link(descriptor, folder, name)
        self._bind(self._open[folder], name, self._open[descriptor])

    def rename(self, folder: int, old: str, new: str) -> None:
        super().rename(folder, old, new)
        parent = self._open[folder]
        node = self._tree[parent].pop(old)
        self._tree[parent][new] = node
        self._note(Bind(parent, new, node, old))

    def unlink(self, folder: int, name: str) -> None:
        super().unlink(folder, name)
        parent, last = self._split(name, self._open[folder])
        if last in self._tree[parent]:  # not one of SQLite's
            self._bind(parent, last, None)

    def make_folder(self, folder: int, name: str) -> None:
        super().make_folder(folder, name)
        if folder in self._open:
            parent, last = self._split(name, self._open[folder])
            node = Node(folder=True)
            self._tree[node] = {}
            self._bind(parent, last, node)

    def commit(self, database: sqlite3.Connection) -> None:
        self._look_at_database(torn=False)
        super().commit(database)
        self._look_at_database(torn=True)

    def _scan(self, node: Node, path: Path) -> None:
        names = self._tree[node] = {}
        for child in path.iterdir():
            names[child.name] = Node(folder=child.is_dir())
            if child.is_dir():
                self._scan(names[child.name], child)
            else:
                self._before[names[child.name]] = child.read_bytes()

    def _place(self, name: str, folder: int | None) -> Node | tuple[Node, str] | None:
        """Return what an open name refers to: a node, or an entry of a directory; None if it lies elsewhere."""
        if name.startswith("/proc/self/fd/"):
            return self._open.get(int(name.rpartition("/")[2]))
        if folder is not None:
            return self._split(name, self._open[folder]) if folder in self._open else None
        path = Path(name)
        if path == self._path:
            return self.root
        return self._split(str(path.relative_to(self._path)), self.root) if path.is_relative_to(self._path) else None

    def _split(self, name: str, node: Node) -> tuple[Node, str]:
        *folders, last = name.split("/")
        for part in folders:
            node = self._tree[node][part]
        return node, last

    def _bind(self, folder: Node, name: str, node: Node | None) -> None:
        if node is None:
            del self._tree[folder][name]
        else:
            self._tree[folder][name] = node
        self._note(Bind(folder, name, node))

    def _resize(self, node: Node, nbytes: int) -> None:
        self._size[node] = nbytes
        self._note(Resize(node, nbytes))

    def _note(self, op: Op) -> None:
        self._look_at_database(torn=False)
        self.log.append(op)

    def _look_at_database(self, *, torn: bool) -> None:
        parts = {name: data for name in DATABASE if (data := self._peek(name)) is not None}
        if parts != self._parts:
            self._parts = parts
            self.log.append(Database(parts, torn))

    def _peek(self, name: str) -> bytes | None:
        """Read a file of the database without closing it afterwards, which would take SQLite's locks away."""
        path = self._path / name
        if not path.exists():
            return None
        place = name, path.stat().st_ino
        if place not in self._peeked:
            self._peeked[place] = os.open(path, os.O_RDONLY)
        return os.pread(self._peeked[place], 1 << 26, 0)


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
            keep_all: Keep = lambda: True  # noqa: E731
            if op.node.folder:
                self.names[op.node] = self.names_with(op.node, keep_all)
            else:
                self.files[op.node] = self.bytes_with(op.node, keep_all)
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
    disk = recorder.disk()
    for made in range(len(recorder.log) + 1):
        yield made, lambda place: disk.write_to(place, lambda: True)
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
