"""How well a checkpoint fits a model, models on the meta device, and checkpoints that are elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

from tests.checkpoints import IDS, Small, equal, meta_model, plain_model, write_shards, write_single
from tierstore import CheckpointError, CorruptionError, ModelError, TierStoreError, on_meta, open_backend, tiered

# -- what does not fit ----------------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    state = plain_model().state_dict()
    del state["layers.1.weight"], state["layers.2.bias"]
    state["layers.3.weight"] = torch.zeros(64, 65)
    state["stranger"] = torch.zeros(1)
    folder = write_single(tmp_path / "c", state)
    model = meta_model()
    with pytest.raises(CheckpointError) as caught:
        tiered(model, checkpoint=folder)
    error = caught.value
    assert error.missing == ("layers.1.weight", "layers.2.bias")
    assert error.mismatched == ("layers.3.weight",)
    assert error.unexpected == ("stranger",)
    for text in (str(folder), "Small", "layers.1.weight", "layers.3.weight: (64, 65) in the checkpoint, (64, 64) in the model", "stranger"):
        assert text in str(error)
    assert all(parameter.device.type == "meta" for parameter in model.parameters()), "nothing has changed"


def test_what_nothing_needs_is_warned_of(tmp_path: Path) -> None:
    plain = plain_model()
    folder = write_single(tmp_path / "c", {**plain.state_dict(), "stranger": torch.zeros(1)})
    model = meta_model()
    with pytest.warns(UserWarning, match="not in the model .1.: stranger"):
        tiered(model, checkpoint=folder).close()
    assert equal(model, plain)


def test_a_tied_weight_under_its_other_name(tmp_path: Path) -> None:
    plain = plain_model()
    state = plain.state_dict()
    del state["embed.weight"]
    model = meta_model()
    with tiered(model, checkpoint=write_single(tmp_path / "c", state), cpu="40KB"), torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))
    assert model.head.weight is model.embed.weight


def test_buffers_on_meta_that_no_checkpoint_has(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Small()
    with pytest.raises(CheckpointError, match=r"scale.*on_meta\(\)"):
        tiered(model, checkpoint=write_single(tmp_path / "c", plain_model().state_dict()))


def test_a_real_model_takes_its_values_from_the_checkpoint(tmp_path: Path) -> None:
    plain, model = plain_model(0), plain_model(1)
    folder = write_single(tmp_path / "c", plain.state_dict())
    with tiered(model, checkpoint=folder, cpu="40KB"), torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))
    assert equal(model, plain)


def test_refusals(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "c", plain_model().state_dict())
    with pytest.raises(ModelError, match="one model"):
        tiered([meta_model(), meta_model()], checkpoint=folder)
    with pytest.raises(ModelError, match="give checkpoint=DIR"):
        tiered(meta_model())
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        tiered(meta_model(), checkpoint=tmp_path / "nowhere")
    model = meta_model()
    with tiered(model, checkpoint=folder), pytest.raises(ModelError, match="already under"):
        tiered(model, checkpoint=folder)


def test_a_file_that_changes_while_it_runs(tmp_path: Path) -> None:
    plain = plain_model()
    folder = write_single(tmp_path / "c", plain.state_dict())
    model = meta_model()
    session = tiered(model, checkpoint=folder, cpu="40KB", policy="lru")
    with torch.no_grad():
        model(IDS)
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(2000)
            file.write(bytes(100))
        with pytest.raises(CorruptionError, match=r"'.*weight'.*changed since.*model\.safetensors"):
            model(IDS)
    with pytest.raises(TierStoreError, match="could not be brought back"):
        session.close()
    os.utime(folder / "model.safetensors", ns=(0, 0))
    with pytest.raises(TierStoreError):
        session.close()
    session.store.close(flush=False)


def test_on_meta_leaves_buffers_ties_and_other_threads_alone() -> None:
    model = meta_model()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {b.device.type for b in model.buffers()} == {"cpu"}
    assert model.head.weight is model.embed.weight
    assert nn.Linear(1, 1).weight.device.type == "cpu"
    lazy = None
    with on_meta():
        lazy = nn.LazyLinear(3)
        frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        holder = nn.Module()
        holder.frozen = frozen
    assert torch.nn.parameter.is_lazy(lazy.weight)
    assert not holder.frozen.requires_grad
    assert holder.frozen.device.type == "meta"


# -- elsewhere ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote() -> Any:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_a_remote_directory_is_fetched_once(remote: Any, tmp_path: Path, scratch: Path) -> None:
    plain = plain_model()
    folder = write_shards(tmp_path / "c", {k: v for k, v in plain.state_dict().items() if k != "head.weight"})
    remote.put(str(folder), "/models/small", recursive=True)
    place = tmp_path / "cache"
    seen = []
    for _ in range(2):
        model = meta_model()
        with tiered(model, checkpoint="memory://models/small", cpu="40KB", disk=place), torch.no_grad():
            assert torch.equal(model(IDS), plain(IDS))
        seen.append({path: path.stat().st_mtime_ns for path in place.rglob("*.safetensors")})
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3


def test_a_remote_checkpoint_that_is_another_now(remote: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        plain = plain_model(seed)
        file = write_single(tmp_path / str(seed), plain.state_dict()) / "model.safetensors"
        remote.put_file(str(file), "/models/one/model.safetensors")
        model = meta_model()
        with tiered(model, checkpoint="memory://models/one", disk=tmp_path / "cache"):
            pass
        assert equal(model, plain)


def test_a_remote_directory_needs_a_place(remote: Any, tmp_path: Path) -> None:
    for disk in (None, open_backend("device", "cpu")):
        with pytest.raises(CheckpointError, match="give disk=PATH"):
            tiered(meta_model(), checkpoint="memory://models/small", disk=disk)
    remote.mkdir("/empty")
    with pytest.raises(CheckpointError, match="no files at"):
        tiered(meta_model(), checkpoint="memory://empty", disk=tmp_path)
