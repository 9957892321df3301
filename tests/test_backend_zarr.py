"""The zarr backend: round trips, what plain zarr reads, atomic replacement, ownership of the group, damage."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec

from tests.samples import DTYPES, all_samples, assert_identical, layout_samples, random_bits
from tierstore import Tier, TieredStore, open_backend
from tierstore.backends._zarr_metadata import node_name
from tierstore.backends.zarr_dir import ZarrBackend
from tierstore.errors import BackendError, ClosedError, CorruptionError
from tierstore.spec import TensorSpec, raw_bytes, typed_view
from tierstore.transfer.reader import Reader

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore:ComplexHalf")]

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates and NUL too
CLOSE_TEXT = st.text("kK%4bB_", max_size=6) | st.text("xX.", min_size=30, max_size=110)
ODD_KEYS = ("", ".", "..", "../../evil", "/etc/evil", "a/b", "a%2Fb", "__a", "c", "zarr.json", "\0", "\ud800", "\ud83d\ude00", "\U0001f600")
CLASHING_KEYS = ("K", "k", "%4b", "%4B", "x" * 101, "X" * 101, "%", "%sha256-")
NUMPY_NAMES = {
    torch.bfloat16: "uint16",
    torch.complex32: "uint32",
    torch.float8_e4m3fn: "uint8",
    torch.float8_e4m3fnuz: "uint8",
    torch.float8_e5m2: "uint8",
    torch.float8_e5m2fnuz: "uint8",
    torch.float8_e8m0fnu: "uint8",
    torch.float4_e2m1fn_x2: "uint8",
}  # all others have their own

OVERWRITE = """
import itertools, sys, torch
from tierstore.backends.zarr_dir import ZarrBackend
store = ZarrBackend(sys.argv[1])
for number in itertools.count():
    store.put("key", torch.full((100_000,), number))
    print(number, flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def zarr_threads() -> None:
    """Make zarr start its event loop, which keeps descriptors of its own until the process ends.

    What other tests left to the collector, such as connections of fsspec, would be closed in the middle of one of these.
    """
    zarr.create_group({})
    gc.collect()


@pytest.fixture(autouse=True)
def no_leaked_descriptors(zarr_threads: None) -> Iterator[None]:
    before = open_descriptors()
    yield
    if open_descriptors() != before:
        gc.collect()
    assert open_descriptors() == before


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


@pytest.fixture
def store(root: Path) -> Iterator[ZarrBackend]:
    backend = ZarrBackend(root)
    yield backend
    backend.close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def chunk_of(node: Path) -> Path:
    return next(path for path in (node / "c", *(node / "c").rglob("*")) if path.is_file())


# --- values ---------------------------------------------------------------------------------------------------------


def test_every_dtype_and_layout_comes_back_bit_for_bit_also_after_reopening(root: Path) -> None:
    samples = all_samples()
    with mock.patch("os.fsync"):
        backend = ZarrBackend(root)
        for name, tensor in samples.items():
            backend.put(name, tensor)
        for name, tensor in samples.items():
            assert_identical(backend.get(name), tensor)
        backend.close()
    again = ZarrBackend(root)
    assert dict(again.entries()) == {name: TensorSpec.of(tensor) for name, tensor in samples.items()}
    for name, tensor in samples.items():
        assert_identical(again.get(name), tensor)
    again.close()


def test_the_last_put_wins_also_with_another_rank(root: Path, store: ZarrBackend) -> None:
    for shape in ((10,), (3, 4, 5), (), (0, 2), (2, 2)):
        store.put("key", torch.ones(shape))
        assert_identical(store.get("key"), torch.ones(shape))
    assert names_in(root) == {"zarr.json", "key"}
    store.close()
    again = ZarrBackend(root)
    assert_identical(again.get("key"), torch.ones(2, 2))
    again.close()


def test_a_tensor_of_zeros_is_written_and_not_taken_for_lost(store: ZarrBackend) -> None:
    store.put("zeros", torch.zeros(3, 4))
    assert chunk_of(store.node_of("zeros")).stat().st_size == 48
    assert_identical(store.get("zeros"), torch.zeros(3, 4))


def test_a_value_stays_valid_after_put_delete_and_close(store: ZarrBackend) -> None:
    store.put("key", torch.arange(5000))
    first = store.get("key")
    store.put("key", torch.zeros(5000))
    store.delete("key")
    store.close()
    assert_identical(first, torch.arange(5000))


def test_missing_keys_raise_key_error(root: Path, store: ZarrBackend) -> None:
    store.put("key", torch.zeros(1))
    store.delete("key")
    for operation in (store.get, store.delete):
        with pytest.raises(KeyError):
            operation("key")
    assert list(store.entries()) == []
    assert names_in(root) == {"zarr.json"}


def test_inference_mode_and_a_default_device_do_not_change_what_is_returned(store: ZarrBackend) -> None:
    tensor = torch.ones(3)
    with torch.inference_mode(), torch.device("meta"):
        store.put("key", tensor)
        found = store.get("key")
    assert_identical(found, tensor)
    assert found.device.type == "cpu"
    assert not found.is_inference()


def test_the_settings_of_zarr_do_not_change_what_is_written(store: ZarrBackend) -> None:
    with zarr.config.set({"default_zarr_format": 2, "array.write_empty_chunks": False, "array.order": "F"}):
        store.put("key", torch.zeros(3, 4))
        assert_identical(store.get("key"), torch.zeros(3, 4))
    assert (store.node_of("key") / "c" / "0" / "0").is_file()


@pytest.mark.gpu
def test_an_accelerator_tensor_is_stored_with_its_stride(store: ZarrBackend) -> None:
    for name, tensor in layout_samples().items():
        store.put(name, typed_view(raw_bytes(tensor).cuda(), TensorSpec.of(tensor)))
        assert_identical(store.get(name), tensor)


def test_threads_may_use_different_keys_at_once(store: ZarrBackend) -> None:
    def work(number: int) -> None:
        for size in (1000, 10):
            store.put(f"key{number}", torch.full((size,), number))
            assert_identical(store.get(f"key{number}"), torch.full((size,), number))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(dict(store.entries())) == 8


# --- what others see ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_zarr_sees_dense_tensors_in_their_own_shape(store: ZarrBackend, dtype: torch.dtype) -> None:
    name = NUMPY_NAMES.get(dtype, str(dtype).removeprefix("torch."))
    tensor = random_bits(TensorSpec(dtype, (2, 3, 4), (1, 8, 2)))
    store.put("layer.weight", tensor)
    array = zarr.open_array(store.node_of("layer.weight"), mode="r")
    row_major = typed_view(raw_bytes(tensor), TensorSpec(getattr(torch, name), (2, 3, 4), (1, 8, 2))).contiguous()
    assert (array.dtype, array.shape) == (np.dtype(name), (2, 3, 4))
    assert array[...].tobytes() == row_major.numpy().tobytes()
    assert array.attrs.asdict() == {
        "tierstore_key": "layer.weight",
        "tierstore_dtype": str(dtype).removeprefix("torch."),
        "tierstore_shape": [2, 3, 4],
        "tierstore_stride": [1, 8, 2],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensorstore_reads_what_zarr_reads(store: ZarrBackend, dtype: torch.dtype) -> None:
    for number, stride in enumerate(((12, 4, 1), (1, 8, 2), (1, 2, 6))):
        tensor = random_bits(TensorSpec(dtype, (2, 3, 4), stride), seed=number)
        key = f"key{number}"
        store.put(key, tensor)
        driver = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.node_of(key))}}
        found = tensorstore.open(driver, read=True).result().read().result()
        expected = zarr.open_array(store.node_of(key), mode="r")[...]
        assert isinstance(expected, np.ndarray)
        assert (found.shape, found.dtype, found.tobytes()) == ((2, 3, 4), expected.dtype, expected.tobytes())


def test_a_chunk_is_the_bytes_of_the_tensor_from_its_first_byte_on(store: ZarrBackend) -> None:
    for name, tensor in layout_samples(torch.bfloat16).items():
        store.put(name, tensor)
        extent = store.extent(name)
        assert (extent.offset, extent.nbytes) == (0, TensorSpec.of(tensor).nbytes), name
        if extent.nbytes:
            assert Path(extent.path).read_bytes() == raw_bytes(tensor).numpy().tobytes(), name
            assert Path(extent.path) == chunk_of(store.node_of(name))


def test_a_store_reads_chunks_around_zarr(store: ZarrBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    values = layout_samples() | {"large": torch.arange(3 << 20)}
    for name, tensor in values.items():
        store.put(name, tensor)
    read: list[str] = []
    submit = Reader.begin
    monkeypatch.setattr(Reader, "begin", lambda reader, prepare, done: read.append("one") or submit(reader, prepare, done))
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda array, selection: pytest.fail("zarr was asked"))
    with TieredStore([Tier("ram", open_backend("device", "cpu")), Tier("zarr", store)]) as tiered:
        for name, tensor in values.items():
            assert_identical(tiered.get(name), tensor)
    assert len(read) == len(values)


# --- zarr-python and tensorstore write too --------------------------------------------------------------------------------


def rewrite_with_zarr(store: ZarrBackend, values: np.ndarray) -> None:
    zarr.open_array(store.node_of("key"), mode="r+")[...] = values


def rewrite_with_tensorstore(store: ZarrBackend, values: np.ndarray) -> None:
    driver = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.node_of("key"))}}
    tensorstore.open(driver).result().write(values).result()


@pytest.mark.parametrize("rewrite", [rewrite_with_zarr, rewrite_with_tensorstore])
@pytest.mark.parametrize("stride", [(4, 1), (1, 3)], ids=["row-major", "column-major"])
def test_what_others_write_is_read_and_what_was_handed_out_stays(
    store: ZarrBackend, stride: tuple[int, int], rewrite: Callable[[ZarrBackend, np.ndarray], None]
) -> None:
    old = random_bits(TensorSpec(torch.int32, (3, 4), stride))
    store.put("key", old)
    held, extent = store.get("key"), store.extent("key")
    for number in range(1, 4):
        new = torch.arange(12, dtype=torch.int32).reshape(3, 4) * number
        rewrite(store, new.numpy())
        found = store.get("key")
        assert found.stride() == stride
        assert torch.equal(found, new)
        file = store.extent("key").file
        assert file is not None
        memory = np.empty(48, np.uint8)
        file.read(memory.data, 0)
        assert memory.tobytes() == raw_bytes(found).numpy().tobytes()
    assert_identical(held, old)
    assert extent.file is not None


def test_zeros_that_zarr_leaves_out_raise(store: ZarrBackend) -> None:
    store.put("key", torch.ones(3, 4))
    array = zarr.open_array(store.node_of("key"), mode="r+")
    array[...] = 0  # by default zarr-python deletes a chunk of zeros
    with pytest.raises(CorruptionError, match="the chunk is missing"):
        store.get("key")
    with pytest.raises(CorruptionError, match="the chunk is missing"):
        store.extent("key")
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(store.node_of("key"), mode="r+")[...] = 0
    assert_identical(store.get("key"), torch.zeros(3, 4))


def test_an_array_that_was_made_anew_in_another_form_raises(root: Path, store: ZarrBackend) -> None:
    store.put("key", torch.ones(3, 4))
    attributes = zarr.open_array(store.node_of("key"), mode="r").attrs.asdict()
    anew = {"name": "key", "shape": (3, 4), "dtype": "float32", "attributes": attributes, "overwrite": True}
    big_endian = {"chunks": (3, 4), "compressors": None, "serializer": BytesCodec(endian="big")}
    for other in ({"chunks": (1, 4), "compressors": None}, {"chunks": (3, 4), "compressors": "auto"}, big_endian):
        zarr.create_array(root, **(anew | other))[...] = np.ones((3, 4))
        with pytest.raises(CorruptionError):
            store.get("key")
    zarr.create_array(root, **anew, chunks=(3, 4), compressors=None)[...] = np.full((3, 4), 7)
    assert_identical(store.get("key"), torch.full((3, 4), 7.0))


def test_attributes_that_others_add_do_no_harm(root: Path, store: ZarrBackend) -> None:
    store.put("key", torch.ones(3, 4))
    zarr.open_array(store.node_of("key"), mode="r+").attrs["note"] = "mine"
    assert_identical(store.get("key"), torch.ones(3, 4))
    store.close()
    again = ZarrBackend(root)
    assert_identical(again.get("key"), torch.ones(3, 4))
    again.close()


def test_plain_zarr_lists_the_group_without_a_warning(root: Path, store: ZarrBackend) -> None:
    for name, tensor in layout_samples().items():
        store.put(name, tensor)
    group = zarr.open_group(root, mode="r")
    assert set(group.array_keys()) == {node_name(name) for name in layout_samples()}
    scalar = group[node_name("scalar")]
    assert isinstance(scalar, zarr.Array)
    assert scalar.shape == ()
    expanded = group[node_name("expanded")]
    assert isinstance(expanded, zarr.Array)
    assert (expanded.shape, expanded.dtype) == ((12,), np.dtype("uint8"))


@settings(max_examples=30, deadline=None)
@given(st.lists(ANY_TEXT, unique=True, max_size=3))
@example([*ODD_KEYS, *CLASHING_KEYS])
def test_any_text_is_a_key(keys: list[str]) -> None:
    with TemporaryDirectory() as folder, mock.patch("os.fsync"):
        backend = ZarrBackend(Path(folder, "store"))
        for number, key in enumerate(keys):
            backend.put(key, torch.tensor(number))
        backend.close()
        assert names_in(Path(folder)) == {"store"}
        assert all(path.is_dir() or path.name == "zarr.json" for path in Path(folder, "store").iterdir())
        again = ZarrBackend(Path(folder, "store"))
        assert {key for key, _ in again.entries()} == set(keys)
        assert [again.get(key).item() for key in keys] == list(range(len(keys)))
        again.close()
        assert len(list(zarr.open_group(Path(folder, "store"), mode="r").array_keys())) == len(keys)


@given(CLOSE_TEXT, CLOSE_TEXT)
def test_two_keys_never_share_a_name_even_without_case(one: str, other: str) -> None:
    assert (node_name(one).casefold() == node_name(other).casefold()) == (one == other)


def test_a_key_that_spells_the_hash_of_another_has_a_name_of_its_own() -> None:
    long = "x" * 500
    assert node_name(hashlib.sha256(long.encode()).hexdigest()) != node_name(long)
    assert node_name(node_name(long)) != node_name(long)


def test_names_are_short_readable_and_plain() -> None:
    assert node_name("layer-0_weight") == "layer-0_weight"
    assert node_name("model.Layer") == "model%2E%4Cayer"
    names = [node_name(key) for key in (*ODD_KEYS, *CLASHING_KEYS, "\u00e9" * 1000)]
    assert len({name.casefold() for name in names}) == len(names)
    assert all(0 < len(name) <= 100 and not name.startswith(("__", ".")) and "/" not in name for name in names)


# --- writes ---------------------------------------------------------------------------------------------------------


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("target", ["zarr.storage._local._put", "os.fsync"])
def test_a_failed_write_keeps_the_older_value(root: Path, store: ZarrBackend, target: str) -> None:
    store.put("key", torch.arange(10))
    for key in ("key", "new"):
        with mock.patch(target, refuse), pytest.raises(OSError, match="No space left") as caught:
            store.put(key, torch.zeros(99))
        assert caught.value.errno == errno.ENOSPC
    assert names_in(root) == {"zarr.json", "key"}
    assert [key for key, _ in store.entries()] == ["key"]
    assert_identical(store.get("key"), torch.arange(10))


def test_a_write_that_fails_after_the_metadata_keeps_the_older_value(root: Path, store: ZarrBackend) -> None:
    store.put("key", torch.arange(10))
    with mock.patch("tierstore.backends.zarr_dir.replace_file", refuse), pytest.raises(OSError, match="No space left"):
        store.put("key", torch.zeros(99))
    assert names_in(root) == {"zarr.json", "key"}
    assert_identical(store.get("key"), torch.arange(10))


def test_a_failed_flush_of_the_new_name_leaves_a_whole_value(root: Path, store: ZarrBackend) -> None:
    store.put("key", torch.arange(10))
    fsync = os.fsync

    def refuse_root(fd: int) -> None:
        return refuse() if os.fstat(fd).st_ino == root.stat().st_ino else fsync(fd)

    with mock.patch("os.fsync", refuse_root), pytest.raises(OSError, match="No space left"):
        store.put("key", torch.zeros(99))
    assert_identical(store.get("key"), torch.zeros(99))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_keeps_the_older_value(root: Path, store: ZarrBackend, failing: int) -> None:
    rename, calls = Path.rename, []

    def fail_once(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    store.put("key", torch.arange(10))
    with mock.patch.object(Path, "rename", fail_once), pytest.raises(OSError, match="No space left"):
        store.put("key", torch.zeros(99))
    assert names_in(root) == {"zarr.json", "key"}
    assert_identical(store.get("key"), torch.arange(10))


def test_a_crash_between_the_renames_brings_the_older_value_back(root: Path, store: ZarrBackend) -> None:
    store.put("Key", torch.arange(10))
    node = store.node_of("Key")
    store.close()
    (root / ".tmp-0123456789abcdef").mkdir()
    node.rename(root / f".tmp-old-{node.name}")
    again = ZarrBackend(root)
    assert names_in(root) == {"zarr.json", node.name}
    assert_identical(again.get("Key"), torch.arange(10))
    again.close()


def test_a_crash_after_the_renames_keeps_the_newer_value(root: Path, store: ZarrBackend) -> None:
    store.put("key", torch.arange(10))
    with mock.patch("shutil.rmtree"):
        store.put("key", torch.ones(3))
        assert ".tmp-old-key" in names_in(root)
    store.put("key", torch.ones(4))  # the leftover is not in the way of the next one
    with mock.patch("shutil.rmtree"):
        store.put("key", torch.ones(5))
    store.close()
    again = ZarrBackend(root)
    assert names_in(root) == {"zarr.json", "key"}
    assert_identical(again.get("key"), torch.ones(5))
    again.close()


def test_a_killed_writer_leaves_a_whole_value(root: Path) -> None:
    command = [sys.executable, "-P", "-c", OVERWRITE, str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        done = [int(writer.stdout.readline()) for _ in range(10)][-1]
        writer.kill()
    store = ZarrBackend(root)
    found = store.get("key")
    assert found[0] >= done
    assert torch.equal(found, found[0].expand(100_000))
    assert names_in(root) == {"zarr.json", "key"}
    store.close()


# --- the directory --------------------------------------------------------------------------------------------------


def test_a_second_store_is_refused_until_the_first_closes(root: Path, store: ZarrBackend) -> None:
    with pytest.raises(BackendError, match=r"another store has .* open; close that one first"):
        ZarrBackend(root)
    store.close()
    ZarrBackend(root).close()


def test_a_forgotten_store_frees_its_directory(root: Path) -> None:
    with pytest.warns(ResourceWarning):
        ZarrBackend(root)
    ZarrBackend(root).close()


def test_after_close_every_operation_says_so(store: ZarrBackend) -> None:
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
            ZarrBackend(path)


def test_a_directory_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BackendError, match=r"belongs to something else .*thesis\.tex.*choose an empty or new directory"):
        ZarrBackend(tmp_path)
    assert names_in(tmp_path) == {"thesis.tex"}


def test_a_zarr_group_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    zarr.create_group(tmp_path, attributes={"of": "another"}).create_array("data", shape=(1,), dtype="int8")
    before = (tmp_path / "zarr.json").read_bytes()
    with pytest.raises(BackendError, match="belongs to something else"):
        ZarrBackend(tmp_path)
    assert (tmp_path / "zarr.json").read_bytes() == before
    assert names_in(tmp_path) == {"zarr.json", "data"}


def test_an_unknown_version_is_refused_and_the_lock_given_back(root: Path, store: ZarrBackend) -> None:
    store.close()
    good = (root / "zarr.json").read_text()
    newer = good.replace('"version": 2', '"version": 3')
    for text, message in ((newer, "has version 3"), ("[]", "something else"), ("{", "something else")):
        (root / "zarr.json").write_text(text)
        with pytest.raises(BackendError, match=message):
            ZarrBackend(root)
    (root / "zarr.json").write_text(good)
    ZarrBackend(root).close()


def test_an_empty_directory_and_the_rest_of_a_crashed_opening_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").touch()  # locked and not yet written
    ZarrBackend(tmp_path).close()
    assert isinstance(zarr.open(tmp_path, mode="r"), zarr.Group)


def test_a_directory_that_cannot_be_written_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"cannot open a store in /proc/tierstore.*choose a directory"):
        ZarrBackend("/proc/tierstore")
    root.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere, so permissions alone would not show it
    with pytest.raises(BackendError, match="is not writable"):
        ZarrBackend(root)


# --- damage ---------------------------------------------------------------------------------------------------------


def drop_chunk(node: Path) -> None:
    chunk_of(node).unlink()


def truncate_chunk(node: Path) -> None:
    os.truncate(chunk_of(node), chunk_of(node).stat().st_size - 1)


def extend_chunk(node: Path) -> None:
    os.truncate(chunk_of(node), chunk_of(node).stat().st_size + 4)


def drop_metadata(node: Path) -> None:
    (node / "zarr.json").unlink()


def cut_metadata(node: Path) -> None:
    os.truncate(node / "zarr.json", 100)


def change_attribute(node: Path) -> None:
    content = (node / "zarr.json").read_text()
    (node / "zarr.json").write_text(content.replace('"tierstore_dtype": "float32"', '"tierstore_dtype": "float64"'))


def change_shape(node: Path) -> None:
    content = json.loads((node / "zarr.json").read_text())
    content["shape"] = [5, 20]
    (node / "zarr.json").write_text(json.dumps(content))


def drop_attributes(node: Path) -> None:
    content = json.loads((node / "zarr.json").read_text())
    del content["attributes"]
    (node / "zarr.json").write_text(json.dumps(content))


METADATA_DAMAGE = [drop_metadata, cut_metadata, change_attribute, change_shape, drop_attributes]


@pytest.mark.parametrize("damage", [drop_chunk, truncate_chunk, extend_chunk, *METADATA_DAMAGE])
def test_damage_while_open_is_reported_with_key_and_place(store: ZarrBackend, damage: Callable[[Path], None]) -> None:
    store.put("key", torch.zeros(10, 10))
    store.put("other", torch.ones(10))
    damage(store.node_of("key"))
    with pytest.raises(CorruptionError) as caught:
        store.get("key")
    assert caught.value.key == "key"
    assert caught.value.file.startswith(str(store.node_of("key")))
    assert_identical(store.get("other"), torch.ones(10))
    store.delete("key")
    store.put("key", torch.zeros(10))
    assert_identical(store.get("key"), torch.zeros(10))


def test_a_value_removed_as_a_whole_is_reported_and_can_be_deleted(root: Path, store: ZarrBackend) -> None:
    store.put("key", torch.zeros(10))
    store.node_of("key").rename(root.parent / "elsewhere")
    with pytest.raises(CorruptionError, match="'key'"):
        store.get("key")
    store.delete("key")
    assert list(store.entries()) == []


@pytest.mark.parametrize("damage", METADATA_DAMAGE)
def test_damaged_metadata_is_found_at_opening(root: Path, store: ZarrBackend, damage: Callable[[Path], None]) -> None:
    store.put("key", torch.zeros(10, 10))
    store.close()
    damage(store.node_of("key"))
    with pytest.raises(CorruptionError) as caught:
        ZarrBackend(root)
    assert caught.value.file == str(store.node_of("key"))


def test_an_array_under_the_name_of_another_key_is_found(root: Path, store: ZarrBackend) -> None:
    store.put("a", torch.zeros(4))
    store.close()
    store.node_of("a").rename(store.node_of("b"))
    with pytest.raises(CorruptionError, match="named for another key") as caught:
        ZarrBackend(root)
    assert caught.value.key == "a"
