"""What the tests of the disk backend share: fixtures, child processes, and that no descriptor is left open."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.disk.children import Child, do_nothing
from tierstore.backends.disk import DiskBackend
from tierstore.file_system import FileSystem

EMPTY = {"FORMAT", "LOCK", "COMMITS", "index.sqlite"}
"""What a closed store without values consists of."""

HOLD = """
import sys
from tierstore.backends.disk import DiskBackend
store = DiskBackend(sys.argv[1])
print(store.path, flush=True)
sys.stdin.read()
"""


class Unflushed(FileSystem):
    """Does not wait for the device where a test does not need it to."""

    def sync(self, descriptor: int) -> None:
        pass


MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where temporary directories go for tests that do not need a device."""


@pytest.fixture(scope="session")
def fork_server() -> None:
    """What `Child` is forked from, started before descriptors are counted."""
    Child(do_nothing).end()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


@pytest.fixture
def store(root: Path) -> Iterator[DiskBackend]:
    backend = DiskBackend(root)
    yield backend
    backend.close()


@pytest.fixture(autouse=True)
def no_leaked_descriptors() -> Iterator[None]:
    before = open_descriptors()
    yield
    if open_descriptors() != before:
        gc.collect()
    assert open_descriptors() == before


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def files_in(folder: Path) -> set[str]:
    """Return all files but those that SQLite has beside its database while it is open."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.endswith(("-wal", "-shm"))}


def child(program: str, *arguments: str | Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-P", "-c", program, *map(str, arguments)], stdin=pipe, stdout=pipe, text=True)


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def in_fork(act: Callable[[], None]) -> int:
    """Run `act` in a forked child; return the exit status, 0 if it raised nothing."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
