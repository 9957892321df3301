"""Puts and deletions of several threads at once: they share commits, and each hears of its own failure only."""

from __future__ import annotations

import errno
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.disk.conftest import files_in
from tests.samples import assert_identical
from tierstore.backends.disk import DiskBackend
from tierstore.errors import StorageError
from tierstore.testing.interposed import Failing

PATIENCE = 60.0  # seconds after which a test that waits in vain has failed
KEYS = [f"key {number}" for number in range(6)]


class Held(Failing):
    """Lets commits wait until `queued` others want one, and then fails them as it was armed to, or with `raised`."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()
        self.first = threading.Event()
        self.commits = 0
        self.raised: BaseException | None = None

    def commit(self, database: sqlite3.Connection) -> None:
        self.commits += 1
        self.first.set()
        assert self.go.wait(PATIENCE)
        if self.raised is not None and self.commits > 1:
            raise self.raised
        super().commit(database)


@pytest.fixture
def held(root: Path) -> Iterator[tuple[DiskBackend, Held]]:
    system = Held()
    with closing(DiskBackend(root, system=system)) as store:
        store.put("old", torch.arange(10))
        system.commits = 0
        system.first.clear()
        yield store, system
        system.disarm()


def meanwhile(store: DiskBackend, system: Held, acts: list[Callable[[], None]]) -> list[Future[None]]:
    """Begin a commit, do all acts while it is held, and let it end once all of them wait for the next one."""
    system.go.clear()
    with ThreadPoolExecutor(len(acts) + 1) as pool:
        pool.submit(store.put, "first", torch.zeros(5))
        assert system.first.wait(PATIENCE)
        pending = [pool.submit(act) for act in acts]
        while len(store._index._queue) < len(acts):  # each gets there, or the test's own time runs out
            time.sleep(0.001)
        system.go.set()
    return pending


def puts(store: DiskBackend) -> list[Callable[[], None]]:
    return [lambda number=number, key=key: store.put(key, torch.full((9000,), number)) for number, key in enumerate(KEYS)]  # type: ignore[misc]


def test_threads_that_wait_for_a_commit_share_the_next_one(held: tuple[DiskBackend, Held], root: Path) -> None:
    store, system = held
    pending = meanwhile(store, system, [*puts(store), lambda: store.delete("old")])
    assert [future.exception() for future in pending] == [None] * 7
    assert system.commits == 2
    store.close()
    with closing(DiskBackend(root, verify="always")) as again:
        assert {key for key, _ in again.entries()} == {"first", *KEYS}
        for number, key in enumerate(KEYS):
            assert_identical(again.get(key), torch.full((9000,), number))


def test_a_commit_that_fails_for_certain_changes_nothing_for_all_that_share_it(held: tuple[DiskBackend, Held], root: Path) -> None:
    store, system = held
    system.arm(errno.ENOSPC, 2, calls=["commit"])
    pending = meanwhile(store, system, [*puts(store), lambda: store.delete("old")])
    for future in pending:
        error = future.exception()
        assert isinstance(error, StorageError)
        assert error.errno == errno.ENOSPC
    assert {key for key, _ in store.entries()} == {"old", "first"}
    assert len([name for name in files_in(root) if name.startswith("blobs/")]) == 2
    store.put("old", torch.ones(3))  # and it goes on
    assert_identical(store.get("old"), torch.ones(3))


def test_what_is_missing_fails_alone(held: tuple[DiskBackend, Held]) -> None:
    store, system = held
    *others, missing = meanwhile(store, system, [*puts(store), lambda: store.delete("nothing")])
    assert [future.exception() for future in others] == [None] * 6
    assert isinstance(missing.exception(), KeyError)
    assert system.commits == 2


def test_changes_of_one_key_are_committed_one_after_the_other(held: tuple[DiskBackend, Held], root: Path) -> None:
    """Nobody should do that, and still the index must stay sound."""
    store, system = held
    pending = meanwhile(store, system, [lambda: store.put("old", torch.ones(9)), lambda: store.put("old", torch.ones(8))])
    assert [future.exception() for future in pending] == [None, None]
    assert system.commits == 3
    assert store.get("old").numel() in (8, 9)
    store.close()
    assert DiskBackend.verify(root).sound


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), MemoryError()])
def test_after_an_interrupted_commit_nobody_is_told_that_it_came_through(
    held: tuple[DiskBackend, Held], root: Path, raised: BaseException
) -> None:
    store, system = held
    system.raised = raised
    errors = [future.exception() for future in meanwhile(store, system, puts(store))]
    assert sorted(type(error) for error in errors if error is raised) == [type(raised)]
    assert all(isinstance(error, StorageError) for error in errors if error is not raised)
    with pytest.raises(StorageError, match="nobody knows whether a commit came through"):
        store.put("more", torch.zeros(1))
    store.close()
    with closing(DiskBackend(root, verify="always")) as again:
        assert {key for key, _ in again.entries()} in ({"old", "first"}, {"old", "first", *KEYS})
