"""The disk backend: round trips, extents, and the format of a file."""

from __future__ import annotations

import gc
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.disk.conftest import EMPTY, MEMORY, Unflushed, files_in, open_descriptors
from tests.samples import all_samples, assert_identical, layout_samples
from tierstore.backends._disk.blob import encode_head, encoded_size
from tierstore.backends.disk import DiskBackend
from tierstore.checksum import sums_size
from tierstore.errors import ClosedError, CorruptionError
from tierstore.spec import TensorSpec, raw_bytes, typed_view

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates and NUL too
ODD_KEYS = ("", ".", "..", "../../evil", "/etc/evil", "a/b", "\0", "\ud800", "\ud83d\ude00", "\U0001f600", "K", "k", "x" * 5000)


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
    store.get("key")  # from then on the file is open
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
    backend = DiskBackend(tmp_path / "store", system=Unflushed())
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
        assert (metadata["tierstore"], metadata["key"]) == ("2", name)
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
@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    """Return specs of few bytes whose sizes and strides have many digits, or few."""
    sizes = st.one_of(st.integers(0, 9), st.integers(0, (1 << 63) - 1))
    dims = draw(st.lists(st.one_of(sizes.map(lambda size: (size, 0)), sizes.map(lambda step: (1, step))), max_size=64))
    return TensorSpec(draw(st.sampled_from([torch.uint8, torch.float8_e4m3fnuz])), tuple(n for n, _ in dims), tuple(n for _, n in dims))


@given(ANY_TEXT, st.integers(1, 700), specs(), st.integers(0, (1 << 63) - 1))
@example("\0", 444, TensorSpec(torch.uint8, (), ()), 0)  # the longest for which no header is made
@example("\0", 635, TensorSpec(torch.uint8, (), ()), 0)  # takes two pages
@example("\ud800\U0001f600\U0001f600", 185, TensorSpec(torch.uint8, (), ()), 0)  # is written in hexadecimal digits, and takes two
@example("", 1, TensorSpec(torch.float8_e4m3fnuz, (1,) * 54, ((1 << 63) - 1,) * 54), (1 << 63) - 1)
def test_how_long_a_header_is_can_be_told_before_it_is_made(text: str, times: int, spec: TensorSpec, generation: int) -> None:
    key, store = text * times, "0" * 32
    sums = bytes(sums_size(spec.nbytes))
    assert encoded_size(key, spec, generation, store) == len(encode_head(key, spec, sums, generation, store))


@given(st.lists(ANY_TEXT, unique=True, max_size=4))
@example(list(ODD_KEYS))
def test_any_text_is_a_key(keys: list[str]) -> None:
    with TemporaryDirectory(dir=MEMORY) as folder:
        backend = DiskBackend(Path(folder, "store"), system=Unflushed())
        for number, key in enumerate(keys):
            backend.put(key, torch.tensor(number))
        backend.close()
        assert {path.name for path in Path(folder).iterdir()} == {"store"}
        again = DiskBackend(Path(folder, "store"), system=Unflushed())
        assert {key for key, _ in again.entries()} == set(keys)
        assert [again.get(key).item() for key in keys] == list(range(len(keys)))
        again.close()


def test_every_file_opens_in_safetensors_whatever_the_key(store: DiskBackend) -> None:
    for key in ODD_KEYS:
        store.put(key, torch.arange(3))
        with safe_open(store.file_of(key), "pt") as file:
            assert_identical(file.get_tensor("data"), torch.arange(3))
