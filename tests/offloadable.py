"""Models that are hard to offload by hooks on `forward`, for the tests of `tierstore.compat`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

WIDTH = 48
X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


class Layers(nn.Sequential):
    """Linear layers and a BatchNorm, whose running statistics are buffers."""

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)), nn.BatchNorm1d(WIDTH))


class Direct(nn.Module):
    """Uses the weights of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dense.weight.t() + self.dense.bias


class Uncalled(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(Direct() for _ in range(5)))


class Tied(nn.Module):
    """An embedding that is the head too, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, WIDTH)
        self.first, self.between, self.second = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.second.weight = self.first.weight
        self.head = nn.Linear(WIDTH, 60, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.between(self.first(self.embed(x.abs().long() % 60)))))


class BufferLinear(nn.Module):
    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(WIDTH, WIDTH), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


class BufferWeights(nn.Sequential):
    """Layers whose weights are buffers, some of which are not saved."""

    def __init__(self) -> None:
        super().__init__(*(BufferLinear(number % 2 == 0) for number in range(6)), nn.LayerNorm(WIDTH))


class Nested(nn.Module):
    """A parameter beside modules that hold it too, three levels deep; and a table that only another method reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.blocks = nn.ModuleList(nn.ModuleDict({"inner": nn.ModuleList([nn.Linear(WIDTH, WIDTH)])}) for _ in range(4))
        self.blocks[2].scale = self.scale
        self.table = nn.Embedding(16, WIDTH)

    def lookup(self, x: torch.Tensor) -> torch.Tensor:
        return self.table.weight[(x.abs().sum(-1).long() % 16)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block["inner"][0](x) * self.scale
        return x + self.lookup(x)


class Stacked(nn.Module):
    """Joins the weights of three layers in one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.feed = nn.Linear(WIDTH, 4 * WIDTH)
        self.back = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = nn.functional.linear(x, torch.cat([self.query.weight, self.key.weight, self.value.weight]))
        query, key, value = joined.chunk(3, -1)
        x = self.out(torch.softmax(query @ key.t(), -1) @ value)
        return self.back(self.feed(x).relu())


KINDS: dict[str, Callable[[], nn.Module]] = {
    "layers": Layers,
    "uncalled layers": Uncalled,
    "ties": Tied,
    "buffers": BufferWeights,
    "nested": Nested,
    "stacked weights": Stacked,
}


def make(kind: str = "layers") -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]().eval()


def largest(model: nn.Module) -> int:
    return max(t.nbytes for t in (*model.parameters(), *model.buffers()))
