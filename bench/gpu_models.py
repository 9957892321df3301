"""The models of `gpu_offload.py`: a decoder and a diffusion transformer whose random weights any process makes the same.

A weight is a window into one pool of random numbers, at a place that its name decides. So weights are made on any device
at the speed of a copy, the same bits each time, and a block alone gets the weights that it has in the whole model.
"""

from __future__ import annotations

import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from offload_model import DTYPE, Decoder, rotation
from torch import Tensor, nn
from torch.nn import functional

Answer = Callable[..., Tensor]

POOL = 16_777_213  # elements; a prime, so that no row of a matrix is the same as another one
LARGE = 64 << 10  # bytes from which a weight counts for the ring: smaller ones may stay


@dataclass(frozen=True)
class Shape(ABC):
    """How large a model is, and how a pass of it is run; `tokens` is what differs between passes.

    `blocks`: the path of the list of equal blocks. `parts`: patterns that together cover all modules with weights.
    `label`: what the number of tokens counts. `forwards`: calls of the model in one pass.
    """

    layers: int
    width: int
    heads: int

    kind: ClassVar[str]
    blocks: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    forwards: ClassVar[int] = 1

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """Return the model without weights, on the meta device."""

    @abstractmethod
    def given(self, tokens: int, device: torch.device) -> Tensor:
        """Return what a pass starts from."""

    def run(self, answer: Answer, given: Tensor) -> Tensor:
        """Run one pass, and return its output."""
        return answer(given)

    def touched(self, tokens: int) -> int:
        """Return the bytes of the weights that a pass must read."""
        return self.bytes

    @cached_property
    def bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.skeleton().parameters())

    @cached_property
    def pair(self) -> int:
        """The bytes of the largest two weights in a row: what a ring with two places may need, tables that are looked up left out."""
        model = self.skeleton()
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        sizes = [p.nbytes for p in model.parameters() if p.nbytes > LARGE and id(p) not in tables]
        return max((a + b for a, b in zip(sizes, sizes[1:] + sizes[:1], strict=True)), default=0)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def with_layers(self, layers: int) -> Shape:
        return replace(self, layers=layers)

    def of_bytes(self, size: int) -> Shape:
        """Return the same with as many layers as make up about `size` bytes."""
        one, two = self.with_layers(1).bytes, self.with_layers(2).bytes
        return self.with_layers(max(1, 1 + round((size - one) / (two - one))))

    def told(self) -> dict[str, Any]:
        return asdict(self) | {"kind": self.kind}


@dataclass(frozen=True)
class DecoderShape(Shape):
    """A decoder of Llama's shapes and arithmetic; a pass is one forward over different ids, without a cache of keys and values."""

    vocabulary: int

    kind, blocks = "decoder", "model.layers"
    parts = ("model.embed_tokens", "model.layers.*", "model.norm", "lm_head")

    @property
    def hidden(self) -> int:
        return self.width * 7 // 2

    @property
    def key_heads(self) -> int:
        return max(1, self.heads // 4)

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return Decoder(self).to(DTYPE)

    def given(self, tokens: int, device: torch.device) -> Tensor:
        return torch.arange(tokens, device=device).mul(37).remainder(self.vocabulary)[None]

    def touched(self, tokens: int) -> int:
        rows = len(self.given(tokens, torch.device("cpu"))[0].unique())
        return self.bytes - DTYPE.itemsize * self.width * (self.vocabulary - rows)


@dataclass(frozen=True)
class DenoiserShape(Shape):
    """A diffusion transformer; a pass is a few steps of a sampler, each one forward over all tokens of a picture."""

    kind, blocks = "dit", "blocks"
    parts = ("into", "time_in", "time_out", "blocks.*", "modulation", "out")
    forwards = 4
    channels: ClassVar[int] = 64

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return Denoiser(self).to(DTYPE)

    def given(self, tokens: int, device: torch.device) -> Tensor:
        return random_numbers(1, (1, tokens, self.channels)).to(device)

    def run(self, answer: Answer, given: Tensor) -> Tensor:
        x = given
        for step in range(self.forwards):
            moment = x.new_full((1,), 128.0 * (self.forwards - step))  # a whole number: exact in every type
            x = x - answer(x, moment) / self.forwards
        return x


class DenoiserBlock(nn.Module):
    """Attention and a network of two layers, each shifted, scaled and gated by the condition (adaLN)."""

    def __init__(self, shape: DenoiserShape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate * self.attend(modulated(x, shift, scale))
        return x + gate_2 * self.down(functional.gelu(self.up(modulated(x, shift_2, scale_2)), approximate="tanh"))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.merge(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Denoiser(nn.Module):
    """Noisy patches of shape (1, tokens, channels) and a moment of shape (1,) to a velocity of the patches' shape."""

    def __init__(self, shape: DenoiserShape) -> None:
        super().__init__()
        width = shape.width
        self.into = nn.Linear(shape.channels, width)
        self.time_in, self.time_out = nn.Linear(256, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(DenoiserBlock(shape) for _ in range(shape.layers))
        self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, shape.channels)

    def forward(self, x: Tensor, moment: Tensor) -> Tensor:
        condition = functional.silu(self.time_out(functional.silu(self.time_in(waves(moment).to(x.dtype)))))
        x = self.into(x)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.out(modulated(x, shift, scale))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def waves(moment: Tensor) -> Tensor:
    """Return 128 cosines and 128 sines of a moment, of shape (1, 256)."""
    speeds = torch.exp(torch.arange(128, device=moment.device) * (-9.21 / 128))
    angles = moment.float()[:, None] * speeds
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


KINDS: dict[str, type[Shape]] = {"decoder": DecoderShape, "dit": DenoiserShape}


def shape_from(told: dict[str, Any]) -> Shape:
    """Return the shape that `Shape.told` told of."""
    return KINDS[told["kind"]](**{name: value for name, value in told.items() if name != "kind"})


# -- weights ------------------------------------------------------------------------------------------------------------


def pool_on(device: torch.device) -> Tensor:
    """Return the pool of random numbers, made on the CPU, so that it is the same for every device."""
    return random_numbers(0, (POOL,)).mul(0.03).to(device)


def random_numbers(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Return them on the CPU, whatever torch's default device is: mmgp changes it."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(DTYPE)


def pour(pool: Tensor, name: str, out: Tensor) -> None:
    """Fill the flat tensor `out` from the pool, from where `name` says on, around its end as often as needed."""
    start, done = zlib.crc32(name.encode()) % POOL, 0
    while done < len(out):
        piece = min(len(out) - done, POOL - start)
        out[done : done + piece].copy_(pool[start : start + piece])
        start, done = 0, done + piece


@torch.no_grad()
def fill(module: nn.Module, pool: Tensor, prefix: str = "") -> None:
    """Give the parameters of `module`, which are memory already, the values that their names below `prefix` stand for."""
    for name, parameter in module.named_parameters(prefix=prefix):
        pour(pool, name, parameter.data.view(-1))
        if "norm" in name:
            parameter.add_(1.0)


def made(shape: Shape, device: torch.device, *, page_locked: bool = False) -> nn.Module:
    """Return the model with its weights on `device`; on the CPU these may be page-locked."""
    model = shape.skeleton()
    if page_locked:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                memory = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=True)
                module.register_parameter(name, nn.Parameter(memory))
    else:
        model.to_empty(device=device)
    fill(model, pool_on(device))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def layer_by_layer(shape: DecoderShape, tokens: int, device: torch.device, wait: Callable[[], None]) -> tuple[Tensor, float]:
    """Run a pass of a decoder with one layer in memory at a time; return its output, and the seconds of computing alone.

    Each part runs twice, and the second time counts.
    """
    model, pool, seconds = shape.skeleton().requires_grad_(False).eval(), pool_on(device), 0.0
    x: Tensor = shape.given(tokens, device)
    body: Any = model.get_submodule("model")
    parts = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(shape.layers)), "model.norm", "lm_head"]
    for name in parts:
        part = model.get_submodule(name).to_empty(device=device)
        fill(part, pool, name)
        turning = rotation(tokens, body.head_width, x) if name.startswith("model.layers.") else ()
        for _ in range(2):
            wait()
            started = time.perf_counter()
            y = part(x, *turning)
            wait()
            took = time.perf_counter() - started
        x, seconds = y, seconds + took
        part.to("meta")
    return x, seconds
