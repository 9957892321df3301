"""Models that do unusual things with their weights, in training, evaluation and without gradients, against the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils._pytree import tree_leaves

from tests.plainly import gradients, same, state, under_pressure, within_budget

MODELS: dict[str, tuple[type[nn.Module], torch.Tensor]] = {}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


X = torch.randn(4, 32, generator=seeded())
SEQUENCE = torch.randn(3, 7, 32, generator=seeded())
IMAGE = torch.randn(2, 3, 16, 16, generator=seeded())
IDS = torch.randint(0, 50, (3, 7), generator=seeded())


def takes(x: torch.Tensor) -> Any:
    def register(kind: type[nn.Module]) -> type[nn.Module]:
        MODELS[kind.__name__] = kind, x
        return kind

    return register


# -- lookups and sequences ------------------------------------------------------------------------------------------------


@takes(IDS)
class SparseGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 32, sparse=True), nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.table(ids))


@takes(IDS)
class TableThatALookupWrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 32, max_norm=1.0, padding_idx=0), nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.table(ids))


@takes(IDS)
class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(50, 32, mode="sum"), nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.table(ids, per_sample_weights=torch.ones(3, 7)))


@takes(SEQUENCE)
class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(32, 16, 2, batch_first=True, bidirectional=True, proj_size=8)
        self.second, self.cell = nn.GRU(16, 16, batch_first=True), nn.LSTMCell(16, 16)

    def forward(self, x: torch.Tensor) -> Any:
        y, _ = self.second(self.first(x)[0])
        packed = nn.utils.rnn.pack_padded_sequence(y, [7, 5, 2], batch_first=True)
        return y, self.second(packed)[0].data, self.cell(y[:, 0])


@takes(SEQUENCE)
class MaskedEncoder(nn.Module):
    """In evaluation torch takes a fast path over nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0), 3)

    def forward(self, x: torch.Tensor) -> Any:
        padding = torch.arange(7) >= torch.tensor([[7], [5], [7]])
        return self.encoder(x, src_key_padding_mask=padding)


@takes(SEQUENCE)
class EncoderAndDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(32, 4, 2, 2, 64, batch_first=True, dropout=0.1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x, x.flip(1))


# -- weights of unusual kinds ---------------------------------------------------------------------------------------------


@takes(IMAGE)
class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        )
        self.body = nn.Sequential(*layers, nn.ConvTranspose2d(8, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(4)).to(
            memory_format=torch.channels_last
        )

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x)


@takes(X)
class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Parameter(torch.randn(32, 32, dtype=torch.cfloat))
        self.wide = nn.Parameter(torch.randn(32, 32, dtype=torch.cdouble))
        self.signal = nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor) -> Any:
        turned = torch.view_as_real(x.to(torch.cfloat) @ self.narrow.conj().t())
        return turned, (x.to(torch.cdouble) @ self.wide.mH).abs(), torch.fft.rfft(self.signal).abs()


@takes(X)
class ManyDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32).bfloat16(), nn.Linear(32, 32).double(), nn.Linear(32, 32).half()
        self.register_buffer("quantised", torch.randint(-128, 127, (32, 32), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(32))
        self.register_buffer("eight", torch.randn(32, 32).to(torch.float8_e4m3fn))
        self.register_buffer("mask", torch.rand(32) > 0.5)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.a(x.bfloat16()).float() + self.b(x.double()).float() + self.c(x.half()).float()
        return y + x @ (self.quantised.float() * self.scale) + x @ self.eight.float() + x.masked_fill(self.mask, 0)


@takes(X)
class Shapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expanded = nn.Parameter(torch.randn(1, 32).expand(32, 32), requires_grad=False)  # no optimizer can write to it
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.scale, self.turned = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.randn(32, 32).t())
        self.layer = nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> Any:
        return x @ self.expanded * self.scale + self.empty.sum() + x @ self.turned, self.layer(x)


@takes(X)
class Reparametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), nn.utils.spectral_norm(nn.Linear(32, 32))

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.a(x))


# -- weights used in unusual ways -----------------------------------------------------------------------------------------


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


@takes(X)
class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(32, 32) / 6) for _ in range(5))

    def forward(self, x: torch.Tensor) -> Any:
        for weight in self.weights:
            x = Product.apply(x, weight)
        return x


@takes(X)
class MakesWeights(nn.Module):
    """A layer's output is another one's weight, and a weight is used turned and copied."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.layer, self.other = nn.Linear(32, 32 * 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> Any:
        made = self.maker(x[0]).view(32, 32)
        return F.linear(x, made, self.layer.bias), self.layer(x), F.linear(x, self.other.weight.t().contiguous())


@takes(X)
class KeepsReferences(nn.Module):
    """Tensors and modules in plain attributes, a weight in a dict, and one derived from a weight on the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.named = nn.Linear(32, 32), nn.ModuleDict({"a": nn.Linear(32, 32)})
        self.table, self.hidden, self.known = torch.randn(32, 32), [nn.Linear(32, 32)], {"w": self.layer.weight}
        self.derived: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> Any:
        if self.derived is None:
            self.derived = self.named["a"].weight.detach() * 2
        return self.hidden[0](x @ self.table) + F.linear(x, self.known["w"]) + F.linear(x, self.derived)


@takes(X)
class Aliases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(32, 32), nn.Linear(32, 32)
        self.b, self.c.weight = self.a, self.a.weight
        self.part = nn.Parameter(self.a.weight.detach()[:4])
        self.register_buffer("row", self.a.weight.detach()[2])

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.c(self.a(x))) @ self.part.t(), self.row + 1


@takes(X)
class Counts(nn.Module):
    """Buffers that are assigned, added to and written through a view in every call, and one that decides what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("history", torch.zeros(5, 32))
        self.register_buffer("unsaved", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        self.history = torch.roll(self.history, 1, 0)
        self.history[0] = self.a(x).detach().mean(0)
        self.unsaved.add_(1.5)
        return self.b(self.a(x * 2 if self.calls.item() % 2 else x)) + self.history.sum(0)


@takes(X)
class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.register_buffer("codes", torch.randn(64, 32))
        self.register_buffer("used", torch.ones(64))

    def forward(self, x: torch.Tensor) -> Any:
        z = self.layer(x)
        nearest = torch.cdist(z, self.codes).argmin(1)
        found = self.codes[nearest]
        with torch.no_grad():
            self.used.mul_(0.9).index_add_(0, nearest, torch.ones(4))
            self.codes.index_add_(0, nearest, (z - found) * 0.1)
            self.codes.data[0] = 0
        return z + (found - z).detach()


@takes(X)
class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.stacked = nn.Linear(32, 8), nn.Parameter(torch.randn(8, 32, 32))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(8))

    def forward(self, x: torch.Tensor) -> Any:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            if len(row):
                y = y.index_add(0, row, expert(x[row]) * weights[row, place, None])
        return y + torch.bmm(x[:, None], self.stacked[chosen[:, 0]])[:, 0]


@takes(X)
class CallsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step, self.out = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, depth: int = 3) -> Any:
        return self.out(x) if depth == 0 else torch.tanh(self.step(self.forward(x, depth - 1))) + self(x, 0)


@takes(X)
class AnswersForAnother(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(32, 32), nn.Linear(32, 32)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: torch.Tensor) -> Any:
        return F.linear(x, self.weight, self.bias) + self.out(x)


@takes(X)
class WeightedLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 10)
        self.first = nn.CrossEntropyLoss(weight=torch.rand(10), label_smoothing=0.1)
        self.second = nn.BCEWithLogitsLoss(pos_weight=torch.rand(10))

    def forward(self, x: torch.Tensor) -> Any:
        y = self.layer(x)
        return self.first(y, torch.tensor([1, 2, 3, 4])), self.second(y, torch.ones(4, 10))


@takes(X)
class RandomParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop, self.alpha = nn.Linear(32, 32), nn.Linear(32, 32), nn.Dropout(0.5), nn.AlphaDropout(0.2)

    def forward(self, x: torch.Tensor) -> Any:
        noise = torch.rand_like(self.a.bias)
        return self.b(self.alpha(self.drop(self.a(x)))) * noise + torch.randn(self.a.weight.shape).sum()


@takes(X)
class Generates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

    def parts(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            x = layer(x)
            yield x

    def forward(self, x: torch.Tensor) -> Any:
        return list(self.parts(x))


@takes(X)
class ClampsItsWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    @property
    def joined(self) -> torch.Tensor:
        return torch.cat([self.a.weight, self.b.weight])

    def forward(self, x: torch.Tensor) -> Any:
        self.c.weight.data.clamp_(-0.1, 0.1)
        return F.linear(x, self.joined), self.c(x)


@takes(X)
class ManyOperators(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(*shape)) for shape in ((32, 32), (32,), (4, 8, 32)))

    def forward(self, x: torch.Tensor) -> Any:
        a, b, c = self.a, self.b, self.c
        products = torch.addmm(b, x, a), torch.baddbmm(c, x[:, None].expand(4, 8, 32), a.expand(4, 32, 32)), torch.linalg.solve(a, x.t())
        picked = torch.take(a, torch.tensor([5, 7])), x.index_select(1, b.argsort()), a[:, ::3].sum(0), a.to_sparse().to_dense()
        parts = a.diagonal().sum(), a.tril().sum(), b.unfold(0, 4, 2).sum(), a.unsqueeze(0).repeat(2, 1, 1).mean(), torch.block_diag(b, b)
        return products, picked, parts, torch.where(b > 0, x, b), torch.lerp(x, b, 0.3), F.scaled_dot_product_attention(c, c, c)


# -- the test -------------------------------------------------------------------------------------------------------------


def loss(results: Any) -> torch.Tensor:
    return sum(((y.abs() if y.is_complex() else y).float().square().mean() for y in tree_leaves(results)), torch.zeros(()))


def calls(model: nn.Module, x: torch.Tensor, mode: str) -> list[torch.Tensor]:
    """Call a model three times; with an optimizer's step, with backward, or without gradients."""
    torch.manual_seed(9)
    model.train(mode in ("train", "steps"))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    seen: list[torch.Tensor] = []
    for _ in range(3):
        with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode in ("train", "eval", "steps")):
            results = model(x)
        if mode in ("train", "eval", "steps"):
            loss(results).backward()
        if mode == "steps":
            optimizer.step()
            optimizer.zero_grad()
        seen += [y.detach().clone() for y in tree_leaves(results)]
    return seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["train", "eval", "steps", "no_grad", "inference"])
@pytest.mark.parametrize("name", MODELS)
def test_an_unusual_model_equals_the_plain_one(name: str, mode: str, scratch: Path) -> None:
    kind, x = MODELS[name]
    torch.manual_seed(0)
    plain = kind()
    torch.manual_seed(0)
    model = kind()
    expected = calls(plain, x, mode)
    with under_pressure(model, scratch) as session:
        assert same(calls(model, x, mode), expected)
        within_budget(session)
    assert same(state(model), state(plain))
    assert same(dense(gradients(model)), dense(gradients(plain)))


def dense(named: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    return {name: value.to_dense() if value is not None else None for name, value in named.items()}
