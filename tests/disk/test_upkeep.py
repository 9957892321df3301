"""Verifying and repairing a disk store, from Python and from the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.disk.golden import DISK_1
from tests.samples import assert_identical
from tierstore.__main__ import main
from tierstore.backends.disk import DiskBackend
from tierstore.errors import BackendError
from tierstore.maintenance import repair, verify

VALUES = {f"key {number}": torch.arange(number * 1000) for number in range(5)}


@pytest.fixture
def filled(root: Path) -> Path:
    """The directory of a closed store with five values, one of them overwritten and a sixth deleted."""
    with closing(DiskBackend(root)) as store:
        store.put("key 3", torch.zeros(7))
        store.put("gone", torch.zeros(7))
        for key, value in VALUES.items():
            store.put(key, value)
        store.delete("gone")
    return root


def holds(root: Path, expected: dict[str, torch.Tensor]) -> None:
    with closing(DiskBackend(root, verify="always")) as store:
        assert dict(store.entries()).keys() == expected.keys()
        for key, value in expected.items():
            assert_identical(store.get(key), value)


def blob_of(root: Path, key: str) -> Path:
    with closing(DiskBackend.reader(root)) as reader:
        return Path(reader.extent(key).path)


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def test_a_sound_store_is_left_as_it_is(filled: Path) -> None:
    for act in (verify, repair, verify):
        inspection = act(filled)
        assert (inspection.sound, inspection.values, inspection.nbytes) == (True, 5, 80_000)
    holds(filled, VALUES)


def test_a_store_may_be_verified_while_it_is_written(root: Path, store: DiskBackend) -> None:
    store.put("key", torch.zeros(10))
    assert verify(root).values == 1
    store.put("key", torch.zeros(11))
    store.put("other", torch.zeros(1))
    assert (verify(root).values, verify(root).findings) == (2, ())
    with pytest.raises(BackendError, match="another store has"):
        repair(root)


def test_what_a_crash_left_in_the_middle_of_a_write_is_removed_and_not_kept_as_damage(filled: Path) -> None:
    torn = filled / "blobs" / "00" / f"{0:032x}.safetensors"
    torn.parent.mkdir(exist_ok=True)
    torn.write_bytes(bytes(9000))
    (finding,) = repair(filled).findings
    assert (finding.file, finding.problem) == (str(torn), "it belongs to no value; removed")
    assert not torn.exists()
    assert not (filled / "damaged").exists()
    assert verify(filled).sound
    holds(filled, VALUES)


def test_a_damaged_value_is_set_aside_and_the_others_stay(filled: Path) -> None:
    file = blob_of(filled, "key 2")
    flip(file, file.stat().st_size - 1)
    (finding,) = verify(filled).findings
    assert (finding.key, finding.file) == ("key 2", str(file))
    (finding,) = repair(filled).findings
    assert (finding.key, finding.file) == ("key 2", str(file))
    assert f"moved to damaged/{file.name}" in finding.problem
    assert (filled / "damaged" / file.name).exists()
    assert verify(filled).sound
    holds(filled, {key: value for key, value in VALUES.items() if key != "key 2"})


def test_a_missing_value_is_forgotten(filled: Path) -> None:
    file = blob_of(filled, "key 2")
    file.unlink()
    (finding,) = verify(filled).findings
    assert (finding.key, finding.file, finding.problem) == ("key 2", str(file), "the file is missing")
    (finding,) = repair(filled).findings
    assert finding.key == "key 2"
    assert verify(filled).sound


def test_blobs_without_a_value_are_told_and_removed(filled: Path) -> None:
    shutil.copytree(filled, filled.parent / "copy")
    file = blob_of(filled, "key 1")
    with closing(DiskBackend(filled)) as store:
        store.delete("key 1")
    shutil.copy(filled.parent / "copy" / file.relative_to(filled), file)
    (finding,) = verify(filled).findings
    assert (finding.key, finding.file) == ("?", str(file))
    (finding,) = repair(filled).findings
    assert (finding.key, finding.problem) == ("key 1", "it belongs to no value; removed")
    assert not file.exists()
    assert verify(filled).sound


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: flip(file, 20), lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["index.sqlite", "COMMITS", "FORMAT"])
def test_what_is_beside_the_values_is_made_anew(filled: Path, name: str, damage: Callable[[Path], object]) -> None:
    damage(filled / name)
    if name == "FORMAT":
        with pytest.raises(BackendError, match=r"belongs to something else|does not match its checksum"):
            verify(filled)
    else:
        assert any(Path(finding.file).name == name for finding in verify(filled).findings)
        assert verify(filled).values == 5
    inspection = repair(filled)
    assert inspection.values == 5
    assert all(Path(finding.file).name == name for finding in inspection.findings)
    holds(filled, VALUES)
    assert verify(filled).sound
    assert repair(filled).findings == ()


def test_the_newest_of_several_values_wins_when_the_index_is_made_anew(filled: Path) -> None:
    """Also one that was committed after blobs of earlier times were left behind."""
    old = blob_of(filled, "key 3")
    kept = old.read_bytes()
    with closing(DiskBackend(filled)) as store:
        store.put("key 3", torch.ones(5))
    old.write_bytes(kept)
    (filled / "index.sqlite").unlink()
    repair(filled)
    holds(filled, VALUES | {"key 3": torch.ones(5)})


def test_version_1_is_verified_as_it_is_and_taken_over_by_repair(root: Path) -> None:
    shutil.copytree(DISK_1, root)
    assert verify(root).sound
    assert verify(root).values == 8
    blob = max(root.glob("blobs/*/*.safetensors"), key=lambda file: file.stat().st_size)
    flip(blob, 20)
    assert [finding.file for finding in verify(root).findings] == [str(blob)]
    assert [finding.file for finding in repair(root).findings] == [str(blob)]
    assert (verify(root).sound, verify(root).values) == (True, 7)


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    for act in (verify, repair):
        with pytest.raises(BackendError, match="there is no store"):
            act(tmp_path)
        with pytest.raises(BackendError, match="No such file"):
            act(tmp_path / "nowhere")
        with pytest.raises(BackendError, match="cannot be looked through"):
            act(tmp_path, "zarr")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_says_what_it_found(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(filled)]) == 0
    assert capsys.readouterr().out == "5 sound values, 78.12 KiB; nothing wrong\n"
    file = blob_of(filled, "key 2")
    flip(file, file.stat().st_size - 1)
    assert main(["verify", str(filled)]) == 1
    assert f"'key 2' in {file}: bytes 0 to 16000 of the value do not match their checksum\n" in capsys.readouterr().out
    assert main(["repair", str(filled)]) == 1
    assert "4 sound values, 62.5 KiB; 1 findings" in capsys.readouterr().out
    assert main(["verify", str(filled)]) == 0
    assert main(["verify", str(filled / "nowhere")]) == 2
