"""Every way in which a checkpoint can be wrong, or become wrong while it is used: an error that names file and key."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import entry, write_raw, write_shards
from tierstore import CheckpointError, CorruptionError, TieredStore, open_backend
from tierstore.backend import SourceBackend
from tierstore.spec import TensorSpec, raw_bytes
from tierstore.tier import Tier

STATE = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5, dtype=torch.int16), "c": torch.zeros(0, 3)}


def opened(path: Path, **options: Any) -> SourceBackend:
    backend = open_backend("checkpoint", path, **options)
    assert isinstance(backend, SourceBackend)
    return backend


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return TensorSpec.of(a) == TensorSpec.of(b) and torch.equal(raw_bytes(a), raw_bytes(b))


# -- lying safetensors headers --------------------------------------------------------------------------------------------

F32 = entry(0, 16)
LIES: dict[str, tuple[object, int, str]] = {
    "no json": (b"{nonsense", 16, "not JSON"),
    "no object": (b"[1, 2]", 16, "not a JSON object"),
    "nested too deep": (b'{"a":' + b"[" * 100_000, 0, "not JSON"),
    "a name twice": (b'{"a": {}, "a": {}}', 16, "'a' is there twice"),
    "metadata that are numbers": ({"__metadata__": {"x": 3}, "a": F32}, 16, "metadata"),
    "no entry": ({"a": 3}, 16, "'a'.*other fields"),
    "a field too few": ({"a": {"dtype": "F32", "shape": [4]}}, 16, "'a'.*other fields"),
    "a field too many": ({"a": {**F32, "stride": [2]}}, 16, "'a'.*other fields"),
    "negative size": ({"a": entry(0, 16, shape=[-4])}, 16, "'a'.*not sizes"),
    "size that is a bool": ({"a": entry(0, 4, shape=[True])}, 16, "'a'.*not sizes"),
    "size that is a float": ({"a": {**F32, "shape": [4.0]}}, 16, "'a'.*not sizes"),
    "size that overflows": ({"a": entry(0, 16, shape=[1 << 62, 1 << 62])}, 16, "'a'.*takes"),
    "thousands of sizes": ({"a": entry(0, 16, shape=[1 << 62] * 20_000)}, 16, "'a'.*20000 sizes"),
    "thousands of names, one twice": (
        b"{" + b",".join(b'"%d":1' % name for name in [*range(50_000), 49_999]) + b"}",
        16,
        "'49999' is there",
    ),
    "size beyond 64 bits": ({"a": entry(0, 16, shape=[1 << 70])}, 16, "'a'.*not sizes"),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 8, 16]}}, 16, "'a'.*not sizes"),
    "end before begin": ({"a": entry(16, 0, shape=[4])}, 16, "'a'.*not inside"),
    "beyond the end": ({"a": entry(8, 24)}, 16, "'a'.*not inside the 16 bytes"),
    "truncated data": ({"a": F32}, 15, "'a'.*not inside the 15 bytes"),
    "too few bytes": ({"a": entry(0, 16, shape=[5])}, 16, "'a'.*takes 20 bytes, not 16"),
    "overlap": ({"a": F32, "b": entry(12, 28)}, 28, "'b'.*overlap those of 'a'"),
    "inside another": ({"a": entry(0, 64), "b": entry(16, 32)}, 64, "'b'.*overlap those of 'a'"),
    "half a byte": ({"a": entry(0, 3, "F4", [2, 3])}, 3, "'a'.*last byte"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lying_header(name: str, tmp_path: Path) -> None:
    header, room, reason = LIES[name]
    file = write_raw(tmp_path / "model.safetensors", header, bytes(room))
    with pytest.raises(CorruptionError, match=reason) as caught:
        opened(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("size", range(0, 90, 3))
def test_a_truncated_file(size: int, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    file = tmp_path / "cut.safetensors"
    file.write_bytes(whole[: min(size, len(whole) - 1)])
    with pytest.raises(CorruptionError, match=r"cut\.safetensors"):
        opened(file)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 100_000_001])
def test_a_header_that_claims_to_be_huge(length: int, tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", {"a": F32}, bytes(16), length=length)
    with pytest.raises(CorruptionError, match="claims a header"):
        opened(tmp_path)


def test_a_dtype_that_torch_lacks(tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", {"a": entry(0, 16, "F6_E2M3", [4])}, bytes(16))
    with pytest.raises(CheckpointError, match=r"'a' in .*x\.safetensors has dtype 'F6_E2M3', which this torch lacks"):
        opened(tmp_path)
    write_raw(tmp_path / "x.safetensors", {"a": {**F32, "dtype": ["F32"]}}, bytes(16))
    with pytest.raises(CheckpointError, match="'a'"):
        opened(tmp_path)


# -- directories and indices ----------------------------------------------------------------------------------------------


def test_a_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, STATE)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 3 shards.*model-00002-of-00003"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "\ud800.safetensors"])
def test_a_shard_whose_name_no_file_can_have(name: str, tmp_path: Path) -> None:
    write_shards(tmp_path, STATE)
    index = tmp_path / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["a"] = name
    index.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"lacks 1 of \d shards"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b.safetensors", "x\0.safetensors"]
)
def test_an_index_that_names_files_elsewhere(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json names .* refusing to open"):
        opened(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptionError, match=r"index\.json"):
        opened(tmp_path)


def test_an_index_that_lies(tmp_path: Path) -> None:
    write_shards(tmp_path, STATE)
    index = tmp_path / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["a"] = told["weight_map"]["b"]
    index.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"'a' is in .*, but it is not there"):
        opened(tmp_path)


def test_two_files_with_one_name_inside(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in one\.safetensors and in two\.safetensors"):
        opened(tmp_path)


def test_several_indices(tmp_path: Path) -> None:
    write_shards(tmp_path, STATE, prefix="one")
    write_shards(tmp_path, STATE, prefix="two")
    with pytest.raises(CheckpointError, match="several checkpoints"):
        opened(tmp_path)
    opened(tmp_path / "two.safetensors.index.json").close()


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors.*readme\.txt"):
        opened(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        opened(tmp_path / "nowhere")


# -- pickles --------------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_a_pickle_that_needs_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2), "b": Bomb(tmp_path / "executed")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds more than tensors, and code from it would have to be run"):
        opened(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_pickles_that_are_no_state_dicts(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save([torch.zeros(2)], file)
    with pytest.raises(CheckpointError, match=r"x\.pt holds a list"):
        opened(file)
    torch.save({"model": {"a": torch.zeros(2)}, "epoch": 3}, file)
    with pytest.raises(CheckpointError, match="names no tensors, only 'model', 'epoch'"):
        opened(file)
    torch.save({"a": torch.zeros(2).to_sparse()}, file)
    with pytest.raises(CheckpointError, match=r"'a' in .* has layout"):
        opened(file)
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="old format"):
        opened(file)


def test_a_damaged_pickle(tmp_path: Path) -> None:
    file = tmp_path / "x.bin"
    torch.save({"a": torch.arange(1000.0)}, file)
    with zipfile.ZipFile(file) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content[:100] if name.endswith("data/0") else content)
    with pytest.raises(CorruptionError, match=r"x\.bin"):
        opened(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    with pytest.raises(CorruptionError, match=r"x\.bin"):
        opened(file)


# -- files that change while they are used --------------------------------------------------------------------------------


def replaced(file: Path) -> None:
    file.rename(file.with_suffix(".old"))
    save_file({"big": torch.zeros(512, 1024)}, file)


def overwritten(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(5000)
        stream.write(bytes(100))


def truncated(file: Path) -> None:
    os.truncate(file, 5000)


@pytest.mark.parametrize("change", [replaced, overwritten, truncated, Path.unlink])
@pytest.mark.parametrize("used", [False, True])
def test_a_file_that_changes(change: Any, used: bool, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"big": torch.randn(512, 1024), "small": torch.zeros(3)}, file)
    backend = opened(tmp_path)
    with TieredStore([Tier("cpu", open_backend("ram"), "3MiB"), Tier("disk", backend)]) as store:
        if used:
            store.get("small")
            backend.fill("big", torch.empty(512, 1024))
        change(file)
        for ask in (backend.get, backend.extent, store.get):
            with pytest.raises(CorruptionError, match=r"'big'.*(changed|missing).*model\.safetensors"):
                ask("big")
        if change in (replaced, Path.unlink) and used:
            backend.fill("big", torch.empty(512, 1024))  # the file that was opened is as it was
        else:
            with pytest.raises(CorruptionError, match=r"'big'.*model\.safetensors"):
                backend.fill("big", torch.empty(512, 1024))


def test_a_file_that_changes_during_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"big": torch.randn(512, 1024)}, file)
    backend = opened(tmp_path)
    extent = backend.extent("big")
    assert extent is not None
    assert extent.file is not None
    memory = bytearray(4096)
    extent.file.read(memoryview(memory), extent.offset)
    overwritten(file)
    for read in (extent.file.read, extent.file.read_cached):
        with pytest.raises(CorruptionError, match="changed since"):
            read(memoryview(memory), extent.offset)
    backend.close()
