"""Saving inside the `with`: what is written equals what the plain model would write, and memory stays within the budgets."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from tests.checkpoints import IDS, Small, Wide, equal, nbytes, plain_model, within_budget, write_single
from tests.plainly import anonymous_bytes
from tierstore import Tiered, on_meta, tiered
from tierstore.backends._spans import UNIT
from tierstore.backends.ram import RamBackend
from tierstore.spec import raw_bytes


@contextmanager
def all_fits(model: nn.Module, folder: Path) -> Iterator[tuple[nn.Module, Tiered]]:
    with tiered(model, cpu="1GiB") as session:
        yield model, session


@contextmanager
def from_disk(model: nn.Module, folder: Path) -> Iterator[tuple[nn.Module, Tiered]]:
    with tiered(model, cpu=int(nbytes(model) * 0.5), disk=folder) as session:
        yield model, session


@contextmanager
def in_memory(model: nn.Module, folder: Path) -> Iterator[tuple[nn.Module, Tiered]]:
    """Two tiers of RAM, and no file anywhere."""
    with tiered(model, gpu=int(nbytes(model) * 0.6), cpu="1GiB", device="cpu") as session:
        yield model, session


@contextmanager
def over_checkpoint(model: nn.Module, folder: Path) -> Iterator[tuple[nn.Module, Tiered]]:
    budget = int(nbytes(model) * 0.5)
    with on_meta():
        empty = type(model)().eval()
    with tiered(empty, checkpoint=write_single(folder / "c", model.state_dict()), cpu=budget) as session:
        yield empty, session


SESSIONS = [all_fits, from_disk, in_memory, over_checkpoint]
Session = Callable[[nn.Module, Path], Any]


def pickled(state: Any) -> dict[str, torch.Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return loaded


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(raw_bytes(a[k]), raw_bytes(b[k])) for k in a)


@pytest.mark.parametrize("session", SESSIONS)
@pytest.mark.parametrize("change", [False, True])
def test_round_trips(session: Session, change: bool, tmp_path: Path) -> None:
    plain = plain_model()
    expected = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with session(plain_model(), tmp_path) as (model, tiers), torch.no_grad():
        model(IDS)
        if change:
            for m in (model, plain):
                m.layers[3].weight.mul_(2)
                m.norm.running_mean.add_(1)
            expected = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
        loaded = pickled(model.state_dict())
        assert same(loaded, expected)
        assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr(), "a tie stays one"
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "clones.safetensors")
        assert same(load_file(tmp_path / "clones.safetensors"), expected)
        save_model(model, str(tmp_path / "model.safetensors"))
        other = Small()
        load_model(other, tmp_path / "model.safetensors")
        assert same(other.state_dict(), expected)
        assert same(pickled(dict(model.named_parameters())), {n: p for n, p in plain.named_parameters()})  # noqa: C416
        assert within_budget(tiers)
        assert torch.equal(model(IDS), plain(IDS)), "and it goes on"
    assert torch.load(io.BytesIO(_written(plain)), weights_only=True).keys() == expected.keys()


def _written(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


@pytest.mark.parametrize("session", [from_disk, in_memory, over_checkpoint])
def test_what_lies_in_pieces(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RamBackend, "piece_bytes", UNIT)
    torch.manual_seed(0)
    plain = Wide()
    expected = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    expected["layers.2.weight"][5] = 1
    with session(plain, tmp_path) as (model, tiers), torch.no_grad():
        model.layers[2].weight[5] = 1
        assert same(pickled(model.state_dict()), expected)
        save_file(model.state_dict(), tmp_path / "x.safetensors")
        assert same(load_file(tmp_path / "x.safetensors"), expected)
        assert within_budget(tiers)
    assert same(dict(model.state_dict()), expected)


def test_a_cast_checkpoint(tmp_path: Path) -> None:
    plain = Wide()
    folder = write_single(tmp_path / "c", plain.state_dict())
    with on_meta():
        model = Wide()
    expected = plain.bfloat16().state_dict()
    with tiered(model, checkpoint=folder, cpu="8MiB", dtype=torch.bfloat16) as tiers:
        assert same(pickled(model.state_dict()), expected)
        save_file(model.state_dict(), tmp_path / "x.safetensors")
        assert same(load_file(tmp_path / "x.safetensors"), expected)
        assert within_budget(tiers)


def test_a_state_dict_shows_the_value_when_it_is_read(tmp_path: Path) -> None:
    """As with a plain model: it is no copy."""
    with from_disk(plain_model(), tmp_path) as (model, _), torch.no_grad():
        state = model.state_dict()
        clone = state["norm.weight"].clone()
        model.norm.weight.fill_(3)  # type: ignore[union-attr, operator]
        assert state["norm.weight"].tolist() == [3] * 64
        assert clone.tolist() == [1] * 64
        assert pickled(state)["norm.weight"].tolist() == [3] * 64


def test_loading_inside(tmp_path: Path) -> None:
    other = plain_model(3)
    for session in SESSIONS:
        with session(plain_model(), tmp_path / session.__name__ if session is over_checkpoint else tmp_path) as (model, _):
            model.load_state_dict(pickled(other.state_dict()))
            with torch.no_grad():
                assert torch.equal(model(IDS), other(IDS))
        assert equal(model, other)


def test_saving_takes_little_memory(tmp_path: Path) -> None:
    """Of a model over a checkpoint, nothing beyond the budget is ever allocated while it is written down."""
    plain = Wide()
    folder = write_single(tmp_path / "c", plain.state_dict())
    with on_meta():
        model = Wide()
    with tiered(model, checkpoint=folder, cpu="9MiB"):
        before = anonymous_bytes()
        torch.save(model.state_dict(), tmp_path / "x.pt")
        save_file(model.state_dict(), tmp_path / "x.safetensors")
        grown = anonymous_bytes() - before
    assert grown < nbytes(plain) // 2, f"{grown} bytes"
