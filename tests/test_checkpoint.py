"""`tiered(model_on_meta, checkpoint=...)`: a checkpoint is the home of a model's weights, in place."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.checkpoints import IDS, Wide, contents, equal, meta_model, nbytes, plain_model, within_budget, write_shards, write_single
from tierstore import TierStoreError, on_meta, tiered
from tierstore.backends._spans import UNIT
from tierstore.backends.ram import RamBackend
from tierstore.patch.stored import DividedSource
from tierstore.patch.wrapper import Wrapper

# -- in place -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_single, write_shards])
@pytest.mark.parametrize("tiers", [{}, {"cpu": "40KB"}, {"gpu": "40KB", "cpu": "20KB"}, {"gpu": "40KB"}])
def test_a_checkpoint_in_place(write: Callable[..., Path], tiers: dict[str, str], tmp_path: Path) -> None:
    plain = plain_model()
    state = {name: tensor for name, tensor in plain.state_dict().items() if name != "head.weight"}
    folder = write(tmp_path / "c", state)
    before = contents(folder)
    model = meta_model()
    objects = dict(model.named_parameters())
    with tiered(model, checkpoint=folder, device="cpu", **tiers) as session, torch.no_grad():  # type: ignore[arg-type]
        for _ in range(3):
            assert torch.equal(model(IDS), plain(IDS))
        assert within_budget(session)
        assert contents(folder) == before
    assert contents(folder) == before
    assert dict(model.named_parameters()) == objects
    assert model.head.weight is model.embed.weight
    assert equal(model, plain)
    assert all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))
        model.embed.weight.add_(1)  # private
    assert contents(folder) == before


def test_nothing_is_written_by_reading(tmp_path: Path) -> None:
    """Not one byte of files: counted by the system for this process, and no file appears."""
    plain = plain_model(width=512)
    folder = write_single(tmp_path / "c", plain.state_dict())
    model = meta_model(width=512)
    gc.collect()
    written = _bytes_written()
    with tiered(model, checkpoint=folder, cpu="3MB") as session, torch.no_grad():
        for _ in range(4):
            assert torch.equal(model(IDS), plain(IDS))
        assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
        assert session.stats().links["disk->cpu"].bytes > 0
        assert "cpu->disk" not in session.stats().links or session.stats().links["cpu->disk"].bytes == 0
    assert _bytes_written() == written
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def _bytes_written() -> int:
    """Bytes that this process has handed to the system to write to files."""
    told = re.search(r"^write_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)
    assert told is not None
    return int(told[1])


def test_training_writes_beside_the_checkpoint(tmp_path: Path) -> None:
    plain = plain_model()
    folder = write_single(tmp_path / "c", plain.state_dict())
    before = contents(folder)
    model = meta_model()
    with tiered(model, checkpoint=folder, cpu="40KB") as session:
        for m in (plain, model):
            m.train()
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                m(IDS).square().sum().backward()
                optimizer.step()
        assert within_budget(session)
        assert before.items() <= contents(folder).items()
    assert contents(folder) == before
    assert equal(model, plain)


def test_a_scratch_directory_of_ones_own_and_a_limit_on_it(tmp_path: Path, scratch: Path) -> None:
    plain = plain_model()
    folder = write_single(tmp_path / "c", plain.state_dict())
    before, times = contents(folder), folder.stat().st_mtime_ns
    model = meta_model()
    with tiered(model, checkpoint=folder, cpu="40KB", disk=(scratch, "1MB")), torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        assert any(str(scratch) in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)
    assert equal(model, plain)
    assert (contents(folder), folder.stat().st_mtime_ns) == (before, times)


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_files_of_torch_save(suffix: str, tmp_path: Path) -> None:
    plain = plain_model()
    torch.save(plain.state_dict(), tmp_path / f"pytorch_model{suffix}")
    model = meta_model()
    with tiered(model, checkpoint=tmp_path, cpu="40KB"), torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))
    assert equal(model, plain)


# -- casts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cpu", [None, "20KB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_on_the_way_up(dtype: torch.dtype, cpu: str | None, tmp_path: Path) -> None:
    plain = plain_model()
    folder = write_single(tmp_path / "c", plain.state_dict())
    before = contents(folder)
    model = meta_model()
    expected = plain.to(dtype)
    with tiered(model, checkpoint=folder, cpu="80KB" if cpu and dtype == torch.float64 else cpu, dtype=dtype), torch.no_grad():
        model.scale = model.scale.to(dtype)  # type: ignore[operator]  # it is in no checkpoint
        assert torch.equal(model(IDS), expected(IDS))
        assert model.norm.num_batches_tracked.item() == 7  # type: ignore[union-attr, operator]
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert equal(model, expected)
    assert contents(folder) == before


def test_dtype_alone_is_refused() -> None:
    with pytest.raises(TierStoreError, match="checkpoint="):
        tiered(plain_model(), dtype=torch.bfloat16)


# -- in pieces ------------------------------------------------------------------------------------------------------------


def sources(model: nn.Module) -> list[DividedSource]:
    found = [tensor._source for tensor in model.parameters() if isinstance(tensor, Wrapper)]
    return [source for source in found if isinstance(source, DividedSource)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("pad", "share", "units"), [(1, 0.5, 1), (4096, 0.8, 1), (1, 0.8, 2)])
@pytest.mark.parametrize("middle", [None, "4MiB"])
def test_values_in_pieces(
    dtype: torch.dtype | None, pad: int, share: float, units: int, middle: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RamBackend, "piece_bytes", UNIT)
    torch.manual_seed(0)
    plain = Wide()
    # `pad` shifts everything after it in the file
    file = tmp_path / "c" / "model.safetensors"
    file.parent.mkdir()
    save_file({"a_pad": torch.zeros(pad, dtype=torch.uint8), **plain.state_dict()}, file)
    before = contents(file.parent)
    plain = plain.to(dtype or torch.float32)
    with on_meta():
        model = Wide()
    budget = int(nbytes(plain) * share)
    monkeypatch.setattr("tierstore.pieces._SHARE", budget // (units * UNIT))
    tiers: dict[str, Any] = {"cpu": budget} if middle is None else {"gpu": budget, "cpu": middle}
    with pytest.warns(UserWarning, match="a_pad"):
        session = tiered(model, checkpoint=file, device="cpu", dtype=dtype, **tiers)
    with session, torch.no_grad():
        assert len(sources(model)) == 4
        assert [len(source.stored) for source in sources(model)] == [-(-source.spec.nbytes // (units * UNIT)) for source in sources(model)]
        for _ in range(3):
            assert torch.equal(model(IDS), plain(IDS))
        saved = {name: torch.as_tensor(value).clone() for name, value in model.state_dict().items()}
        for m in (plain, model):
            m.layers[2].weight[100:200].mul_(3)
            m.embed.weight[7] = 1
        for _ in range(2):
            assert torch.equal(model(IDS), plain(IDS))
        assert within_budget(session)
        held = session.store.tiers[0].backend
        assert isinstance(held, RamBackend)
        assert held._arena.held_bytes + held._spans.held <= budget + 8 * UNIT
    assert contents(file.parent) == before
    assert saved.keys() == plain.state_dict().keys()
    assert equal(model, plain)


def test_whole_values_where_all_fits(tmp_path: Path) -> None:
    plain = Wide()
    folder = write_single(tmp_path / "c", plain.state_dict())
    with on_meta():
        model = Wide()
    with tiered(model, checkpoint=folder, cpu="100MiB"), torch.no_grad():
        assert not sources(model)
        assert torch.equal(model(IDS), plain(IDS))


def test_rows_are_read_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Wide()
    folder = write_single(tmp_path / "c", plain.state_dict())
    for dtype, few in ((None, True), (torch.bfloat16, False)):
        with on_meta():
            model = Wide()
        expected = plain.embed.weight.to(dtype or torch.float32)[IDS]
        with tiered(model, checkpoint=folder, cpu="20MiB", dtype=dtype) as session, torch.no_grad():
            before = session.stats().links["disk->cpu"].bytes
            assert torch.equal(model.embed(IDS), expected)
            assert (session.stats().links["disk->cpu"].bytes - before == 6 * 1024) == few, "a cast value is fetched as a whole"
