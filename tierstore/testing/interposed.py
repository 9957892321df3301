"""File systems for tests, whose every call passes through one place: there it can be counted, refused, or cut short."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Collection
from functools import partial
from typing import Literal, TypeVar

from tierstore.file_system import FileSystem

T = TypeVar("T")
Failure = int | Literal["short"]
"""An `errno` code, or a transfer of fewer bytes than asked for."""

_SQLITE = {errno.ENOSPC: sqlite3.SQLITE_FULL, errno.EDQUOT: sqlite3.SQLITE_FULL}
_SECTOR = 512  # bytes; what direct I/O transfers one of at least


class Interposed(FileSystem):
    """The real file system behind `around`, which sees each call's name and makes it."""

    def around(self, name: str, act: Callable[[], T]) -> T:
        """Make the call and return what it returns; subclasses do something before, after, or instead."""
        return act()

    def open(self, name: str, flags: int, *, folder: int | None = None, mode: int = 0o666) -> int:
        return self.around("open", partial(super().open, name, flags, folder=folder, mode=mode))

    def open_unnamed(self, folder: int) -> int:
        return self.around("open_unnamed", partial(super().open_unnamed, folder))

    def close(self, descriptor: int) -> None:
        return self.around("close", partial(super().close, descriptor))

    def set_direct(self, descriptor: int, *, direct: bool) -> None:
        return self.around("set_direct", partial(super().set_direct, descriptor, direct=direct))

    def read(self, descriptor: int, memory: memoryview, offset: int, flags: int = 0) -> int:
        return self.around("read", partial(super().read, descriptor, memory, offset, flags))

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        return self.around("write", partial(super().write, descriptor, data, offset))

    def reserve(self, descriptor: int, offset: int, nbytes: int) -> bool:
        return self.around("reserve", partial(super().reserve, descriptor, offset, nbytes))

    def punch(self, descriptor: int, offset: int, nbytes: int) -> bool:
        return self.around("punch", partial(super().punch, descriptor, offset, nbytes))

    def lock(self, descriptor: int) -> bool:
        return self.around("lock", partial(super().lock, descriptor))

    def unlock(self, descriptor: int) -> None:
        return self.around("unlock", partial(super().unlock, descriptor))

    def truncate(self, descriptor: int, nbytes: int) -> None:
        return self.around("truncate", partial(super().truncate, descriptor, nbytes))

    def sync(self, descriptor: int) -> None:
        return self.around("sync", partial(super().sync, descriptor))

    def advise(self, descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        return self.around("advise", partial(super().advise, descriptor, offset, nbytes, advice))

    def status(self, descriptor: int) -> os.stat_result:
        return self.around("status", partial(super().status, descriptor))

    def link(self, descriptor: int, folder: int, name: str) -> None:
        return self.around("link", partial(super().link, descriptor, folder, name))

    def rename(self, folder: int, old: str, new: str) -> None:
        return self.around("rename", partial(super().rename, folder, old, new))

    def unlink(self, folder: int, name: str) -> None:
        return self.around("unlink", partial(super().unlink, folder, name))

    def make_folder(self, folder: int, name: str) -> None:
        return self.around("make_folder", partial(super().make_folder, folder, name))

    def names(self, folder: int) -> list[str]:
        return self.around("names", partial(super().names, folder))

    def map(self, descriptor: int, offset: int, nbytes: int) -> int:
        return self.around("map", partial(super().map, descriptor, offset, nbytes))

    def commit(self, database: sqlite3.Connection) -> None:
        return self.around("commit", partial(super().commit, database))


class Failing(Interposed):
    """Lets the calls of its choice fail. Safe to use from several threads.

    `made` counts the calls since `arm` that may fail, and `fired` those that did; `names` lists all calls since `arm`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failure: Failure = 0
        self.disarm()

    def arm(self, failure: Failure, nth: int = 1, *, calls: Collection[str] = (), lasting: bool = False, late: bool = False) -> None:
        """Let the `nth` call from now on fail, of those in `calls` if any are given, and with `lasting` all after it.

        A call that fails changes nothing, except that what is closed is closed; a `late` one is made and then said to have
        failed. A short transfer moves half of the bytes; calls that transfer nothing are not counted for it.
        """
        self.disarm()
        self._failure, self._nth, self._calls, self._lasting, self._late = failure, nth, frozenset(calls), lasting, late

    def disarm(self) -> None:
        """Let everything pass from now on."""
        self._failure = 0
        self._nth, self._calls, self._lasting, self._late = 0, frozenset[str](), False, False
        self.made, self.fired, self.names_called = 0, 0, list[str]()

    def around(self, name: str, act: Callable[[], T]) -> T:
        with self._lock:
            self.names_called.append(name)
        if isinstance(self._failure, str) or not self._due(name):
            return act()
        if self._late or name == "close":
            act()
        raise _error(name, self._failure)

    def read(self, descriptor: int, memory: memoryview, offset: int, flags: int = 0) -> int:
        return super().read(descriptor, self._shortened(memory, "read"), offset, flags)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        return super().write(descriptor, self._shortened(data, "write"), offset)

    def _shortened(self, memory: memoryview, name: str) -> memoryview:
        if self._failure != "short" or not self._due(name):
            return memory
        half = len(memory) // 2
        return memory[: half - half % _SECTOR or max(1, half)]

    def _due(self, name: str) -> bool:
        with self._lock:
            if not self._nth or (self._calls and name not in self._calls):
                return False
            self.made += 1
            due = self.made == self._nth or (self._lasting and self.made > self._nth)
            self.fired += due
            return due


def _error(name: str, code: int) -> Exception:
    """Return what the system, or SQLite for its part, raises when a call fails."""
    if name != "commit":
        return OSError(code, os.strerror(code))
    error = sqlite3.OperationalError(f"{os.strerror(code)}, as SQLite sees it")
    error.sqlite_errorcode = _SQLITE.get(code, sqlite3.SQLITE_IOERR)
    return error
