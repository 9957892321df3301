"""Commits of several threads made as one, so that they wait for the device once."""

from __future__ import annotations

import errno
import threading

from tierstore.backends._disk.failures import Health
from tierstore.backends._disk.hold import WriteHold
from tierstore.backends._disk.index import UncertainError
from tierstore.backends._disk.rows import Row, Sealed


class _Change:
    """A new row for `key`, or none, on its way into the index; `old` is the one before."""

    def __init__(self, key: str, new: Sealed | None) -> None:
        self.key = key
        self.new = new
        self.old: Row | None = None
        self.error: BaseException | None = None
        self.ended = False


class GroupCommit:
    """Changes the index of `hold`; safe to call from several threads for different keys.

    Whoever comes first commits for all who came while the commit before was made. One lock is held for that long, the other
    to queue. After a commit of which nobody knows whether it counts, `health` is told, and none is made any more.
    """

    def __init__(self, hold: WriteHold, health: Health) -> None:
        self._hold = hold
        self._health = health
        self._committing = threading.Lock()
        self._queueing = threading.Lock()
        self._queue: list[_Change] = []

    def change(self, key: str, new: Sealed | None) -> Row | None:
        """Make `new` the row of `key`, or nothing; return the row before.

        Raises `KeyError` if there is neither. After an `OSError` that is no `UncertainError` nothing has changed.
        """
        change = _Change(key, new)
        with self._queueing:
            self._queue.append(change)
        with self._committing:
            while not change.ended:
                self._commit_queued()
        if change.error is not None:
            raise change.error
        return change.old

    def _commit_queued(self) -> None:
        with self._queueing:  # of changes of one key, which nobody should make at the same time, each has its own commit
            first = {change.key: change for change in reversed(self._queue)}
            self._queue = [change for change in self._queue if first[change.key] is not change]
        changes = list(first.values())
        error: BaseException | None = UncertainError(errno.EIO, "the thread that made a commit was interrupted")
        try:
            self._health.check()
            self._commit([change for change in changes if self._look_up(change)])
            error = None
        except OSError as failure:
            error = failure
        finally:
            for change in changes:
                change.error, change.ended = change.error or error, True

    def _look_up(self, change: _Change) -> bool:
        """Note the row before; False if nothing is to be replaced by nothing."""
        change.old = self._hold.index.rows.get(change.key)
        if change.old is None and change.new is None:
            change.error = KeyError(change.key)
        return change.error is None

    def _commit(self, changes: list[_Change]) -> None:
        if not changes:
            return
        new = [change.new for change in changes if change.new is not None]
        old = [change.old for change in changes if change.old is not None]
        try:
            self._hold.index.commit(new, old)
        except BaseException as error:
            if isinstance(error, UncertainError) or not isinstance(error, OSError):
                self._health.fail(f"nobody knows whether a commit came through ({error!r})")
            raise
        self._hold.count_commit(self._health)
