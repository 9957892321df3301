"""How a value is made from stored tensors: an expression, computed straight into the memory that is to hold the result.

[Note: into the result]
A fused weight is stacked and joined from hundreds of stored ones. Computed from the inside out, every step would hold its
result beside those of the steps before, several times the weight. So each step is told where its result belongs, and hands
the parts of that place on: a stored tensor is read, and cast, directly into its part of the final memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tierstore.errors import listed
from tierstore.spec import TensorSpec

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A stored tensor, or a view of one: `spec` describes the view, which starts `offset` of its own elements after the tensor does."""

    name: str
    spec: TensorSpec
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.name!r}"


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """The result of an operator on other recipes; `index` picks one of several results."""

    function: Any  # an OpOverload, for which torch has no public type
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    spec: TensorSpec
    index: int | None = None

    def __str__(self) -> str:
        return listed(list(dict.fromkeys(map(str, leaves_of(self)))), 3)


Recipe = Stored | Computed


class Leaves(Protocol):
    """Where stored tensors are read from."""

    def read(self, stored: Stored, out: torch.Tensor) -> None:
        """Copy a stored tensor into `out`, CPU memory of the same shape, casting it to the dtype of `out`."""


def leaves_of(recipe: Recipe) -> list[Stored]:
    """Return the stored tensors that a recipe reads, in the order in which it reads them."""
    if isinstance(recipe, Stored):
        return [recipe]
    return [leaf for part in parts_of((recipe.args, tuple(recipe.kwargs.values()))) for leaf in leaves_of(part)]


def parts_of(value: Any) -> list[Recipe]:
    """Return the recipes among operator arguments, however they nest."""
    if isinstance(value, Stored | Computed):
        return [value]
    return [part for item in value for part in parts_of(item)] if isinstance(value, list | tuple) else []


def replace_parts(value: Any, make: Callable[[Recipe], Any]) -> Any:
    """Return operator arguments with `make` of each recipe in its place."""
    if isinstance(value, Stored | Computed):
        return make(value)
    return type(value)(replace_parts(item, make) for item in value) if isinstance(value, list | tuple) else value


def compute(recipe: Recipe, leaves: Leaves) -> torch.Tensor:
    """Return the value of a recipe in fresh CPU memory."""
    spec = recipe.spec
    out = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="cpu")
    fill(recipe, out, leaves)
    return out


def fill(recipe: Recipe, out: torch.Tensor, leaves: Leaves) -> None:
    """Write the value of a recipe to `out`, CPU memory of its shape and dtype; strides may differ."""
    if isinstance(recipe, Stored):
        leaves.read(recipe, out)
    elif recipe.function not in _INTO or not _INTO[recipe.function](recipe, out, leaves):
        args, kwargs = (replace_parts(value, lambda part: compute(part, leaves)) for value in (recipe.args, tuple(recipe.kwargs.values())))
        result = recipe.function(*args, **dict(zip(recipe.kwargs, kwargs, strict=True)))
        out.copy_(result if recipe.index is None else result[recipe.index])


def cut(recipe: Recipe, start: int, nbytes: int) -> Recipe | None:
    """Return a recipe of `nbytes` of a value's bytes from byte `start` on, as a tensor of one dimension.

    Both must be multiples of its element size. None unless the value lies in its file in this order, or is a cast of one that does.
    """
    if isinstance(recipe, Stored):
        offset = recipe.offset * recipe.spec.dtype.itemsize + start
        return Stored(recipe.name, _flat(torch.uint8, nbytes), offset) if recipe.spec.dense else None
    base = recipe.args[0] if recipe.function is aten._to_copy.default else None
    if not isinstance(base, Stored) or base.spec.stride != recipe.spec.stride or not recipe.spec.dense:
        return None
    dtype, count = recipe.spec.dtype, nbytes // recipe.spec.dtype.itemsize
    part = Stored(base.name, _flat(base.spec.dtype, count), base.offset + start // dtype.itemsize)
    return Computed(recipe.function, (part,), {"dtype": dtype}, _flat(dtype, count))


def _flat(dtype: torch.dtype, count: int) -> TensorSpec:
    return TensorSpec(dtype, (count,), (1,))


# -- operators that hand parts of the result on; False where these arguments do not allow it --------------------------------


def _same(recipe: Computed, out: torch.Tensor, leaves: Leaves) -> bool:
    """A copy of another layout."""
    fill(recipe.args[0], out, leaves)
    return True


def _cast(recipe: Computed, out: torch.Tensor, leaves: Leaves) -> bool:
    base = recipe.args[0]
    if isinstance(base, Stored):
        leaves.read(base, out)
    else:  # computed in its own dtype: a step between rounds
        out.copy_(compute(base, leaves))
    return True


def _stack(recipe: Computed, out: torch.Tensor, leaves: Leaves) -> bool:
    parts, dim = _joined(recipe)
    for part, place in zip(parts, out.unbind(dim), strict=True):
        fill(part, place, leaves)
    return True


def _cat(recipe: Computed, out: torch.Tensor, leaves: Leaves) -> bool:
    parts, dim = _joined(recipe)
    if any(part.spec.dtype != out.dtype or len(part.spec.shape) != out.dim() for part in parts):
        return False
    start = 0
    for part in parts:
        size = part.spec.shape[dim]
        fill(part, out.narrow(dim, start, size), leaves)
        start += size
    return True


def _joined(recipe: Computed) -> tuple[list[Recipe], int]:
    args = recipe.args
    return list(args[0]), recipe.kwargs.get("dim", args[1] if len(args) > 1 else 0)


def _transpose(recipe: Computed, out: torch.Tensor, leaves: Leaves) -> bool:
    base, first, second = recipe.args
    fill(base, out.transpose(first, second), leaves)
    return True


def _permute(recipe: Computed, out: torch.Tensor, leaves: Leaves) -> bool:
    base, dims = recipe.args
    inverse = sorted(range(len(dims)), key=lambda i: dims[i] % len(dims))
    fill(base, out.permute(inverse), leaves)
    return True


def _reshape(recipe: Computed, out: torch.Tensor, leaves: Leaves) -> bool:
    base = recipe.args[0]
    if not out.is_contiguous():
        return False
    fill(base, out.view(base.spec.shape), leaves)
    return True


_INTO: Mapping[Any, Callable[[Computed, torch.Tensor, Leaves], bool]] = {
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten._to_copy.default: _cast,
    aten.stack.default: _stack,
    aten.cat.default: _cat,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.dim: _reshape,
}
