"""Tensors of every dtype and layout that a store must give back unchanged, with the comparison that says so."""

from __future__ import annotations

import torch

from tierstore.spec import TensorSpec, raw_bytes, typed_view

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
)


def random_bits(spec: TensorSpec, *, seed: int = 0) -> torch.Tensor:
    """Return a tensor of `spec` with random bits, so that NaN payloads, infinities and subnormals all occur."""
    highest = 2 if spec.dtype is torch.bool else 256
    raw = torch.randint(highest, (spec.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return typed_view(raw, spec)


def dtype_samples() -> dict[str, torch.Tensor]:
    """Return one contiguous tensor of shape (5, 7) for each dtype."""
    return {str(dtype): random_bits(TensorSpec(dtype, (5, 7), (7, 1))) for dtype in DTYPES}


def layout_samples(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return one tensor of `dtype` for each way to lie in memory."""
    layouts = {
        "contiguous": ((3, 4), (4, 1)),
        "transposed": ((4, 3), (1, 4)),
        "channels_last": ((2, 3, 4, 5), (60, 1, 15, 3)),
        "sliced": ((3, 2), (8, 3)),
        "every_other": ((5,), (2,)),
        "expanded": ((4, 3), (0, 1)),
        "overlapping": ((4, 3), (1, 1)),
        "size_one_dims": ((1, 3, 1), (17, 1, 9)),
        "scalar": ((), ()),
        "empty": ((0,), (1,)),
        "empty_dims": ((2, 0, 3), (3, 3, 1)),
        "empty_odd_stride": ((0, 3), (1, 5)),
    }
    samples = {name: random_bits(TensorSpec(dtype, *layout)) for name, layout in layouts.items()}
    return samples | {"inner_slice": random_bits(TensorSpec(dtype, (6, 5), (5, 1)))[2:4]}


def all_samples() -> dict[str, torch.Tensor]:
    """Return every dtype in every layout, by a name that says both."""
    return {f"{dtype}-{name}": tensor for dtype in DTYPES for name, tensor in layout_samples(dtype).items()}


def assert_identical(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fail unless dtype, shape, stride and every bit agree, the bits of NaNs and of gaps included."""
    assert TensorSpec.of(actual) == TensorSpec.of(expected)
    assert torch.equal(raw_bytes(actual).cpu(), raw_bytes(expected).cpu())
