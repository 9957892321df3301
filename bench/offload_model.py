"""The model of `cpu_offload.py`: a decoder with Llama's shapes, names and arithmetic, so that every peer can read its checkpoint.

The weights are bfloat16. A CPU with AVX-512 BF16 (or AMX) multiplies them 4 to 5 times as fast as float32 at half the bytes,
so it is the type in which a pass needs the least time for the bytes that it must have, and where the disk shows most.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

DTYPE = torch.bfloat16
HEAD_WIDTH, HEADS_PER_KEY, EPSILON, ROTATION_BASE = 64, 8, 1e-5, 10000.0


class Sizes(Protocol):
    """What `Decoder` has to know of its shape."""

    @property
    def layers(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def key_heads(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...


@dataclass(frozen=True)
class Shape:
    """How large the decoder is; at 2 GiB about TinyLlama-1.1B, below that narrower with as many or more layers."""

    layers: int
    width: int

    @classmethod
    def of(cls, size: int) -> Shape:
        """Return the shape of about `size` bytes; no single weight is more than a sixteenth of them."""
        step = HEAD_WIDTH * HEADS_PER_KEY
        width = step * max(1, min(4, math.floor(4 * math.sqrt(size / (2 << 30)) + 0.05)))
        block = cls(1, width).bytes - cls(0, width).bytes
        return cls(max(1, round((size - cls(0, width).bytes) / block)), width)

    def with_layers(self, layers: int) -> Shape:
        return replace(self, layers=layers)

    @property
    def hidden(self) -> int:
        return self.width * 11 // 4

    @property
    def vocabulary(self) -> int:
        return self.width * 16

    @property
    def head_width(self) -> int:
        return HEAD_WIDTH

    @property
    def heads(self) -> int:
        return self.width // HEAD_WIDTH

    @property
    def key_heads(self) -> int:
        return self.heads // HEADS_PER_KEY

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        attention = 2 * self.width * self.width + 2 * self.width * self.key_heads * HEAD_WIDTH
        block = attention + 3 * self.width * self.hidden + 2 * self.width
        return DTYPE.itemsize * (self.layers * block + 2 * self.vocabulary * self.width + self.width)

    def touched(self, tokens: int) -> int:
        """Return the bytes that a pass over `tokens` different ids must read: all but the embeddings of the other ids."""
        return self.bytes - DTYPE.itemsize * self.width * (self.vocabulary - len(self.ids(tokens)[0].unique()))

    def ids(self, tokens: int) -> Tensor:
        return torch.arange(tokens).mul(37).remainder(self.vocabulary)[None]

    def config(self) -> dict[str, object]:
        """Return what `config.json` of a Hugging Face directory says of this model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": EPSILON,
            "rope_theta": ROTATION_BASE,
            "tie_word_embeddings": False,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
        }

    def told(self) -> dict[str, int]:
        return asdict(self)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPSILON)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Sizes) -> None:
        super().__init__()
        self.head_width = shape.head_width
        keys = shape.key_heads * shape.head_width
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(shape.width, to, bias=False) for to in (shape.width, keys, keys))
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        causal = x.shape[1] > 1
        y = functional.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=causal, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, shape: Sizes) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape: Sizes) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), Gated(shape)
        self.input_layernorm, self.post_attention_layernorm = Norm(shape.width), Norm(shape.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, shape: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width)
        self.head_width = shape.head_width

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        cos, sin = rotation(ids.shape[1], self.head_width, x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Decoder(nn.Module):
    """Ids of shape (1, tokens) to logits of shape (1, tokens, vocabulary)."""

    def __init__(self, shape: Sizes) -> None:
        super().__init__()
        self.model = Body(shape)
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))


def rotation(tokens: int, head_width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of all positions, of the device and dtype of `like`."""
    steps = 1.0 / ROTATION_BASE ** (torch.arange(0, head_width, 2, dtype=torch.float, device=like.device) / head_width)
    angles = torch.arange(tokens, device=like.device)[None, :, None].float() * steps
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(like.dtype)[:, None], angles.sin().to(like.dtype)[:, None]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def random_decoder(shape: Shape) -> Decoder:
    """Return the decoder in memory, with the same random weights each time."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Decoder(shape).to(DTYPE)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.03)
    return model.requires_grad_(False).eval()


def save(model: Decoder, file: Path) -> None:
    save_file(model.state_dict(), file, metadata={"format": "pt"})


def mapped_decoder(shape: Shape, file: Path) -> Decoder:
    """Return the decoder with its weights as maps of `file`: nothing is read yet."""
    with torch.device("meta"):
        model = Decoder(shape).to(DTYPE)
    model.load_state_dict(load_file(file), assign=True)
    return model.requires_grad_(False).eval()


def loaded_decoder(shape: Shape, file: Path) -> Decoder:
    """Return the decoder with its weights in memory."""
    model = mapped_decoder(shape, file)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
