"""What describes a tensor apart from its bytes, and the way from a tensor to raw bytes and back.

A value is stored as the bytes its elements span in memory, gaps included, so that any stride (dense, sliced, expanded)
comes back exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tierstore.errors import UnsupportedTensorError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype, shape and stride (both in elements) of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))

    @property
    def extent(self) -> int:
        """Elements from the first to the last one in memory, gaps included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes that a resident copy occupies."""
        return self.extent * self.dtype.itemsize

    @property
    def is_bytes(self) -> bool:
        """True if a tensor of it is what `raw_bytes` would make of it; each operation of torch that is saved counts in a transfer."""
        return self.dtype is torch.uint8 and self.stride == (1,)

    @property
    def dense(self) -> bool:
        """True if the elements fill their extent exactly once (contiguous up to a permutation)."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel == self.extent and not self._overlaps()

    def _overlaps(self) -> bool:
        expected = 1
        for step, size in sorted((step, size) for step, size in zip(self.stride, self.shape, strict=True) if size > 1):
            if step != expected:
                return True
            expected *= size
        return False


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype | None:
    """Return `torch.float32` for "float32"; None if torch has no dtype of this name."""
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def storable(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` detached and with conjugate and negative bits resolved; raise for what has no plain strided bytes."""
    if not isinstance(tensor, torch.Tensor):
        raise UnsupportedTensorError(f"expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device.type == "meta":
        raise UnsupportedTensorError("a tensor on the meta device has no data to store")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise UnsupportedTensorError(
            f"only strided tensors can be stored, got layout {tensor.layout}, dtype {tensor.dtype}; "
            "convert it first (.to_dense(), .dequantize())"
        )
    if hasattr(tensor, "__tensor_flatten__"):
        raise UnsupportedTensorError(
            f"{type(tensor).__name__} is made of several inner tensors and has no bytes of its own; store its inner tensors"
        )
    return tensor.detach().resolve_conj().resolve_neg()


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes that `tensor` spans as a 1-D uint8 tensor sharing its memory; works for every dtype."""
    offset = tensor.storage_offset() * tensor.dtype.itemsize
    nbytes = tensor.nbytes if tensor.is_contiguous() else TensorSpec.of(tensor).nbytes
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage(), offset, (nbytes,), (1,))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes that `tensor` spans, to be read: its own memory, or a copy if it lies elsewhere than in RAM."""
    return raw_bytes(tensor).cpu().numpy().data


def typed_view(raw: torch.Tensor, spec: TensorSpec, offset: int = 0) -> torch.Tensor:
    """Return a tensor of `spec` over the memory of the uint8 tensor `raw`, `offset` elements from its start.

    The result is not an autograd view of `raw`; the byte address must be a multiple of the element size.
    """
    start = raw.storage_offset() // spec.dtype.itemsize + offset
    return torch.empty(0, dtype=spec.dtype, device=raw.device).set_(raw.untyped_storage(), start, spec.shape, spec.stride)
