"""Traces of real runs: each function runs a small random model under `tiered`, two requests, and returns (trace, sizes)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import torch
from torch import nn

from tierstore import LRU, tiered
from tierstore.planning.recorder import Recorder
from tierstore.testing import DictBackend

Trace = tuple[list[str], dict[str, int]]
WIDTH = 32


@contextmanager
def one_thread() -> Iterator[None]:
    """On a shared machine, threads that wait for one another take ten times as long as such small models do alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def record(models: nn.Module | Sequence[nn.Module], request: Callable[[], object]) -> Trace:
    """Run `request` twice in 2/5 of the weights' bytes and return what the first tier was told."""
    recorders: list[Recorder] = []

    def recorder() -> Recorder:
        recorders.append(Recorder(LRU()))
        return recorders[-1]

    parts = [models] if isinstance(models, nn.Module) else list(models)
    weights = {id(p): p.nbytes for part in parts for p in (*part.parameters(), *part.buffers())}
    budget = sum(weights.values()) * 2 // 5
    everything = patch("tierstore.patch.attach.SMALL", -1)  # small tensors are held, and what is held is not asked for
    with everything, one_thread(), torch.no_grad(), tiered(parts, cpu=budget, disk=DictBackend(), device="cpu", policy=recorder):
        for _ in range(2):
            request()
    return recorders[0].trace, recorders[0].sizes


@cache
def encoder_decoder() -> Trace:
    """A T5: the encoder runs once a request, the decoder once for each of 24 tokens."""
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=8, num_heads=4, decoder_start_token_id=0, pad_token_id=0
        )
        model = T5ForConditionalGeneration(config).eval()
        ids = torch.randint(2, 64, (1, 7))
    return record(model, lambda: model.generate(input_ids=ids, min_new_tokens=24, max_new_tokens=24, do_sample=False))


@cache
def llama() -> Trace:
    """A Llama: prefill, then 23 tokens with a KV cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=10, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(2, 64, (1, 12))
    return record(model, lambda: model.generate(input_ids=ids, min_new_tokens=24, max_new_tokens=24, do_sample=False))


class Block(nn.Module):
    """One residual layer of a made-up model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def stack(layers: int, width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(*(Block(width) for _ in range(layers)))


@cache
def diffusion() -> Trace:
    """A pipeline of three models: text encoder once, denoiser 20 times, decoder once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, denoiser, decoder = stack(12), stack(20, WIDTH + 8), stack(4)
        text = torch.randn(3, WIDTH)

    def request() -> torch.Tensor:
        x = nn.functional.pad(encoder(text), (0, 8))
        for _ in range(20):
            x = x - 0.1 * denoiser(x)
        return decoder(x[:, :WIDTH])

    return record([encoder, denoiser, decoder], request)


class Experts(nn.Module):
    """A mixture layer: the router's two best of `count` experts; its bias makes some of them popular."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList(Block(WIDTH) for _ in range(count))
        nn.init.normal_(self.router.weight, std=0.15)
        nn.init.normal_(self.router.bias, std=0.7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        return x + sum(w * self.experts[i](x) for w, i in zip(weights, chosen.tolist(), strict=True))


@cache
def mixture() -> Trace:
    """A decoder of 8 layers of 8 experts each; neighbouring tokens resemble one another, so the routing is partly sticky."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), Experts(8)) for _ in range(8)))
        noise = torch.randn(2, 40, WIDTH)
    requests = iter(noise)

    def request() -> None:
        x = torch.zeros(WIDTH)
        for step in next(requests):
            x = 0.7 * x + 0.7 * step
            model(x)

    return record(model, request)


RECORDED: dict[str, Callable[[], Trace]] = {
    "encoder_decoder": encoder_decoder, "llama": llama, "diffusion": diffusion, "mixture": mixture,
}  # fmt: skip
