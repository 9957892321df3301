"""Writing to the disk backend: what fails changes nothing, whatever the file system lacks, and whoever deletes what."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open

from tests.disk.conftest import EMPTY, Unflushed, child, files_in, kill, next_line
from tests.plainly import told_bytes
from tests.samples import assert_identical
from tierstore.backends._disk import writing
from tierstore.backends._disk.direct import SLAB
from tierstore.backends.disk import DiskBackend
from tierstore.backends.ram import RamBackend
from tierstore.backends.scratch import ScratchBackend
from tierstore.checksum import PIECE
from tierstore.errors import CorruptionError, StorageError
from tierstore.file_system import FileSystem
from tierstore.spec import TensorSpec
from tierstore.testing.interposed import Failing

OVERWRITE = """
import itertools, sys, torch
from tierstore.backends.disk import DiskBackend
store = DiskBackend(sys.argv[1])
for number in itertools.count():
    store.put("key", torch.full((300_000,), number))
    print(number, flush=True)
"""


# --- writes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(root: Path) -> Iterator[tuple[DiskBackend, Failing]]:
    """A store with one value, and what makes its file calls fail."""
    system = Failing()
    backend = DiskBackend(root, system=system)
    backend.put("key", torch.arange(1000))
    yield backend, system
    system.disarm()
    backend.close()


@pytest.mark.parametrize("call", ["open_unnamed", "reserve", "write", "truncate", "link", "make_folder"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_failure_before_the_commit_changes_nothing(
    failing: tuple[DiskBackend, Failing], root: Path, call: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, system = failing
    before = files_in(root)
    (folder,) = (folder.name for folder in (root / "blobs").iterdir())
    monkeypatch.setattr(writing, "_IN_A_SHARD", 1)
    store._writer._room = 0
    ids = (f"{number:02x}{number:030x}" for number in range(256) if f"{number:02x}" != folder)
    monkeypatch.setattr("secrets.token_hex", lambda nbytes: next(ids)[: 2 * nbytes])  # else the directory may be there already
    for key in ("key", "new"):
        system.arm(code, calls=[call], lasting=True)
        with pytest.raises(StorageError, match=f"storing '{key}' in {root} failed, which changed nothing: {os.strerror(code)}") as caught:
            store.put(key, torch.zeros(9000, 3))
        assert caught.value.errno == code
        assert system.fired
    system.disarm()
    assert files_in(root) == before
    assert [key for key, _ in store.entries()] == ["key"]
    assert_identical(store.get("key"), torch.arange(1000))
    store.put("key", torch.ones(3))  # and it goes on
    assert_identical(store.get("key"), torch.ones(3))


class Unflushable(FileSystem):
    """Cannot flush one kind of thing: a "file", the directory that it is in ("shard"), or that of all of these ("blobs")."""

    kind = ""

    def sync(self, descriptor: int) -> None:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if self.kind == ("file" if regular else "shard" if len(name) == 2 else name):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync(descriptor)


def put_and_delete(backend: DiskBackend | ScratchBackend, times: int) -> None:
    for _ in range(times):
        backend.put("other", torch.zeros(9000))
        backend.delete("other")


@pytest.mark.parametrize("kind", ["file", "shard", "blobs"])
def test_after_a_failed_flush_nothing_is_written_any_more(root: Path, kind: str) -> None:
    """The system may have dropped what it could not write, and would say that all is well if it were asked again."""
    system = Unflushable()
    store = DiskBackend(root, system=system)
    store.put("key", torch.arange(1000))
    before, blob = files_in(root), store.file_of("key")
    system.kind = kind
    with pytest.raises(StorageError, match="Input/output error"):
        put_and_delete(store, 2000)  # until it goes to a directory that is not known yet
    system.kind = ""
    for operation in (lambda: store.put("key", torch.zeros(1)), lambda: store.delete("key")):
        with pytest.raises(StorageError, match=r"is only read since .* could not be flushed .*close the store and open it again") as caught:
            operation()
        assert caught.value.errno == errno.EROFS
    assert (files_in(root), store.file_of("key")) == (before, blob)
    assert_identical(store.get("key"), torch.arange(1000))
    store.close()
    with closing(DiskBackend(root)) as again:
        assert_identical(again.get("key"), torch.arange(1000))
        again.put("key", torch.zeros(9000))
        assert_identical(again.get("key"), torch.zeros(9000))


@pytest.mark.parametrize("late", [False, True])
def test_a_commit_that_may_have_happened_keeps_both_values(failing: tuple[DiskBackend, Failing], root: Path, late: bool) -> None:
    store, system = failing
    system.arm(errno.EIO, calls=["commit"], late=late)
    with pytest.raises(StorageError, match="whether it counts will be known when the store is opened again"):
        store.put("key", torch.zeros(9000))
    system.disarm()
    assert_identical(store.get("key"), torch.arange(1000))
    with pytest.raises(StorageError, match="nobody knows whether a commit came through"):
        store.put("other", torch.zeros(1))
    store.close()
    again = DiskBackend(root, verify="always")
    assert_identical(again.get("key"), torch.zeros(9000) if late else torch.arange(1000))
    assert len(list(root.glob("blobs/*/*"))) == 1
    again.close()


def test_a_full_disk_at_the_commit_changes_nothing(failing: tuple[DiskBackend, Failing], root: Path) -> None:
    store, system = failing
    before = files_in(root)
    for operation in (lambda: store.put("key", torch.zeros(9000)), lambda: store.delete("key")):
        system.arm(errno.ENOSPC, calls=["commit"])
        with pytest.raises(StorageError, match="No space left") as caught:
            operation()
        assert caught.value.errno == errno.ENOSPC
    system.disarm()
    assert files_in(root) == before
    assert_identical(store.get("key"), torch.arange(1000))
    store.delete("key")
    assert list(store.entries()) == []


def test_an_interrupt_leaves_no_file(root: Path) -> None:
    class Interrupting(Failing):
        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            if len(data) > 1000:
                raise KeyboardInterrupt
            return super().write(descriptor, data, offset)

    store = DiskBackend(root, system=Interrupting())
    with pytest.raises(KeyboardInterrupt):
        store.put("key", torch.zeros(10))
    store.close()
    assert files_in(root) == EMPTY


@pytest.mark.parametrize("nbytes", [1, 5000, 1 << 20, (8 << 20) + 5000])
def test_short_writes_are_continued(root: Path, nbytes: int) -> None:
    class Stingy(FileSystem):
        """Takes little at a time: at first in whole sectors, as direct I/O does, later in odd pieces."""

        calls = 0

        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            self.calls += 1
            most = 512 * self.calls if self.calls < 5 else len(data) // 3 + 7
            return super().write(descriptor, data[:most], offset)

    store = DiskBackend(root, system=Stingy(), verify="always")
    value = torch.arange(nbytes, dtype=torch.int64).to(torch.uint8)
    store.put("key", value)
    assert_identical(store.get("key"), value)
    store.close()


@pytest.mark.parametrize("shift", [0, 1, 4096, 64])
@pytest.mark.parametrize("nbytes", [0, 1, 4096, (8 << 20) - 4096, (8 << 20) + 1, (24 << 20) + 4096])
def test_memory_of_any_alignment_and_size_is_written_as_it_is(tmp_path: Path, nbytes: int, shift: int) -> None:
    whole = torch.arange(nbytes + 8192).to(torch.uint8)
    start = -whole.data_ptr() % 4096 + shift
    value = torch.empty(0, dtype=torch.uint8).set_(whole.untyped_storage(), start, (min(nbytes, len(whole) - start),), (1,))
    with (
        closing(DiskBackend(tmp_path / "store", system=Unflushed(), verify="always")) as store,
        closing(ScratchBackend(tmp_path)) as scratch,
    ):
        for backend in (store, scratch):
            backend.put("key", value)
            assert torch.equal(backend.get("key"), value)
        with safe_open(store.file_of("key"), "pt") as file:
            assert torch.equal(file.get_tensor("data"), value)


def aligned(nbytes: int) -> torch.Tensor:
    """Return memory as a tier of RAM has it, which direct I/O takes without a copy."""
    return RamBackend().allocate("key", TensorSpec.of(torch.empty(nbytes, dtype=torch.uint8)))


class Overlapping(FileSystem):
    """Lets a call go on only when another one of its kind, to another place, has begun: alone it fails after a minute."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.barrier = threading.Barrier(2)
        self.armed = False

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self.armed and self.kind == "write" and len(data) == PIECE:
            self.barrier.wait(60)
        return super().write(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        if self.armed and self.kind == "sync":
            self.barrier.wait(60)
        super().sync(descriptor)


@pytest.mark.parametrize("kind", ["write", "sync"])
def test_pieces_are_written_and_a_file_and_its_name_flushed_at_the_same_time(root: Path, kind: str) -> None:
    system = Overlapping(kind)
    with closing(DiskBackend(root, system=system, verify="always")) as store:
        store.put("first", torch.zeros(1))  # makes the directory
        system.armed = True
        value = aligned(2 * PIECE).fill_(7)
        store.put("key", value)
        system.armed = False
        assert torch.equal(store.get("key"), value)


def test_pieces_of_a_scratch_value_are_written_at_the_same_time(tmp_path: Path) -> None:
    system = Overlapping("write")
    with closing(ScratchBackend(tmp_path, system=system)) as scratch:
        system.armed = True
        value = aligned(2 * PIECE).fill_(7)
        scratch.put("key", value)
        assert torch.equal(scratch.get("key"), value)


def test_the_system_may_have_the_memory_that_writing_took(tmp_path: Path) -> None:
    data = torch.zeros((2 * PIECE) + 1, dtype=torch.uint8)[1:]
    try:
        before = told_bytes("smaps_rollup", "LazyFree")
    except (OSError, KeyError):
        pytest.skip("only Linux tells how much memory it may take back")
    with closing(ScratchBackend(tmp_path)) as backend:
        backend.put("a", data)
        assert told_bytes("smaps_rollup", "LazyFree") >= before + SLAB
        backend.put("a", data)
        assert torch.equal(backend.get("a"), data)


def test_no_piece_is_on_its_way_when_a_put_has_failed(root: Path) -> None:
    """Its file is closed then, and the descriptor may be another file's."""

    class Slow(FileSystem):
        """Fails one write when another has begun, and lets that go on only when the file would have been closed."""

        def __init__(self) -> None:
            self.begun, self.failed, self.closed = threading.Event(), threading.Event(), threading.Event()
            self.late = False

        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            if len(data) != PIECE:
                return super().write(descriptor, data, offset)
            if offset == 4096 or self.begun.is_set():
                assert self.begun.wait(60)
                self.failed.set()
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self.begun.set()
            assert self.failed.wait(60)
            self.late = self.closed.wait(0.2)
            return super().write(descriptor, data, offset)

        def close(self, descriptor: int) -> None:
            super().close(descriptor)
            if self.failed.is_set():
                self.closed.set()

    system = Slow()
    with closing(DiskBackend(root, system=system)) as store:
        with pytest.raises(StorageError, match="Input/output error"):
            store.put("key", aligned(2 * PIECE).fill_(1))
        assert list(store.entries()) == []
    assert system.begun.is_set()
    assert not system.late


def test_a_put_flushes_a_file_a_name_and_the_index_and_no_more(root: Path) -> None:
    system = Failing()
    with closing(DiskBackend(root, system=system)) as store:
        store.put("first", torch.zeros(1))
        system.disarm()
        for number in range(20):
            store.put(str(number), torch.zeros(9000))
        calls = Counter(system.names_called)
    assert (calls["sync"], calls["commit"], calls["make_folder"]) == (40, 20, 0)
    assert len(list((root / "blobs").iterdir())) == 1


def test_directories_of_blobs_do_not_grow_without_end(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_IN_A_SHARD", 3)
    with closing(DiskBackend(root, system=Unflushed())) as store:
        for number in range(30):
            store.put(str(number), torch.zeros(1))
    filled = [len(list(folder.iterdir())) for folder in (root / "blobs").iterdir()]
    assert len(filled) > 5
    assert sum(filled) == 30


class Lacking(FileSystem):
    """A file system that has nothing that it need not have."""

    def open_unnamed(self, folder: int) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    def set_direct(self, descriptor: int, *, direct: bool) -> None:
        if direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        super().set_direct(descriptor, direct=False)

    def reserve(self, descriptor: int, offset: int, nbytes: int) -> bool:
        return False

    def punch(self, descriptor: int, offset: int, nbytes: int) -> bool:
        return False

    def advise(self, descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")


class Strict(FileSystem):
    """Says that it has direct I/O, and then refuses it."""

    direct: ClassVar[set[int]] = set()

    def set_direct(self, descriptor: int, *, direct: bool) -> None:
        super().set_direct(descriptor, direct=direct)
        (self.direct.add if direct else self.direct.discard)(descriptor)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor in self.direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().write(descriptor, data, offset)


@pytest.mark.parametrize("system", [Lacking(), Strict()], ids=["lacking", "strict"])
def test_file_systems_that_lack_things_are_fine(tmp_path: Path, system: FileSystem) -> None:
    backends = DiskBackend(tmp_path / "store", system=system, verify="always"), ScratchBackend(tmp_path / "scratch", system=system)
    for backend in backends:
        for value in (torch.arange(10), torch.arange(3_000_000), torch.zeros(0)):
            backend.put("key", value)
            assert_identical(backend.get("key"), value)
        backend.delete("key")
        backend.close()
    assert files_in(tmp_path / "store") == EMPTY
    assert files_in(tmp_path / "scratch") == set()


def test_a_killed_writer_leaves_a_whole_value_and_no_rest(root: Path) -> None:
    writer = child(OVERWRITE, root)
    done = [int(next_line(writer)) for _ in range(20)][-1]
    kill(writer)
    (root / "blobs" / ".tmp-file-in-the-wrong-place").touch()
    (root / ".tmp-old").touch()
    next((root / "blobs").glob("*/")).joinpath(".tmp-old").touch()
    store = DiskBackend(root)
    found = store.get("key")
    assert found[0] >= done
    assert torch.equal(found, found[0].expand(300_000))
    assert [name for name in files_in(root) if Path(name).name.startswith(".tmp-")] == ["blobs/.tmp-file-in-the-wrong-place"]
    assert len(list(root.glob("blobs/*/*.safetensors"))) == 1
    store.close()


def put_all(backend: ScratchBackend, values: dict[str, torch.Tensor]) -> None:
    for key, value in values.items():
        backend.put(key, value)


def test_a_full_file_system_is_found_before_anything_changes(tmp_path: Path) -> None:
    """On a real file system of 16 MiB, where this user may mount one."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path], check=False, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        with closing(DiskBackend(tmp_path / "store")) as store:
            values = {str(number): torch.full((1 << 20,), number, dtype=torch.int32) for number in range(6)}
            stored = set()
            for key, value in values.items():
                with suppress(StorageError):
                    store.put(key, value)
                    stored.add(key)
            assert 1 < len(stored) < 6
            assert dict(store.entries()).keys() == stored
            store.delete(min(stored))
            store.put("more", values["5"])
            for key in stored - {min(stored)}:
                assert_identical(store.get(key), values[key])
        with closing(ScratchBackend(tmp_path)) as scratch:
            with pytest.raises(StorageError, match="No space left"):
                put_all(scratch, values)
            for key, _ in list(scratch.entries()):
                assert_identical(scratch.get(key), values[key])
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_directory_deleted_under_a_store_is_an_error_and_not_a_loss_elsewhere(root: Path, store: DiskBackend) -> None:
    store.put("key", torch.arange(1000))
    shutil.rmtree(root)
    with pytest.raises(StorageError, match="the directory is gone"):
        store.put("key", torch.zeros(3))
    with pytest.raises(CorruptionError, match="the file is missing"):
        store.get("key")
    with closing(DiskBackend(root)) as other:  # the same path, and another directory
        other.put("key", torch.ones(4))
        with pytest.raises(StorageError, match="the directory is gone"):
            store.put("key", torch.zeros(3))
        assert_identical(other.get("key"), torch.ones(4))
