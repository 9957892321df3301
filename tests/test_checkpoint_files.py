"""Files of a checkpoint: where their tensors lie, and what is read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import entry, write_raw, write_shards
from tests.samples import dtype_samples
from tierstore import BudgetError, ClosedError, TieredStore, open_backend
from tierstore.backend import SourceBackend
from tierstore.errors import BackendError
from tierstore.recipe import Stored
from tierstore.spec import TensorSpec, raw_bytes
from tierstore.tier import Tier

STATE = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5, dtype=torch.int16), "c": torch.zeros(0, 3)}


def opened(path: Path, **options: Any) -> SourceBackend:
    backend = open_backend("checkpoint", path, **options)
    assert isinstance(backend, SourceBackend)
    return backend


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return TensorSpec.of(a) == TensorSpec.of(b) and torch.equal(raw_bytes(a), raw_bytes(b))


def check_all(backend: SourceBackend, state: dict[str, torch.Tensor]) -> None:
    assert dict(backend.entries()) == {name: TensorSpec.of(tensor) for name, tensor in state.items()}
    for name, tensor in state.items():
        assert same(backend.get(name), tensor), name
        filled = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        raw_bytes(filled).copy_(raw_bytes(tensor)).bitwise_not_()
        backend.fill(name, filled)
        assert same(filled.contiguous(), tensor.contiguous()), name


# -- good ones ------------------------------------------------------------------------------------------------------------


def test_every_dtype_of_a_single_file(tmp_path: Path) -> None:
    lacking = {"torch.complex32", "torch.complex128", "torch.float4_e2m1fn_x2"}
    state = {name: tensor for name, tensor in dtype_samples().items() if name not in lacking}
    save_file(state, tmp_path / "model.safetensors")
    backend = opened(tmp_path)
    check_all(backend, state)
    backend.close()


def test_two_values_in_a_byte(tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", {"a": entry(0, 6, "F4", [3, 4])}, bytes(range(6)))
    backend = opened(tmp_path)
    assert backend.get("a").shape == (3, 2)
    assert raw_bytes(backend.get("a")).tolist() == list(range(6))
    backend.close()


@pytest.mark.parametrize("form", ["directory", "index", "file"])
def test_shards(form: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "c", STATE)
    place = {"directory": folder, "index": folder / "model.safetensors.index.json", "file": folder / "model-00001-of-00003.safetensors"}[
        form
    ]
    backend = opened(place)
    check_all(backend, {"a": STATE["a"]} if form == "file" else STATE)
    backend.close()


def test_files_without_an_index_are_put_together(tmp_path: Path) -> None:
    save_file({"a": STATE["a"]}, tmp_path / "one.safetensors")
    save_file({"b": STATE["b"]}, tmp_path / "two.safetensors")
    backend = opened(tmp_path)
    check_all(backend, {"a": STATE["a"], "b": STATE["b"]})
    backend.close()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "x.ckpt"])
def test_files_of_torch_save(name: str, tmp_path: Path) -> None:
    base = torch.arange(100, dtype=torch.float64)
    state = {"a": STATE["a"], "t": torch.randn(4, 6).t(), "view": base[10:30:2], "same": base[10:30:2], "scalar": torch.tensor(3)}
    torch.save({**state, "epoch": 7}, tmp_path / name)
    backend = opened(tmp_path)
    check_all(backend, state)
    backend.close()


def test_values_are_private_maps_and_the_files_stay_as_they_are(tmp_path: Path) -> None:
    big = torch.randn(512, 1024)
    save_file({"big": big}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    backend = opened(tmp_path)
    value = backend.get("big")
    value.add_(1)
    assert torch.equal(backend.get("big"), big)
    assert (tmp_path / "model.safetensors").read_bytes() == content
    backend.close()
    assert torch.equal(value, big + 1), "a map outlives the backend"


def test_what_is_put_goes_beside_the_checkpoint_and_vanishes(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    backend = opened(tmp_path)
    before = sorted(tmp_path.iterdir())
    backend.put("a", torch.ones(2))
    backend.put("new", torch.arange(3))
    assert torch.equal(backend.get("a"), torch.ones(2))
    assert backend.keep("new").tolist() == [0, 1, 2]
    backend.delete("new")
    backend.delete("b")
    assert {key for key, _ in backend.entries()} == {"a", "c"}
    with pytest.raises(KeyError):
        backend.delete("b")
    backend.close()
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ClosedError):
        backend.get("a")


def test_a_limit_on_what_is_written(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    backend = opened(tmp_path, limit=100)
    backend.put("x", torch.zeros(20))
    with pytest.raises(BudgetError, match="'y' beside the checkpoint"):
        backend.put("y", torch.zeros(20))
    backend.put("x", torch.zeros(4))
    backend.put("y", torch.zeros(20))
    backend.close()


def test_a_memory_backend_as_scratch(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    backend = opened(tmp_path, scratch=open_backend("device", "cpu"))
    backend.put("a", torch.ones(3))
    assert backend.extent("a") is None
    out = torch.empty(3)
    backend.fill("a", out)
    assert out.tolist() == [1, 1, 1]
    backend.close()


def test_a_place_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Path) -> None:
        raise BackendError(f"{place} is read-only")

    save_file(STATE, tmp_path / "model.safetensors")
    backend = opened(tmp_path)
    monkeypatch.setattr("tierstore.backends.disk.DiskBackend.scratch", refuse)
    with pytest.raises(BackendError, match="give disk=PATH"):
        backend.put("a", torch.ones(1))
    backend.close()


# -- reading --------------------------------------------------------------------------------------------------------------


def test_views_and_casts_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to cut, permute and cast a tensor gives what torch gives."""
    monkeypatch.setattr("tierstore.backends._pieces._PIECE", 4096)
    monkeypatch.setattr("tierstore.backends._pieces._SHORT", 64)
    base = torch.randn(6, 40, 30)
    save_file({"pad": torch.zeros(3, dtype=torch.int8), "x": base}, tmp_path / "model.safetensors")
    backend = opened(tmp_path)
    for view in (
        base,
        base[2:4],
        base[:, 5:35],
        base[:, :, 3:4],
        base.transpose(0, 2),
        base[3, ::2, 1:],
        base[0, 0, 0],
        base[:0],
        base.permute(1, 2, 0),
    ):
        stored = Stored("x", TensorSpec.of(view), int(view.storage_offset()))
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            backend.bind({"v": stored})
            out = torch.empty(view.shape, dtype=dtype)
            backend.read(stored, out)  # type: ignore[attr-defined]
            assert torch.equal(out, view.to(dtype))
            strided = torch.empty(tuple(reversed(view.shape)), dtype=dtype).permute(tuple(reversed(range(view.dim()))))
            backend.read(stored, strided)  # type: ignore[attr-defined]
            assert torch.equal(strided, view.to(dtype))
        assert torch.equal(backend.get("v"), view)
    backend.close()


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {str(number): torch.full((1000,), float(number)) for number in range(12)}
    write_shards(tmp_path, state, shards=12)
    backend = opened(tmp_path)
    backend._files._most = 3  # type: ignore[attr-defined]
    with TieredStore([Tier("cpu", open_backend("ram"), 10_000), Tier("disk", backend)]) as store:
        for _ in range(2):
            for name, tensor in state.items():
                assert torch.equal(store.get(name), tensor)
