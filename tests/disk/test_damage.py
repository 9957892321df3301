"""Damage to a disk store: found, named, and never handed out."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tests.disk.conftest import MEMORY, Unflushed, files_in
from tests.samples import assert_identical
from tierstore.backends.disk import DiskBackend
from tierstore.errors import BackendError, CorruptionError
from tierstore.testing.values import bits, make_value

Damage = Callable[[Path], None]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def extend(file: Path) -> None:
    os.truncate(file, file.stat().st_size + 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def change_header(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content.replace(b"float32", b"float64", 1))


def zero_data(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(4096)
        stream.write(bytes(400))


@pytest.mark.parametrize("damage", [truncate, extend, empty, change_header, Path.unlink])
def test_damage_while_open_is_reported_with_key_and_file(store: DiskBackend, damage: Damage) -> None:
    store.put("layer.weight", torch.zeros(100))
    store.put("other", torch.ones(100))
    damage(store.file_of("layer.weight"))
    for look in (store.get, store.extent):
        with pytest.raises(CorruptionError, match=r"layer\.weight") as caught:
            look("layer.weight")
        assert caught.value.key == "layer.weight"
        assert caught.value.file == str(store.file_of("layer.weight"))
    assert_identical(store.get("other"), torch.ones(100))
    store.delete("layer.weight")
    store.put("layer.weight", torch.zeros(100))
    assert_identical(store.get("layer.weight"), torch.zeros(100))


@pytest.mark.parametrize("damage", [truncate, extend, empty, change_header, zero_data, Path.unlink])
def test_damage_while_closed_is_found_by_the_first_read(root: Path, store: DiskBackend, damage: Damage) -> None:
    store.put("layer.weight", torch.ones(100))
    store.put("other", torch.ones(100))
    store.close()
    file = store.file_of("layer.weight")
    damage(file)
    findings = DiskBackend.verify(root).findings
    assert [(finding.key, finding.file) for finding in findings] == [("layer.weight", str(file))]
    with closing(DiskBackend(root)) as again:  # all the others can still be had
        assert_identical(again.get("other"), torch.ones(100))
        with pytest.raises(CorruptionError) as caught:
            again.get("layer.weight")
        assert (caught.value.key, caught.value.file) == ("layer.weight", str(file))


def test_a_file_in_the_place_of_another_key_is_found(root: Path, store: DiskBackend) -> None:
    store.put("a", torch.zeros(4))
    store.put("b", torch.ones(4))
    store.file_of("b").write_bytes(store.file_of("a").read_bytes())
    with pytest.raises(CorruptionError, match="header has changed"):
        store.get("b")
    store.close()
    with closing(DiskBackend(root)) as again, pytest.raises(CorruptionError, match="header has changed"):
        again.get("b")


@pytest.mark.parametrize("name", ["FORMAT", "index.sqlite", "blobs"])
def test_a_part_that_is_missing_is_an_error_and_not_an_empty_store(root: Path, store: DiskBackend, name: str) -> None:
    store.put("key", torch.zeros(4))
    store.close()
    (root / name).rename(root.parent / name)
    with pytest.raises((BackendError, CorruptionError), match=r"belongs to something else|index is missing|file is missing"):
        DiskBackend(root).get("key")
    (root.parent / name).rename(root / name)
    with closing(DiskBackend(root)) as again:
        assert_identical(again.get("key"), torch.zeros(4))


def test_an_index_of_an_earlier_time_is_found(root: Path, tmp_path: Path, store: DiskBackend) -> None:
    """A file restored from a backup alone, or a log that lost its end: values would be missing, or old."""
    store.put("key", torch.zeros(4))
    store.close()
    shutil.copy(root / "index.sqlite", tmp_path / "old")
    with closing(DiskBackend(root)) as again:
        again.put("other", torch.zeros(4))
    shutil.copy(tmp_path / "old", root / "index.sqlite")
    with pytest.raises(CorruptionError, match=r"commits are missing; .python -m tierstore repair. makes the index anew"):
        DiskBackend(root)
    DiskBackend.repair(root)
    with closing(DiskBackend(root, verify="always")) as again:
        assert {key for key, _ in again.entries()} == {"key", "other"}


def blob(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


HOSTILE = [
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
    blob({"__metadata__": {"tierstore": "1", "key": "k", "dtype": "float32", "shape": "[1]", "stride": "[1]"}, "data": None}),
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files_are_damage_to_whoever_reads_them(root: Path, store: DiskBackend, content: bytes) -> None:
    store.put("k", torch.zeros(1))
    store.put("other", torch.ones(1))
    store.close()
    store.file_of("k").write_bytes(content)
    with closing(DiskBackend(root)) as again, pytest.raises(CorruptionError):
        again.get("k")
    (root / "index.sqlite").unlink()  # now the files' own headers are read
    inspection = DiskBackend.repair(root)
    assert inspection.values == 1
    assert any(str(store.file_of("k")) == finding.file for finding in inspection.findings)
    with closing(DiskBackend(root)) as again:
        assert [key for key, _ in again.entries()] == ["other"]


def test_hostile_files_in_a_store_of_version_1_are_refused(tmp_path: Path) -> None:
    name = "0123456789abcdef0123456789abcdef"
    for number, content in enumerate(HOSTILE):
        root = tmp_path / str(number)
        (root / "blobs" / name[:2]).mkdir(parents=True)
        (root / "FORMAT").write_text('{"format": "tierstore-disk", "version": 1}')
        (root / "blobs" / name[:2] / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(CorruptionError, match=name):
            DiskBackend(root)


# --- flipped bits ---------------------------------------------------------------------------------------------------


def outcome(root: Path, values: dict[str, torch.Tensor], file: Path) -> str:
    """Read all of a store in which a bit of `file` has flipped: was that "found" and named, or what happened?"""
    try:
        with closing(DiskBackend(root, system=Unflushed())) as store:
            keys = [key for key, _ in store.entries() if store.file_of(key) == file]
            try:
                found = {key: bits(store.get(key)) for key, _ in store.entries()}
            except CorruptionError as error:
                named = [error.key] == keys and error.file == str(file)
                return "found" if named else f"an error that names {error.key!r} and {error.file}"
            return "not noticed" if found == {key: bits(value) for key, value in values.items()} else "wrong values were handed out"
    except CorruptionError as error:
        return "found" if error.file == str(file) else f"an error that names {error.file}"
    except BackendError as error:
        return "found" if file.name == "FORMAT" and str(root) in str(error) else f"{error}"


@pytest.mark.parametrize("flips", [300, pytest.param(10_000, marks=pytest.mark.stress)])
def test_every_flipped_bit_is_found(flips: int) -> None:
    """Any bit of any file of a closed store, with `verify="first"`."""
    with TemporaryDirectory(dir=MEMORY) as folder:
        root, rng = Path(folder, "store"), random.Random(0)
        values = {f"key {number}": make_value(size=5000 * number + 1, seed=number) for number in range(6)}
        with closing(DiskBackend(root, system=Unflushed())) as store:
            for key, value in values.items():
                store.put(key, value)
        good = {name: (root / name).read_bytes() for name in sorted(files_in(root)) if name != "LOCK"}
        results: Counter[tuple[str, str]] = Counter()
        for number in range(flips):
            # all files alike, and all bytes alike, in turn
            name = rng.choices(list(good), [len(content) if number % 2 else 1 for content in good.values()])[0]
            damaged = bytearray(good[name])
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            (root / name).write_bytes(damaged)
            results[name.partition("/")[0], outcome(root, values, root / name)] += 1
            for part, content in good.items():
                if not part.startswith("blobs") or part == name:  # opening has written to the others
                    (root / part).write_bytes(content)
        print(dict(results))  # noqa: T201
        assert {result for _, result in results} == {"found"}, results


@pytest.mark.parametrize("flips", [60, pytest.param(2000, marks=pytest.mark.stress)])
def test_flipped_bits_in_the_index_of_a_killed_process_are_found_or_harmless(flips: int) -> None:
    """SQLite's log is still there, and bytes that nobody uses have no checksum; commits that go missing are noticed."""
    with TemporaryDirectory(dir=MEMORY) as folder:
        root, rng = Path(folder, "store"), random.Random(0)
        values = {f"key {number}": make_value(size=number + 1, seed=number) for number in range(6)}
        with closing(DiskBackend(Path(folder, "live"), system=Unflushed())) as store:
            for key, value in values.items():
                store.put(key, value)
            shutil.copytree(Path(folder, "live"), root)
        good = {name: (root / name).read_bytes() for name in ("index.sqlite", "index.sqlite-wal", "COMMITS", "FORMAT")}
        results: Counter[tuple[str, str]] = Counter()
        for number in range(flips):
            name = ("index.sqlite", "index.sqlite-wal")[number % 2]
            for part, content in good.items():
                (root / part).write_bytes(content)
            (root / "index.sqlite-shm").unlink(missing_ok=True)
            damaged = bytearray(good[name])
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            (root / name).write_bytes(damaged)
            results[name, outcome(root, values, root / "index.sqlite")] += 1
        print(dict(results))  # noqa: T201
        assert {result for _, result in results} == {"found", "not noticed"}, results
        assert results["index.sqlite-wal", "found"] > flips // 4
