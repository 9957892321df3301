"""Writes down the file calls of a workload, so that the states that a crash can leave may be built from them."""

from __future__ import annotations

import os
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

from tierstore.file_system import FileSystem

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

    One operation on the store at a time: its threads may write and flush together, which is noted one after the other.
    `end` it after the last call.
    """

    def __init__(self, root: Path) -> None:
        self.log: list[Op] = []
        self._lock = threading.Lock()
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

    def before(self) -> tuple[dict[Node, bytes], dict[Node, dict[str, Node]]]:
        """Return what was on the device at first: the bytes of files, and the names in directories."""
        return dict(self._before), {node: dict(names) for node, names in self._names_before.items()}

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
        with self._lock:
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
        with self._lock:
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
