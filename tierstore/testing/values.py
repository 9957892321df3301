"""Tensors of every dtype and layout from a seed, and their comparison bit by bit."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator

import torch

from tierstore.spec import TensorSpec, typed_view

_ALL = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}

QUANTIZED = frozenset(dtype for dtype in _ALL if str(dtype).startswith(("torch.qint", "torch.quint")))
"""What has no plain bytes: a quantizer belongs to each tensor."""

SHELLS = frozenset(dtype for dtype in _ALL if re.fullmatch(r"torch\.(u?int[1-7]|bits.*)", str(dtype)))
"""Names for bits on which torch computes nothing yet."""

DTYPES: tuple[torch.dtype, ...] = tuple(sorted(_ALL - QUANTIZED - SHELLS, key=str))

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, stride, offset of the first element


def _contiguous(n: int) -> Geometry:
    return (2, n), (n, 1), 0


def _transposed(n: int) -> Geometry:
    return (n, 3), (1, n), 0


def _channels_last(n: int) -> Geometry:
    return (2, 3, n, 2), (6 * n, 1, 6, 3), 0


def _sliced(n: int) -> Geometry:
    return (3, n), (4 * n, 2), 5  # gaps in both dimensions, and not at the start of its memory


def _expanded(n: int) -> Geometry:
    return (4, n), (0, 1), 0


def _scalar(n: int) -> Geometry:
    return (), (), 0


def _empty(n: int) -> Geometry:
    return (3, 0, n), (n, n, 1), 0


LAYOUTS: dict[str, Callable[[int], Geometry]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "expanded": _expanded,
    "scalar": _scalar,
    "empty": _empty,
}


def random_bytes(nbytes: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return `nbytes` as a uint8 tensor, such that each element of `dtype` is a value that dtype can have."""
    data = torch.frombuffer(bytearray(random.Random(seed).randbytes(max(nbytes, 1))), dtype=torch.uint8)[:nbytes]
    return data & 1 if dtype is torch.bool else data


def make_value(
    dtype: torch.dtype = torch.float32, layout: str = "contiguous", size: int = 4, seed: int = 0, sparse: bool = False
) -> torch.Tensor:
    """Return a tensor of random bits; `layout` is a key of `LAYOUTS` and `size` the length of its main dimension.

    `sparse`: next to none of the bits are set, so that it can be compressed.
    """
    shape, stride, offset = LAYOUTS[layout](size)
    spec = TensorSpec(dtype, shape, stride)
    data = random_bytes((offset + spec.extent) * dtype.itemsize, dtype, seed)
    if sparse:
        data = torch.where(torch.arange(len(data)) % 16 == 0, data & 1, 0).to(torch.uint8)
    return typed_view(data, spec, offset)


def every_value() -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a name and a value for each dtype in each layout, and for each dtype that is only a name for bits."""
    for seed, dtype in enumerate(DTYPES):
        for layout in LAYOUTS:
            yield f"{dtype} {layout}", make_value(dtype, layout, seed=seed)
    for dtype in sorted(SHELLS, key=str):
        yield f"{dtype} contiguous", make_value(dtype)


def some_values() -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a name and a value for each dtype, with the layouts taken in turn."""
    for (seed, dtype), layout in zip(enumerate(DTYPES), itertools.cycle(LAYOUTS), strict=False):
        yield f"{dtype} {layout}", make_value(dtype, layout, seed=seed)


def bits(tensor: torch.Tensor) -> bytes:
    """Return the bits of the elements in row-major order; gaps between them do not count. Works for every dtype."""
    itemsize = tensor.dtype.itemsize
    shape, stride = (*tensor.shape, itemsize), (*(step * itemsize for step in tensor.stride()), 1)
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    raw.set_(tensor.untyped_storage(), tensor.storage_offset() * itemsize, shape, stride)
    return raw.contiguous().cpu().numpy().tobytes()


def overwrite(tensor: torch.Tensor, seed: int) -> None:
    """Write other random bits into the memory of `tensor`, as a user with a lease would."""
    itemsize = tensor.dtype.itemsize
    nbytes = TensorSpec.of(tensor).nbytes
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    raw.set_(tensor.untyped_storage(), tensor.storage_offset() * itemsize, (nbytes,), (1,)).copy_(random_bytes(nbytes, tensor.dtype, seed))
