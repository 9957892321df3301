"""The disk backend: round trips, atomic writes, ownership of the directory, readers, damage."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.samples import all_samples, assert_identical, layout_samples
from tierstore.backends.disk import DiskBackend
from tierstore.errors import BackendError, ClosedError, CorruptionError
from tierstore.file_system import FileSystem
from tierstore.spec import TensorSpec, raw_bytes, typed_view

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates and NUL too
ODD_KEYS = ("", ".", "..", "../../evil", "/etc/evil", "a/b", "\0", "\ud800", "\ud83d\ude00", "\U0001f600", "K", "k", "x" * 5000)

HOLD = """
import sys
from tierstore.backends.disk import DiskBackend
store = DiskBackend(sys.argv[1])
print(store.path, flush=True)
sys.stdin.read()
"""

EMPTY = {"FORMAT", "LOCK", "COMMITS", "index.sqlite"}
"""What a closed store without values consists of."""

OVERWRITE = """
import itertools, sys, torch
from tierstore.backends.disk import DiskBackend
store = DiskBackend(sys.argv[1])
for number in itertools.count():
    store.put("key", torch.full((300_000,), number))
    print(number, flush=True)
"""


class Unflushed(FileSystem):
    """Does not wait for the device where a test does not need it to."""

    def sync(self, descriptor: int) -> None:
        pass


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
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def child(program: str, *arguments: str | Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-P", "-c", program, *map(str, arguments)], stdin=pipe, stdout=pipe, text=True)


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


# --- values ---------------------------------------------------------------------------------------------------------


def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path: Path) -> None:
    samples = all_samples()
    backend = DiskBackend(tmp_path / "store", system=Unflushed())
    for name, tensor in samples.items():
        backend.put(name, tensor)
    for name, tensor in samples.items():
        found = backend.get(name)
        assert_identical(found, tensor)
        assert not found.requires_grad
        if raw_bytes(found).numel():
            assert found.data_ptr() % 4096 == 0
    assert dict(backend.entries()) == {name: TensorSpec.of(tensor) for name, tensor in samples.items()}
    backend.close()


def test_reopening_finds_everything(root: Path, store: DiskBackend) -> None:
    samples = layout_samples(torch.bfloat16)
    for name, tensor in samples.items():
        store.put(name, tensor)
    store.close()
    again = DiskBackend(root)
    assert dict(again.entries()) == {name: TensorSpec.of(tensor) for name, tensor in samples.items()}
    for name, tensor in samples.items():
        assert_identical(again.get(name), tensor)
    again.close()


def test_the_last_put_wins_also_with_another_size(root: Path, store: DiskBackend) -> None:
    for size in (10, 100_000, 0, 3):
        store.put("key", torch.arange(size))
        assert_identical(store.get("key"), torch.arange(size))
    store.close()
    again = DiskBackend(root)
    assert_identical(again.get("key"), torch.arange(3))
    again.close()


def test_a_value_stays_valid_after_put_delete_and_close(store: DiskBackend) -> None:
    store.put("key", torch.arange(5000))
    first = store.get("key")
    store.put("key", torch.zeros(5000))
    second = store.get("key")
    store.delete("key")
    store.close()
    gc.collect()
    assert_identical(first, torch.arange(5000))
    assert_identical(second, torch.zeros(5000))


def test_writing_to_a_value_does_not_reach_the_store(store: DiskBackend) -> None:
    store.put("key", torch.zeros(5000))
    store.get("key").fill_(7)
    assert_identical(store.get("key"), torch.zeros(5000))


def test_missing_keys_raise_key_error(store: DiskBackend) -> None:
    store.put("key", torch.zeros(1))
    store.delete("key")
    for operation in (store.get, store.delete):
        with pytest.raises(KeyError):
            operation("key")
    assert list(store.entries()) == []


def test_a_deleted_key_stays_away_and_leaves_no_file(root: Path, store: DiskBackend) -> None:
    store.put("key", torch.zeros(1))
    store.delete("key")
    store.close()
    assert files_in(root) == EMPTY


def test_inference_mode_and_a_default_device_do_not_change_what_is_returned(store: DiskBackend) -> None:
    tensor = torch.ones(3)
    with torch.inference_mode(), torch.device("meta"):
        store.put("key", tensor)
        found = store.get("key")
    assert_identical(found, tensor)
    assert found.device.type == "cpu"
    assert not found.is_inference()


@pytest.mark.gpu
def test_an_accelerator_tensor_is_stored_with_its_stride(store: DiskBackend) -> None:
    for name, tensor in layout_samples().items():
        store.put(name, typed_view(raw_bytes(tensor).cuda(), TensorSpec.of(tensor)))
        assert_identical(store.get(name), tensor)


def test_live_values_hold_no_file_descriptors(store: DiskBackend) -> None:
    store.put("key", torch.arange(10))
    before = open_descriptors()
    values = [store.get("key") for _ in range(200)]
    assert open_descriptors() == before
    assert_identical(values[-1], torch.arange(10))


def test_threads_may_use_different_keys_at_once(store: DiskBackend) -> None:
    def work(number: int) -> None:
        for size in (1000, 10, 3000):
            store.put(f"key{number}", torch.full((size,), number))
            assert_identical(store.get(f"key{number}"), torch.full((size,), number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert len(dict(store.entries())) == 16


# --- extents --------------------------------------------------------------------------------------------------------


def test_extents_are_the_bytes_of_the_values(store: DiskBackend) -> None:
    samples = all_samples()
    for name, tensor in samples.items():
        store.put(name, tensor)
    for name, tensor in samples.items():
        extent = store.extent(name)
        assert (extent.path, extent.offset % 4096) == (str(store.file_of(name)), 0)
        assert Path(extent.path).read_bytes()[extent.offset :] == raw_bytes(tensor).numpy().tobytes()
        assert extent.nbytes == TensorSpec.of(tensor).nbytes


def test_an_open_extent_stays_valid_after_put_and_delete(store: DiskBackend) -> None:
    for replace in (True, False):
        store.put("key", torch.arange(5000))
        extent = store.extent("key")
        with Path(extent.path).open("rb") as file:
            if replace:
                store.put("key", torch.zeros(5000))
            else:
                store.delete("key")
            file.seek(extent.offset)
            assert file.read() == torch.arange(5000).numpy().tobytes()


def test_extent_refuses_what_get_refuses(store: DiskBackend) -> None:
    for key in ("short", "long", "gone", "header"):
        store.put(key, torch.arange(5000))
    os.truncate(store.file_of("short"), 9000)
    with store.file_of("long").open("ab") as file:
        file.write(b"x")
    store.file_of("gone").unlink()
    with store.file_of("header").open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    for key in ("short", "long", "gone", "header"):
        for look in (store.get, store.extent):
            with pytest.raises(CorruptionError, match=str(store.file_of(key))):
                look(key)
    with pytest.raises(KeyError):
        store.extent("other")
    store.close()
    with pytest.raises(ClosedError):
        store.extent("short")


# --- the format -----------------------------------------------------------------------------------------------------


def test_safetensors_opens_every_file(tmp_path: Path) -> None:
    backend = DiskBackend(tmp_path / "store", scratch=True)
    plain = 0
    for name, tensor in all_samples().items():
        backend.put(name, tensor)
        with safe_open(backend.file_of(name), "pt") as file:
            assert list(file.keys()) == ["data"]
            metadata, found = file.metadata(), file.get_tensor("data")
        assert torch.equal(raw_bytes(found), raw_bytes(tensor))
        if (found.dtype, found.shape) == (tensor.dtype, tensor.shape):
            assert tensor.is_contiguous()
            plain += 1
        else:
            assert (found.dtype, found.ndim) == (torch.uint8, 1)
        assert (metadata["tierstore"], metadata["key"]) == ("1", name)
        assert metadata["dtype"] == str(tensor.dtype).removeprefix("torch.")
        assert tuple(json.loads(metadata["shape"])) == tensor.shape
        assert tuple(json.loads(metadata["stride"])) == tensor.stride()
    assert plain == 19 * 7  # the dtypes that safetensors can name, in the layouts that are row-major
    backend.close()


@pytest.mark.parametrize("length", [1, 3600, 4000, 4100, 9000])
def test_data_is_aligned_behind_a_key_of_any_length(store: DiskBackend, length: int) -> None:
    key = "\N{SNOWMAN}" * length
    store.put(key, torch.arange(10))
    head = store.file_of(key).stat().st_size - 80
    assert head % 4096 == 0
    assert int.from_bytes(store.file_of(key).read_bytes()[:8], "little") == head - 8
    assert_identical(store.get(key), torch.arange(10))
    with safe_open(store.file_of(key), "pt") as file:
        assert file.metadata()["key"] == key


@settings(max_examples=40, deadline=None)
@given(st.lists(ANY_TEXT, unique=True, max_size=4))
@example(list(ODD_KEYS))
def test_any_text_is_a_key(keys: list[str]) -> None:
    with TemporaryDirectory() as folder, mock.patch("os.fsync"):
        backend = DiskBackend(Path(folder, "store"))
        for number, key in enumerate(keys):
            backend.put(key, torch.tensor(number))
        backend.close()
        assert {path.name for path in Path(folder).iterdir()} == {"store"}
        again = DiskBackend(Path(folder, "store"))
        assert {key for key, _ in again.entries()} == set(keys)
        assert [again.get(key).item() for key in keys] == list(range(len(keys)))
        again.close()


def test_every_file_opens_in_safetensors_whatever_the_key(store: DiskBackend) -> None:
    for key in ODD_KEYS:
        store.put(key, torch.arange(3))
        with safe_open(store.file_of(key), "pt") as file:
            assert_identical(file.get_tensor("data"), torch.arange(3))


# --- writes ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_half_way_keeps_the_older_value(root: Path, store: DiskBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("key", torch.arange(1000))
    before = files_in(root)
    write, calls = os.write, []

    def full(fd: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:100])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        store.put("key", torch.zeros(9000))
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert files_in(root) == before
    assert_identical(store.get("key"), torch.arange(1000))


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "replace"])
def test_any_failure_before_the_rename_changes_nothing(root: Path, store: DiskBackend, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    store.put("key", torch.arange(1000))
    before = files_in(root)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, refuse)
    for key in ("key", "new"):
        with pytest.raises(OSError, match="Input/output") as caught:
            store.put(key, torch.zeros(9000))
        assert caught.value.errno == errno.EIO
    monkeypatch.undo()
    assert files_in(root) == before
    assert [key for key, _ in store.entries()] == ["key"]
    assert_identical(store.get("key"), torch.arange(1000))


def test_a_failed_flush_of_the_new_name_leaves_a_whole_value(store: DiskBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("key", torch.arange(1000))
    fsync, folder = os.fsync, store.file_of("key").parent

    def refuse_folder(fd: int) -> None:
        if os.fstat(fd).st_ino == folder.stat().st_ino:
            raise OSError(errno.EIO, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse_folder)
    with pytest.raises(OSError, match="Input/output"):
        store.put("key", torch.zeros(9000))
    assert_identical(store.get("key"), torch.zeros(9000))


def test_an_interrupt_leaves_no_temporary_file(root: Path, store: DiskBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.put("key", torch.zeros(10))
    assert files_in(root) == {"FORMAT", "LOCK"}


def test_short_writes_are_continued(store: DiskBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:1001]))
    store.put("key", torch.arange(5000))
    assert_identical(store.get("key"), torch.arange(5000))


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_cannot_reserve_space_are_fine(store: DiskBackend, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(code, "unsupported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    store.put("key", torch.arange(10))
    assert_identical(store.get("key"), torch.arange(10))


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
    store.close()


# --- the directory --------------------------------------------------------------------------------------------------


def test_a_second_store_is_refused_until_the_first_closes(root: Path, store: DiskBackend) -> None:
    with pytest.raises(BackendError, match=r"another store has .* open; close that one first"):
        DiskBackend(root)
    store.close()
    DiskBackend(root).close()


def test_a_killed_process_frees_its_directory(root: Path) -> None:
    holder = child(HOLD, root, "persistent")
    assert next_line(holder) == str(root)
    with pytest.raises(BackendError, match="another store has"):
        DiskBackend(root)
    kill(holder)
    DiskBackend(root).close()


def test_a_forked_child_cannot_give_the_lock_or_the_files_away(tmp_path: Path) -> None:
    backend = DiskBackend(tmp_path / "store", scratch=True)
    backend.put("key", torch.arange(3))
    pid = os.fork()
    if pid == 0:
        backend.close()
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(BackendError, match="another store"):
        DiskBackend(tmp_path / "store")
    assert_identical(backend.get("key"), torch.arange(3))
    backend.close()


def test_a_forgotten_store_frees_its_directory(root: Path) -> None:
    with pytest.warns(ResourceWarning):
        DiskBackend(root)
    DiskBackend(root).close()


def test_after_close_every_operation_says_so(store: DiskBackend) -> None:
    store.put("key", torch.zeros(1))
    store.close()
    store.close()
    for operation in (lambda: store.put("key", torch.zeros(1)), lambda: store.get("key"), lambda: store.delete("key"), store.entries):
        with pytest.raises(ClosedError, match="closed; open it again"):
            operation()


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(BackendError, match=str(file)):
            DiskBackend(path)


def test_a_path_that_torch_cannot_open_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="is not UTF-8"):
        DiskBackend(tmp_path / os.fsdecode(b"\xff"))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BackendError, match=r"belongs to something else .*thesis\.tex.*choose an empty or new directory"):
        DiskBackend(tmp_path)
    assert files_in(tmp_path) == {"thesis.tex"}


def test_an_empty_directory_and_the_rest_of_a_crashed_opening_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "LOCK").touch()
    (tmp_path / ".tmp-half").touch()
    DiskBackend(tmp_path).close()
    assert files_in(tmp_path) == {"FORMAT", "LOCK"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "tierstore-disk", "version": 2}', "has version 2 of tierstore-disk.*open it with the tierstore that wrote it"),
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


def test_a_directory_that_cannot_be_written_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"cannot open a store in /proc/tierstore.*choose a directory"):
        DiskBackend("/proc/tierstore")
    root.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere, so permissions alone would not show it
    with pytest.raises(BackendError, match="is not writable"):
        DiskBackend(root)


# --- damage ---------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def extend(file: Path) -> None:
    os.truncate(file, file.stat().st_size + 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def change_header(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content.replace(b"float32", b"float64", 1))


@pytest.mark.parametrize("damage", [truncate, extend, empty, change_header, Path.unlink])
def test_damage_while_open_is_reported_with_key_and_file(store: DiskBackend, damage: object) -> None:
    store.put("layer.weight", torch.zeros(100))
    store.put("other", torch.ones(100))
    assert callable(damage)
    damage(store.file_of("layer.weight"))
    with pytest.raises(CorruptionError, match=r"layer\.weight") as caught:
        store.get("layer.weight")
    assert caught.value.key == "layer.weight"
    assert caught.value.file == str(store.file_of("layer.weight"))
    assert_identical(store.get("other"), torch.ones(100))
    store.delete("layer.weight")
    store.put("layer.weight", torch.zeros(100))
    assert_identical(store.get("layer.weight"), torch.zeros(100))


@pytest.mark.parametrize("damage", [truncate, extend, empty, change_header])
def test_damage_is_found_at_opening(root: Path, store: DiskBackend, damage: object) -> None:
    store.put("layer.weight", torch.zeros(100))
    store.close()
    assert callable(damage)
    damage(store.file_of("layer.weight"))
    with pytest.raises(CorruptionError) as caught:
        DiskBackend(root)
    assert caught.value.key in ("layer.weight", "?")
    assert caught.value.file == str(store.file_of("layer.weight"))
    store.file_of("layer.weight").unlink()
    DiskBackend(root).close()


def test_a_flipped_bit_anywhere_in_a_header_is_found(root: Path, store: DiskBackend) -> None:
    store.put("key", torch.arange(6).reshape(1, 2, 3))
    store.close()
    file = store.file_of("key")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"[6, 3, 1]", b"[7, 3, 1]"))  # as many bytes, since that dimension has one element
    with pytest.raises(CorruptionError, match="checksum"):
        DiskBackend(root)
    end = content.index(b"  ") + 2  # two of the padding's spaces
    for position in range(end):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position * 5 % 8)
        file.write_bytes(damaged)
        with pytest.raises(CorruptionError):
            DiskBackend(root)
    file.write_bytes(content)
    DiskBackend(root).close()


def blob(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        b"\xff" * 8,
        b"\xff" * 8 + b"{}",
        blob(b"[" * 100_000),
        blob([]),
        blob({}),
        blob({"__metadata__": {}, "data": {}}),
        blob({"__metadata__": [], "data": None}),
        blob({"__metadata__": {"key": "k", "dtype": "float32", "shape": "[" * 100_000, "stride": "[]"}, "data": None}),
        blob({"__metadata__": {"key": "k", "dtype": "float32", "shape": "[-1]", "stride": "[1]"}, "data": None}),
        blob({"__metadata__": {"key": "k", "dtype": "float32", "shape": "[9" + "9" * 5000 + "]", "stride": "[1]"}, "data": None}),
        blob({"__metadata__": {"key": "k", "dtype": "load", "shape": "[1]", "stride": "[1]"}, "data": None}),
        blob({"__metadata__": {"key_hex": "xyz"}, "data": None}),
        blob({"__metadata__": {"key_hex": "ff"}, "data": None}),
    ],
)
def test_hostile_files_are_refused_as_damage(root: Path, store: DiskBackend, content: bytes) -> None:
    store.put("k", torch.zeros(1))
    store.close()
    store.file_of("k").write_bytes(content)
    with pytest.raises(CorruptionError):
        DiskBackend(root)


def test_a_file_in_the_place_of_another_key_is_found(root: Path, store: DiskBackend) -> None:
    store.put("a", torch.zeros(4))
    store.put("b", torch.ones(4))
    store.file_of("b").write_bytes(store.file_of("a").read_bytes())
    with pytest.raises(CorruptionError, match="header has changed"):
        store.get("b")
    store.close()
    with pytest.raises(CorruptionError, match="named for another key") as caught:
        DiskBackend(root)
    assert caught.value.key == "a"


# --- scratch --------------------------------------------------------------------------------------------------------


def test_a_scratch_store_is_gone_after_close_and_never_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, "a scratch store must not flush")

    monkeypatch.setattr(os, "fsync", refuse)
    backend = DiskBackend.scratch(tmp_path / "cache")
    backend.put("key", torch.arange(10))
    value = backend.get("key")
    assert backend.path.parent == tmp_path / "cache"
    backend.close()
    backend.close()
    assert list((tmp_path / "cache").iterdir()) == []
    assert_identical(value, torch.arange(10))


def test_scratch_never_takes_a_directory_with_values(root: Path, store: DiskBackend) -> None:
    store.put("key", torch.arange(10))
    store.close()
    with pytest.raises(BackendError, match="belongs to another store"):
        DiskBackend(root, scratch=True)
    with pytest.raises(BackendError, match="belongs to another store"):
        DiskBackend.scratch(root)
    again = DiskBackend(root)
    assert_identical(again.get("key"), torch.arange(10))
    again.close()


def test_scratch_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match="file"):
        DiskBackend.scratch(tmp_path / "file")


def test_the_directory_of_a_killed_owner_is_swept_and_of_a_live_one_is_kept(tmp_path: Path) -> None:
    dead, alive = child(HOLD, tmp_path, "scratch"), child(HOLD, tmp_path, "scratch")
    dead_path, alive_path = Path(next_line(dead)), Path(next_line(alive))
    kill(dead)
    mine = DiskBackend.scratch(tmp_path)
    DiskBackend.scratch(tmp_path).close()
    assert not dead_path.exists()
    assert set(tmp_path.iterdir()) == {alive_path, mine.path}
    mine.close()
    kill(alive)


def test_a_directory_not_yet_locked_is_left_alone_until_it_is_old(tmp_path: Path) -> None:
    fresh = scratch_directory(tmp_path)
    assert scratch_directory(tmp_path) != fresh
    assert fresh.is_dir()
    (fresh / "LOCK").touch()  # created, and not yet locked
    scratch_directory(tmp_path)
    assert fresh.is_dir()
    os.utime(fresh, (0, 0))
    scratch_directory(tmp_path)
    assert not fresh.exists()


def test_sweeping_touches_nothing_but_scratch_directories(tmp_path: Path) -> None:
    (tmp_path / "tierstore-scratch-file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "tierstore-scratch-link").symlink_to(tmp_path / "mine")
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    DiskBackend.scratch(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "tierstore-scratch-file", "tierstore-scratch-link"}
    assert list((tmp_path / "mine").iterdir()) == []
