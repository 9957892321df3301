"""Backends over the memory of a `FakeDevice`, which record what the host reads and writes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tierstore.backend import MemoryBackend
from tierstore.spec import TensorSpec, raw_bytes, typed_view
from tierstore.testing.fake_device import FakeDevice
from tierstore.testing.faults import DictBackend


class FakeMemory(MemoryBackend):
    """Memory of the device: allocated on the current stream, and filled there by `put`."""

    def __init__(self, fake: FakeDevice) -> None:
        self.device = torch.device("cpu")
        self._fake = fake
        self._tensors: dict[str, torch.Tensor] = {}

    def allocate(self, key: str, spec: TensorSpec, phase: int = 0) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return typed_view(self._raw(spec.nbytes), spec)

    def _raw(self, nbytes: int) -> torch.Tensor:
        return self._fake.allocate(nbytes)

    def put(self, key: str, tensor: torch.Tensor) -> None:
        new = self.allocate(key, TensorSpec.of(tensor))
        with torch.inference_mode(False), torch.no_grad():
            self._fill(raw_bytes(new), raw_bytes(tensor))
        self._tensors[key] = new

    def _fill(self, memory: torch.Tensor, source: torch.Tensor) -> None:
        self._fake.copy(memory, source)

    def adopt(self, key: str, tensor: torch.Tensor) -> None:
        self._tensors[key] = tensor

    def get(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def delete(self, key: str) -> None:
        del self._tensors[key]

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        return ((key, TensorSpec.of(tensor)) for key, tensor in list(self._tensors.items()))

    def close(self) -> None:
        self._tensors.clear()


class FakeRam(FakeMemory):
    """Page-locked RAM, which the host reads and writes itself."""

    def _raw(self, nbytes: int) -> torch.Tensor:
        return self._fake.allocate_page_locked(nbytes)

    def _fill(self, memory: torch.Tensor, source: torch.Tensor) -> None:
        self._fake.touch(memory, "a value is put into RAM", writes=True)
        self._fake.touch(source, "the source of a put")
        memory.copy_(source)

    def adopt(self, key: str, tensor: torch.Tensor) -> None:
        self._fake.touch(tensor, f"{key} lies in RAM now")
        super().adopt(key, tensor)


class FakeSlow(DictBackend):
    """The plainest backend, far from the device: the host reads what it stores."""

    def __init__(self, fake: FakeDevice) -> None:
        super().__init__()
        self._fake = fake

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._fake.touch(tensor, f"{key} is written down")
        super().put(key, tensor)
