"""Memory of a torch device: plain allocations, each value its own storage."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tierstore.backend import MemoryBackend
from tierstore.devices import working_accelerator
from tierstore.spec import TensorSpec, raw_bytes, typed_view


class DeviceBackend(MemoryBackend):
    """Keeps tensors in the memory of `device` (a name such as "cuda" or "cpu", or a `torch.device`)."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._tensors: dict[str, torch.Tensor] = {}

    def put(self, key: str, tensor: torch.Tensor) -> None:
        spec = TensorSpec.of(tensor)
        # inference mode would mark the memory as an inference tensor, which training could not write to later
        with torch.inference_mode(False), torch.no_grad():
            copy = typed_view(self._allocate(spec.nbytes), spec)
            raw_bytes(copy).copy_(raw_bytes(tensor))
        self._tensors[key] = copy

    def adopt(self, key: str, tensor: torch.Tensor) -> None:
        self._tensors[key] = tensor

    def get(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def delete(self, key: str) -> None:
        del self._tensors[key]

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        return ((key, TensorSpec.of(tensor)) for key, tensor in self._tensors.items())

    def close(self) -> None:
        self._tensors.clear()

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)


class PinnedBackend(DeviceBackend):
    """Keeps tensors in page-locked RAM, from which an accelerator copies at full speed; plain RAM where there is none."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.pinned = working_accelerator() is not None

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
