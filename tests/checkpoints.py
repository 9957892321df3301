"""Checkpoints for tests: good ones, files of bytes that no honest program would write, and models for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tierstore import Tiered, on_meta
from tierstore.spec import raw_bytes


def write_raw(file: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a safetensors file with any header (bytes, or what becomes JSON) that claims to be `length` bytes long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(begin: int, end: int, dtype: str = "F32", shape: list[int] | None = None) -> dict[str, object]:
    """Return the header's entry of one tensor, by default of float32 that fills its bytes."""
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def write_shards(folder: Path, state: Mapping[str, torch.Tensor], shards: int = 3, *, prefix: str = "model") -> Path:
    """Write a state dict as a checkpoint of several files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(state)
    weight_map = {}
    for number in range(shards):
        part = {name: state[name].contiguous() for name in names[number::shards]}
        file = f"{prefix}-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{prefix}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_single(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """Write a state dict as a checkpoint of one file; tensors that share memory are written once."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[int, str] = {}
    for name, tensor in state.items():
        seen.setdefault(tensor.data_ptr(), name)
    save_file({name: state[name].contiguous() for name in seen.values()}, folder / "model.safetensors")
    return folder


# -- models ---------------------------------------------------------------------------------------------------------------

IDS = torch.arange(6).reshape(2, 3)


class Small(nn.Module):
    """A tie, a buffer that is saved, one that is not, a weight used outside its module's forward."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(6)))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((width,), 0.5), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.embed(ids)) * self.scale
        return self.head(self.norm(x.flatten(0, 1)) @ self.layers[0].weight)


def plain_model(seed: int = 0, **options: Any) -> Small:
    torch.manual_seed(seed)
    model = Small(**options).eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_()  # type: ignore[union-attr, operator]
        model.norm.num_batches_tracked.fill_(7)  # type: ignore[union-attr, operator]
    return model


def meta_model(**options: Any) -> Small:
    with on_meta():
        return Small(**options).eval()


def nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def within_budget(session: Tiered) -> bool:
    return all(tier.budget_bytes is None or tier.peak_bytes <= tier.budget_bytes for tier in session.stats().tiers.values())


def equal(model: nn.Module, plain: nn.Module) -> bool:
    a, b = model.state_dict(), plain.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(raw_bytes(a[k]), raw_bytes(b[k])) for k in a)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Wide(nn.Module):
    """Weights of 8 MiB less a page each: in huge pages there is room for what is left of a page of the file before them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8188, 256)
        self.layers = nn.Sequential(nn.Linear(256, 8188), nn.ReLU(), nn.Linear(8188, 256), nn.Tanh(), nn.Linear(256, 8188))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embed(ids))
