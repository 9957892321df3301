"""What the one writer of a disk store has open, in the order in which it is opened and closed."""

from __future__ import annotations

import os
import weakref
from contextlib import ExitStack, suppress
from pathlib import Path

from tierstore.backends._disk.failures import Health
from tierstore.backends._disk.index import Commits
from tierstore.backends._disk.layout import Root, give_lock, make_root, prepare, read_format, sweep, take_lock
from tierstore.file_system import FileSystem

_LEAP = 1 << 20  # generations skipped at each opening, far more than a crash can leave without a commit


class WriteHold:
    """The lock on a directory, its index, and the count of commits; a context manager, entered at once.

    Opening refuses what is not a store of a known version before anything is touched, and removes what a crash has left.
    A forked child gives up its copies at once, so that the lock is the parent's alone, and leaves the database untouched.
    """

    def __init__(self, path: Path, system: FileSystem) -> None:
        make_root(path, system)
        with ExitStack() as stack:
            self.root = Root(path, system)
            stack.callback(self.root.close)
            read_format(self.root)  # before the lock makes a file
            self._lock = take_lock(self.root)
            stack.callback(give_lock, self.root, self._lock)
            self.index = prepare(self.root)
            stack.callback(self.index.close)
            sweep(self.root, self.index.rows)
            self.index.leap(_LEAP)
            self._commits = Commits(system, self.root.descriptor)
            stack.callback(self._commits.close)
            self._commits.write(self.index.state, sync=True)
            self._stack = stack.pop_all()
        os.register_at_fork(after_in_child=_Abandon(self))

    def count_commit(self, health: Health) -> None:
        """Note that the index has one commit more; if that fails, the commit stands, but no other one is made."""
        try:
            self._commits.write(self.index.state)
        except OSError as error:
            health.fail(f"the number of commits could not be written ({error})")

    def __enter__(self) -> WriteHold:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # it is for finding damage that happens later
            self._commits.write(self.index.state, sync=True, image=self.index.image())
        self._stack.close()

    def abandon(self) -> None:
        """Let a forked child share nothing with its parent that either would miss."""
        self.index.abandon()
        with suppress(OSError):
            os.close(self._lock)


class _Abandon:
    """What a forked child does; it knows the hold only as long as somebody else does."""

    def __init__(self, hold: WriteHold) -> None:
        self._hold = weakref.ref(hold)

    def __call__(self) -> None:
        hold = self._hold()
        if hold is not None:
            hold.abandon()
