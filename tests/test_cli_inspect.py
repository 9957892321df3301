"""`tierstore inspect`: checkpoints, single files and disk stores, without changing them."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import contents, entry, plain_model, write_raw, write_shards, write_single
from tests.disk.golden import DISK_1
from tierstore.__main__ import main
from tierstore.backends.disk import DiskBackend
from tierstore.errors import BackendError
from tierstore.maintenance import describe
from tierstore.registry import GROUP

SQLITE = ("index.sqlite-shm", "index.sqlite-wal")  # which SQLite makes to read, and clears away when it writes next
STATE = {"a": torch.zeros(3, 4), "b.weight": torch.zeros(50, dtype=torch.bfloat16), "c": torch.tensor(1), "empty": torch.zeros(0)}


def inspect(capsys: pytest.CaptureFixture[str], place: Path, *more: str) -> dict[str, Any]:
    assert main(["inspect", str(place), "--json", *more]) == 0
    out, errors = capsys.readouterr()
    assert errors == ""
    found: dict[str, Any] = json.loads(out)
    return found


def refused(capsys: pytest.CaptureFixture[str], place: Path) -> str:
    assert main(["inspect", str(place)]) == 2
    out, errors = capsys.readouterr()
    assert (out, errors.count("\n")) == ("", 1)
    return errors


def test_a_checkpoint_of_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = write_single(tmp_path / "c", STATE)
    before = contents(place)
    for path in (place, place / "model.safetensors"):
        found = inspect(capsys, path, "--keys")
        assert (found["kind"], found["tensors"], found["bytes"]) == ("checkpoint", 4, 48 + 100 + 8)
        assert found["dtypes"] == {
            "bfloat16": {"tensors": 1, "bytes": 100},
            "float32": {"tensors": 2, "bytes": 48},
            "int64": {"tensors": 1, "bytes": 8},
        }
        assert [row["key"] for row in found["keys"]] == sorted(STATE)
        assert found["keys"][0] == {"key": "a", "dtype": "float32", "shape": [3, 4], "bytes": 48, "file": "model.safetensors"}
        assert found["file_bytes"] == {"model.safetensors": (place / "model.safetensors").stat().st_size}
    assert contents(place) == before


def test_shards_and_files_of_torch_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: tensor for name, tensor in plain_model().state_dict().items() if name != "head.weight"}  # tied
    total = sum(tensor.nbytes for tensor in state.values())
    shards = write_shards(tmp_path / "shards", state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    for place, files in ((shards, 3), (shards / "model.safetensors.index.json", 3), (tmp_path / "pytorch_model.bin", 1)):
        found = inspect(capsys, place)
        assert (found["tensors"], found["bytes"], found["files"]["count"]) == (len(state), total, files)
        assert found["largest"][0]["bytes"] == max(tensor.nbytes for tensor in state.values())
        assert len(found["largest"]) == 10


def test_a_disk_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also while somebody has it open, which is told; reading it changes nothing."""
    place = tmp_path / "store"
    with closing(DiskBackend(place)) as store:
        for key, tensor in STATE.items():
            store.put(key, tensor)
        store.put("a", torch.zeros(5, 4))
        store.put("\ud800", torch.zeros(1))
        found = inspect(capsys, place, "--keys")
        assert found["facts"]["open for writing"] is True
    assert (found["kind"], found["tensors"], found["bytes"]) == ("disk store", 5, 80 + 100 + 8 + 4)
    assert "\ud800" in [row["key"] for row in found["keys"]]
    assert (found["facts"]["format"], len(found["facts"]["store"])) == (2, 32)
    before = contents(place)
    closed = inspect(capsys, place)["facts"]
    assert {name: data for name, data in contents(place).items() if name not in SQLITE} == before
    assert closed["open for writing"] is False
    assert closed["generation"] >= found["facts"]["generation"] >= 6
    with closing(DiskBackend(place)) as store:  # the lock was given back
        store.put("b", torch.zeros(1))
    assert inspect(capsys, place)["facts"]["commits"] > closed["commits"]


def test_a_store_of_an_older_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(DISK_1)
    found = inspect(capsys, DISK_1)
    assert (found["kind"], found["facts"]["format"]) == ("disk store", 1)
    assert found["tensors"] > 0
    assert contents(DISK_1) == before


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = {f"layers.{i}.[w]": torch.zeros(i + 1) for i in range(12)}
    place = write_single(tmp_path / "c", many)
    assert main(["inspect", str(place)]) == 0
    out = capsys.readouterr().out
    assert "12 tensors, 312 B, in 1 files" in out
    assert "layers.11.[w]" in out
    assert "layers.0.[w]" not in out
    assert main(["inspect", str(place), "--keys"]) == 0
    assert "layers.0.[w]" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["tables", "json"])
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, more: list[str]) -> None:
    place = write_single(tmp_path / "c", STATE)
    command = [sys.executable, "-m", "tierstore", "inspect", str(place), "--keys", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ("", 0)


def test_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"there is nothing at {tmp_path / 'no'}" in refused(capsys, tmp_path / "no")
    (tmp_path / "notes.txt").write_text("hello")
    assert "it has ['notes.txt']" in refused(capsys, tmp_path)
    assert "its name ends like none of theirs" in refused(capsys, tmp_path / "notes.txt")
    file = write_raw(tmp_path / "model.safetensors", {"a": entry(0, 8)}, bytes(8), length=10_000)
    assert f"{file} is damaged" in refused(capsys, tmp_path)
    write_raw(file, {"a": entry(0, 8, dtype="F3")}, bytes(8))
    assert "'F3'" in refused(capsys, file)
    shards = write_shards(tmp_path / "shards", STATE)
    (shards / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refused(capsys, shards)


def test_a_store_that_belongs_to_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "FORMAT").write_text("another")
    assert "belongs to something else" in refused(capsys, tmp_path)


def test_a_damaged_index_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(DiskBackend(tmp_path / "store")) as store:
        store.put("a", torch.zeros(3))
    (tmp_path / "store" / "index.sqlite").write_bytes(b"rubbish" * 1000)
    assert "is damaged" in refused(capsys, tmp_path / "store")


def test_a_backend_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    assert len(describe(tmp_path).tensors) == 4
    honest = __import__("tierstore.maintenance", fromlist=["x"]).backend_class

    def lacking(name: str) -> Any:
        if name == "checkpoint":
            raise ImportError("no module for it")
        return honest(name)

    monkeypatch.setattr("tierstore.maintenance.backend_class", lacking)
    with pytest.raises(BackendError, match="checkpoint cannot be imported, and `tierstore doctor` says why"):
        describe(tmp_path)
    assert GROUP == "tierstore.backends"
