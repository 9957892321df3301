"""The directory of a disk store: whose it is, which versions are read, and who may have it open."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.disk.children import Child, read_keys
from tests.disk.conftest import EMPTY, HOLD, child, files_in, in_fork, kill, next_line
from tests.disk.golden import DISK_1, DISK_2, golden_values
from tests.samples import assert_identical
from tierstore.backends.disk import DiskBackend, DiskReader
from tierstore.errors import BackendError, ClosedError, CorruptionError
from tierstore.file_system import FileSystem
from tierstore.spec import TensorSpec

# --- ownership ------------------------------------------------------------------------------------------------------


def test_a_second_store_is_refused_until_the_first_closes(root: Path, store: DiskBackend) -> None:
    with pytest.raises(BackendError, match=r"another store has .* open; close that one first"):
        DiskBackend(root)
    store.close()
    DiskBackend(root).close()


def test_a_killed_process_frees_its_directory(root: Path) -> None:
    holder = child(HOLD, root)
    assert next_line(holder) == str(root)
    with pytest.raises(BackendError, match="another store has"):
        DiskBackend(root)
    kill(holder)
    DiskBackend(root).close()


def test_a_forked_child_is_refused_and_cannot_give_the_lock_or_the_values_away(root: Path, store: DiskBackend) -> None:
    store.put("key", torch.arange(3))

    def misuse() -> None:
        for operation in (lambda: store.get("key"), lambda: store.put("key", torch.zeros(1)), lambda: store.delete("key"), store.entries):
            with pytest.raises(ClosedError, match="a forked child opens it for itself"):
                operation()
        store.close()

    assert in_fork(misuse) == 0
    with pytest.raises(BackendError, match="another store"):
        DiskBackend(root)
    store.put("other", torch.arange(4))
    assert_identical(store.get("key"), torch.arange(3))
    assert_identical(store.get("other"), torch.arange(4))


def test_a_forked_child_does_not_keep_the_lock_of_its_parent(root: Path, store: DiskBackend) -> None:
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(told, 1)
        os._exit(0)
    store.close()
    DiskBackend(root).close()
    os.write(tell, b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(told)
    os.close(tell)


def test_a_forgotten_store_frees_its_directory(root: Path) -> None:
    DiskBackend(root)
    gc.collect()
    DiskBackend(root).close()


def test_after_close_every_operation_says_so(store: DiskBackend) -> None:
    store.put("key", torch.zeros(1))
    store.close()
    store.close()
    for operation in (lambda: store.put("key", torch.zeros(1)), lambda: store.get("key"), lambda: store.delete("key"), store.entries):
        with pytest.raises(ClosedError, match="closed; open it again"):
            operation()


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(BackendError, match=str(file)):
            DiskBackend(path)


def test_a_path_need_not_be_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff ?#%41")
    with closing(DiskBackend(path)) as store:
        store.put("key", torch.arange(3))
    with closing(DiskBackend(path)) as store:
        assert_identical(store.get("key"), torch.arange(3))
    assert files_in(tmp_path) == {f"{path.name}/{name}" for name in EMPTY | {str(store.file_of("key").relative_to(path))}}


def test_a_directory_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BackendError, match=r"belongs to something else .*thesis\.tex.*choose an empty or new directory"):
        DiskBackend(tmp_path)
    assert files_in(tmp_path) == {"thesis.tex"}


def test_an_empty_directory_and_the_rest_of_a_crashed_opening_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "LOCK").touch()
    (tmp_path / ".tmp-half").touch()
    DiskBackend(tmp_path).close()
    assert files_in(tmp_path) == EMPTY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "tierstore-disk", "version": 3}', "has version 3 of tierstore-disk.*open it with the tierstore that wrote it"),
        ('{"format": "tierstore-disk", "version": 2}', "does not match its checksum; .*repair. makes it anew"),
        ('{"format": "tierstore-zarr", "version": 1}', "belongs to something else"),
        ("[1]", "belongs to something else"),
        ("", "belongs to something else"),
        ("\xff\xfe", "belongs to something else"),
    ],
)
def test_an_unknown_format_is_refused_and_the_lock_given_back(root: Path, store: DiskBackend, text: str, message: str) -> None:
    store.close()
    good = (root / "FORMAT").read_text()
    (root / "FORMAT").write_text(text, encoding="latin-1")
    with pytest.raises(BackendError, match=message):
        DiskBackend(root)
    (root / "FORMAT").write_text(good)
    DiskBackend(root).close()


def test_an_index_of_another_store_is_refused(root: Path, tmp_path: Path, store: DiskBackend) -> None:
    store.put("key", torch.zeros(3))
    store.close()
    DiskBackend(tmp_path / "other").close()
    shutil.copy(tmp_path / "other" / "index.sqlite", root / "index.sqlite")
    with pytest.raises(CorruptionError, match=r"index\.sqlite"):
        DiskBackend(root)


class Forbidden(FileSystem):
    """Lets nobody make a file, as if the directory were somebody else's."""

    def open(self, name: str, flags: int, *, folder: int | None = None, mode: int = 0o666) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return super().open(name, flags, folder=folder, mode=mode)


def test_a_directory_that_cannot_be_written_is_refused(root: Path) -> None:
    with pytest.raises(BackendError, match=r"cannot open a store in /proc/tierstore.*choose a directory"):
        DiskBackend("/proc/tierstore")
    root.mkdir(parents=True)
    with pytest.raises(BackendError, match=r"Permission denied.*choose a directory that this user may write to"):
        DiskBackend(root, system=Forbidden())
    assert files_in(root) == set()


# --- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", [DISK_1, DISK_2], ids=["version 1", "version 2"])
def test_stores_of_every_version_are_read_and_written(root: Path, golden: Path) -> None:
    shutil.copytree(golden, root)
    with closing(DiskBackend(root, verify="always")) as store:
        assert dict(store.entries()) == {key: TensorSpec.of(value) for key, value in golden_values().items()}
        for key, value in golden_values().items():
            assert_identical(store.get(key), value)
        store.put("layer.bias", torch.zeros(2))
        store.delete("scalar")
    assert json.loads((root / "FORMAT").read_text())["version"] == 2
    with closing(DiskBackend(root, verify="always")) as store:
        assert_identical(store.get("layer.bias"), torch.zeros(2))
        assert {key for key, _ in store.entries()} == golden_values().keys() - {"scalar"}
    assert DiskBackend.verify(root).sound


@pytest.mark.parametrize("golden", [DISK_1, DISK_2], ids=["version 1", "version 2"])
def test_a_reader_of_any_version_changes_nothing(root: Path, golden: Path) -> None:
    shutil.copytree(golden, root)
    before = {name: (root / name).read_bytes() for name in files_in(root)}
    with closing(DiskBackend.reader(root)) as reader:
        for key, value in golden_values().items():
            assert_identical(reader.get(key), value)
    assert {name: (root / name).read_bytes() for name in files_in(root)} == before


# --- readers --------------------------------------------------------------------------------------------------------


def test_a_reader_sees_what_was_committed_when_it_was_refreshed(root: Path, store: DiskBackend) -> None:
    store.put("key", torch.zeros(3))
    with closing(DiskBackend.reader(root)) as reader:
        store.put("key", torch.ones(4))
        store.put("other", torch.ones(1))
        assert_identical(reader.get("key"), torch.ones(4))  # the file of the older value is gone
        with closing(DiskBackend.reader(root)) as another:
            store.put("third", torch.ones(1))
            with pytest.raises(KeyError):
                another.get("third")
            another.refresh()
            assert_identical(another.get("third"), torch.ones(1))
            store.delete("third")
            with pytest.raises(KeyError):
                another.get("third")
    with pytest.raises(ClosedError, match="closed; open it again"):
        reader.get("key")


def test_a_reader_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"there is no store in .*open it for writing to make one"):
        DiskReader(tmp_path)
    with pytest.raises(BackendError, match="No such file"):
        DiskReader(tmp_path / "nothing")


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("rounds", [60, pytest.param(3000, marks=pytest.mark.stress)])
def test_processes_read_whole_values_while_another_one_writes(root: Path, store: DiskBackend, rounds: int) -> None:
    """Each value is filled with its version; a reader must see versions that never go back, and all of one value alike."""
    for key in "ab":
        store.put(key, torch.zeros(50_000, dtype=torch.int64))
    children = [Child(read_keys, str(root)) for _ in range(2)]
    for one in children:
        assert one.channel.recv() == "reading"
    for version in range(1, rounds):
        for key in "ab":
            store.put(key, torch.full((50_000,), version))
    for one in children:
        one.channel.send("stop")
        assert one.end() == ["sound"]
