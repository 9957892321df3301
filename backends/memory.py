"""Memory of a torch device: each value its own storage; large ones in RAM from recycled huge pages."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch

from tierstore.backend import MemoryBackend
from tierstore.backends._arena import Arena
from tierstore.backends._pinned import Locking, PageLockError, PinnedArena, cuda_locking
from tierstore.devices import working_accelerator
from tierstore.spec import TensorSpec, raw_bytes, typed_view

_LARGE = 1 << 20  # bytes from which a value comes from the arena, whose rounding to 4 KiB would be too much for small ones


class DeviceBackend(MemoryBackend):
    """Keeps tensors in the memory of `device` (a name such as "cuda" or "cpu", or a `torch.device`)."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = _with_index(torch.device(device))
        self._tensors: dict[str, torch.Tensor] = {}
        self._arena = Arena()

    def put(self, key: str, tensor: torch.Tensor) -> None:
        copy = self.allocate(key, TensorSpec.of(tensor))
        with torch.inference_mode(False), torch.no_grad():
            raw_bytes(copy).copy_(raw_bytes(tensor))
        self._tensors[key] = copy

    def allocate(self, key: str, spec: TensorSpec, phase: int = 0) -> torch.Tensor:
        # inference mode would mark the memory as an inference tensor, which training could not write to later
        with torch.inference_mode(False), torch.no_grad():
            return typed_view(self._allocate(spec.nbytes, phase), spec)

    def adopt(self, key: str, tensor: torch.Tensor) -> None:
        self._tensors[key] = tensor

    def get(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def delete(self, key: str) -> None:
        del self._tensors[key]

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        return ((key, TensorSpec.of(tensor)) for key, tensor in self._tensors.items())

    def trim(self) -> None:
        self._arena.trim()

    def close(self) -> None:
        self._tensors.clear()
        self._arena.trim()
        self._arena = Arena()  # without the old one, memory that callers still hold goes back when they let go

    def _allocate(self, nbytes: int, phase: int) -> torch.Tensor:
        if self.device.type == "cpu" and nbytes >= _LARGE:
            return self._arena.allocate(nbytes, phase)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)


class PinnedBackend(DeviceBackend):
    """Keeps tensors in page-locked RAM, from which an accelerator copies at full speed; plain RAM where there is none.

    `locking`: how pages are locked; by default CUDA's way, where CUDA works. Other accelerators get torch's own page-locked
    memory, which rounds up.
    """

    def __init__(self, locking: Locking | None = None) -> None:
        super().__init__("cpu")
        accelerator = working_accelerator()
        if locking is None and accelerator is not None and accelerator.type == "cuda":
            locking = cuda_locking()
        self._locking = locking
        self._pinned = None if locking is None else PinnedArena(locking)
        self._by_torch = accelerator is not None and locking is None

    def trim(self) -> None:
        super().trim()
        if self._pinned is not None:
            self._pinned.trim()

    def close(self) -> None:
        super().close()
        if self._pinned is not None and self._locking is not None:
            self._pinned.trim()
            self._pinned = PinnedArena(self._locking)

    def _allocate(self, nbytes: int, phase: int) -> torch.Tensor:
        if self._by_torch:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        if self._pinned is not None:
            try:
                return self._pinned.allocate(nbytes, phase)
            except PageLockError as error:
                self._pinned = None
                warnings.warn(
                    f"{error}; from now on this tier takes ordinary memory, from which copies to the accelerator pass through a buffer of "
                    "the driver at half the speed or less, each keeping a thread busy: allow more locked memory, or give the tier less",
                    stacklevel=2,
                )
        return super()._allocate(nbytes, phase)


def _with_index(device: torch.device) -> torch.device:
    """Return `device` with the index that it means now: in other threads, "cuda" could mean another one."""
    if device.type == "cpu" or device.index is not None or torch.accelerator.current_accelerator() != torch.device(device.type):
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())
