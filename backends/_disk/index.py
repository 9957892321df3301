"""The index of a disk store: an SQLite database with a row for each value, mirrored in memory when it is opened.

SQLite makes one commit after the other durable, whole or not at all. What it would not notice is found here: each row has a
checksum, and the row of `state` one over all of them, so that a row that is missing, doubled, or of another time is damage.
SQLite takes a damaged end of its log for what a crash left unfinished, and drops it; so the number of commits is also
written to a file beside it, after each of them, and an index that has fewer than that is damaged too. When a store is closed,
the checksum of the whole database goes there as well: a bit that has flipped since is found wherever it is, also in bytes
that nobody uses.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from tierstore.backends._disk.rows import Row, Sealed, row_from, seal_of
from tierstore.checksum import SUM, checksum
from tierstore.errors import CorruptionError, StorageError
from tierstore.file_system import FileSystem

INDEX = "index.sqlite"
PARTS = (INDEX, f"{INDEX}-wal", f"{INDEX}-shm")
JOURNAL = f"{INDEX}-journal"  # only while an index is made
COMMITS = "COMMITS"

_SCHEMA = (
    "CREATE TABLE value(key BLOB PRIMARY KEY, blob TEXT, start INTEGER, nbytes INTEGER, dtype TEXT, shape TEXT, stride TEXT,"
    " sums BLOB, head BLOB, generation INTEGER, format INTEGER, seal BLOB) WITHOUT ROWID",
    "CREATE TABLE state(one INTEGER PRIMARY KEY CHECK(one = 1), store TEXT, generation INTEGER, commits INTEGER, total BLOB, seal BLOB)",
)
_ENVIRONMENT = {  # what is no damage: the error that the system would have reported
    sqlite3.SQLITE_BUSY: errno.EBUSY, sqlite3.SQLITE_LOCKED: errno.EBUSY, sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO, sqlite3.SQLITE_CANTOPEN: errno.ENOENT, sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES, sqlite3.SQLITE_NOMEM: errno.ENOMEM,
}  # fmt: skip
ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises; the second if what a message about a damaged schema quotes is no text."""

_PATIENCE = 5.0  # seconds to wait for a lock that only a foreign tool would hold


@dataclass(frozen=True, slots=True)
class State:
    """What is true of the whole index: whose it is, the highest generation given out, how many commits, all seals in one."""

    store: str
    generation: int = 0
    commits: int = 0
    total: int = 0

    def columns(self) -> tuple[object, ...]:
        return self.store, self.generation, self.commits, self.total.to_bytes(SUM, "little")


class UncertainError(StorageError):
    """A commit of which nobody knows whether it will be there when the index is opened again."""


class Index:
    """The rows of the index at `path`. Not locked: whoever commits sees to it that nobody else does, or reads meanwhile."""

    def __init__(self, folder: Path, system: FileSystem, *, writable: bool) -> None:
        self.path = folder / INDEX
        self._system = system
        if not self.path.exists():
            raise damaged("the index is missing", self.path)
        try:
            self._database = _connect(self.path, writable=writable)
        except ERRORS as error:
            raise self._translated(error) from error
        try:
            self.rows, self.state = self._load(check=writable)
        except BaseException:
            self._database.close()
            raise

    @classmethod
    def create(cls, path: Path, system: FileSystem, state: State, rows: Iterable[Row] = ()) -> None:
        """Write a new index to `path`, where no file is, and flush it; its name in the directory is left to the caller."""
        try:
            with closing(sqlite3.connect(path, isolation_level=None)) as database:
                database.execute("PRAGMA synchronous=FULL")
                database.execute("BEGIN")
                for statement in _SCHEMA:
                    database.execute(statement)
                for row in rows:
                    sealed = row.sealed()
                    _insert(database, sealed)
                    state = replace(state, total=state.total ^ _number(sealed.seal))
                _write_state(database, state)
                system.commit(database)
        except ERRORS as error:
            raise _translated(error, path) from error

    def refresh(self) -> bool:
        """Read everything again if another process has committed since; return whether it had."""
        try:
            found = self._database.execute("SELECT commits FROM state").fetchone()
        except ERRORS as error:
            raise self._translated(error) from error
        if found is not None and found[0] == self.state.commits:
            return False
        self.rows, self.state = self._load(check=False)
        return True

    def commit(self, new: Sequence[Sealed], old: Sequence[Row]) -> None:
        """Replace the rows `old` by `new`, durably and as one; raise `OSError` if that has changed nothing.

        Raises `UncertainError` if it may come true later: then nothing may be built on either outcome.
        """
        gone = [row.sealed() for row in old]
        total = self.state.total
        for sealed in (*gone, *new):
            total ^= _number(sealed.seal)
        highest = max([self.state.generation, *(sealed.row.generation for sealed in new)])
        state = State(self.state.store, highest, self.state.commits + 1, total)
        self._execute(new, gone, state)
        self.state = state
        for row in old:
            del self.rows[row.key]
        for sealed in new:
            self.rows[sealed.row.key] = sealed.row

    def image(self) -> bytes:
        """Return the checksum of every byte of the database; b"" if there have been commits that this object does not know of."""
        try:
            self._database.execute("BEGIN")
            try:
                current = self._database.execute("SELECT commits FROM state").fetchone() == (self.state.commits,)
                return checksum(self._database.serialize()) if current else b""
            finally:
                self._database.execute("COMMIT")
        except ERRORS as error:
            raise self._translated(error) from error

    def leap(self, generations: int) -> None:
        """Skip generations, so that none which a crash left without a commit is ever given out again."""
        state = replace(self.state, generation=self.state.generation + generations, commits=self.state.commits + 1)
        self._execute([], [], state)
        self.state = state

    def close(self) -> None:
        """Write what is in SQLite's log to its place, if no reader is in the way, and close."""
        with suppress(sqlite3.Error):  # what is committed is safe in the log
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._database.close()

    def abandon(self) -> None:
        """Let go of a database that was open when this process was forked, without touching it, as SQLite asks for."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._database))

    def _execute(self, new: Sequence[Sealed], gone: Sequence[Sealed], state: State) -> None:
        database = self._database
        try:
            database.execute("BEGIN IMMEDIATE")
            for sealed in gone:
                database.execute("DELETE FROM value WHERE key = ?", sealed.columns[:1])
            for sealed in new:
                _insert(database, sealed)
            _write_state(database, state)
        except ERRORS as error:
            self._roll_back()
            raise self._translated(error) from error
        try:
            self._system.commit(database)
        except (*ERRORS, OSError) as error:
            self._roll_back()
            if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY):
                raise self._translated(error) from error
            raise UncertainError(
                errno.EIO, f"a commit to {self.path} failed ({error}); whether it counts will be known when the store is opened again"
            ) from error

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):  # SQLite may have done so itself
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def _load(self, *, check: bool) -> tuple[dict[str, Row], State]:
        """Read all rows as of one moment; raise `CorruptionError` unless they are the ones that were committed last."""
        try:
            self._database.execute("BEGIN")
            try:
                if check and self._database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                    raise ValueError("SQLite finds its pages damaged")
                states = self._database.execute("SELECT store, generation, commits, total, seal FROM state").fetchall()
                found = self._database.execute("SELECT * FROM value").fetchall()
            finally:
                self._database.execute("COMMIT")
            rows = [row_from(columns[:-1], columns[-1]) for columns in found]
            return {row.key: row for row in rows}, _state_from(states, found)
        except ERRORS as error:
            raise self._translated(error) from error
        except ValueError as error:
            raise damaged(str(error), self.path) from error

    def _translated(self, error: Exception) -> OSError:
        return _translated(error, self.path)


class Commits:
    """The file that counts commits beside SQLite; it is never ahead of the index, unless the index has lost some.

    It is so small that the device writes it as a whole or not at all.
    """

    def __init__(self, system: FileSystem, folder: int) -> None:
        self._system = system
        self._descriptor = system.open(COMMITS, os.O_RDWR | os.O_CREAT, folder=folder)

    def write(self, state: State, *, sync: bool = False, image: bytes = b"") -> None:
        """Note how many commits there were, and if it is known, what the index looked like after the last of them."""
        data = state.commits.to_bytes(8, "little") + image.ljust(SUM, b"\0")
        write_all(self._system, self._descriptor, data + checksum(data + state.store.encode()))
        if sync:
            self._system.sync(self._descriptor)

    def close(self) -> None:
        with suppress(OSError):
            self._system.close(self._descriptor)


def read_commits(data: bytes, store: str) -> tuple[int, bytes]:
    """Return how many commits there were at least, and what the index looked like after the last of them, b"" if unknown.

    `data`: what is in the file, which is empty for a moment when it is made. Raises `ValueError` if it is damaged.
    """
    if not data:
        return 0, b""
    told, seal = data[: 8 + SUM], data[8 + SUM :]
    if seal != checksum(told + store.encode()):
        raise ValueError("it does not match its checksum")
    return int.from_bytes(told[:8], "little"), told[8:].strip(b"\0") and told[8:]


def write_all(system: FileSystem, descriptor: int, data: bytes) -> None:
    """Write a small file from its start on."""
    done = 0
    while done < len(data):
        done += system.write(descriptor, memoryview(data)[done:], done)


def _connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    if writable:
        return _opened(path, "mode=rw", "journal_mode=WAL")
    try:
        return _opened(path, "mode=ro")
    except sqlite3.OperationalError:
        if path.with_name(PARTS[1]).exists():
            raise
        return _opened(path, "immutable=1")  # SQLite wants to make files beside a database even to read it


def _opened(path: Path, mode: str, *pragmas: str) -> sqlite3.Connection:
    uri = f"file:{quote(os.fsencode(path))}?{mode}"
    database = sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
    try:
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "synchronous=FULL", *pragmas):
            database.execute(f"PRAGMA {pragma}")
        database.execute("SELECT commits FROM state")
    except BaseException:
        database.close()
        raise
    return database


def _translated(error: Exception, path: Path) -> OSError:
    """Return the error to raise: damage, or what the system has refused to SQLite."""
    code = getattr(error, "sqlite_errorcode", None)
    known = _ENVIRONMENT.get(code & 0xFF) if isinstance(code, int) else None
    return damaged(str(error), path) if known is None else OSError(known, f"{os.strerror(known)} ({error})", str(path))


def damaged(reason: str, path: Path) -> CorruptionError:
    return CorruptionError("?", str(path), f"{reason}; `python -m tierstore repair` makes the index anew from the blobs")


def _insert(database: sqlite3.Connection, sealed: Sealed) -> None:
    database.execute(f"INSERT INTO value VALUES ({', '.join('?' * 12)})", (*sealed.columns, sealed.seal))


def _write_state(database: sqlite3.Connection, state: State) -> None:
    columns = state.columns()
    database.execute("INSERT OR REPLACE INTO state VALUES (1, ?, ?, ?, ?, ?)", (*columns, seal_of(columns)))


def _number(seal: bytes) -> int:
    return int.from_bytes(seal, "little")


def _state_from(states: Sequence[tuple[object, ...]], found: Iterable[tuple[object, ...]]) -> State:
    """Return the state; raise `ValueError` unless it is the one that goes with the rows `found`."""
    if len(states) != 1 or states[0][-1] != seal_of(states[0][:-1]):
        raise ValueError("the state of the index does not match its checksum")
    store, generation, commits, total, _ = states[0]
    if not (isinstance(store, str) and isinstance(generation, int) and isinstance(commits, int) and isinstance(total, bytes)):
        raise ValueError("the state of the index has columns of other types")
    left = _number(total)
    for columns in found:
        left ^= _number(seal_of(columns[:-1]))
    if left:
        raise ValueError("rows of the index are missing, or are of another time")
    return State(store, generation, commits, _number(total))
