"""The accelerator that torch has: CUDA and what follows its interface (ROCm, XPU)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType

import torch

from tierstore.transfer.accelerator import Accelerator, Event, Stream


class TorchEvent(Event):
    """A mark made by torch."""

    def __init__(self, event: torch.Event) -> None:
        self.event = event

    def passed(self) -> bool:
        return self.event.query()

    def synchronize(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, TorchEvent)
        return earlier.event.elapsed_time(self.event) / 1000  # from milliseconds


class TorchStream(Stream):
    """A stream of torch."""

    def __init__(self, module: ModuleType, stream: torch.Stream) -> None:
        self.stream = stream
        self._module = module

    def record(self) -> Event:
        # torch.Event cannot block, and a thread that waits for it keeps a core busy; torch.cuda's own can
        blocking = self.stream.device.type == "cuda"
        return self._recorded(self._module.Event(blocking=True) if blocking else self._module.Event())

    def record_timer(self) -> Event:
        return self._recorded(self._module.Event(enable_timing=True))

    def _recorded(self, event: torch.Event) -> Event:
        event.record(self.stream)
        return TorchEvent(event)

    def wait(self, event: Event) -> None:
        assert isinstance(event, TorchEvent)
        self.stream.wait_event(event.event)


class TorchAccelerator(Accelerator):
    """One device of torch, by its module (`torch.cuda`, `torch.xpu`).

    Not by `torch.Stream`, which remembers in itself what was current before, so that two threads cannot be in one at once.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.accelerator.current_device_index() if device.index is None else device.index
        self.device = torch.device(device.type, index)
        self._index = index
        self._module = torch.get_device_module(self.device)
        self._streams: dict[int, TorchStream] = {}  # by torch's number

    def current(self) -> Stream:
        number = torch.accelerator.current_stream(self._index).stream_id
        known = self._streams.get(number)
        return self._known(self._module.current_stream(self._index)) if known is None else known

    def new_stream(self) -> Stream:
        return self._known(self._module.Stream(self.device))

    def _known(self, stream: torch.Stream) -> Stream:
        return self._streams.setdefault(stream.stream_id, TorchStream(self._module, stream))

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        assert isinstance(stream, TorchStream)
        context: AbstractContextManager[None] = self._module.stream(stream.stream)
        return context

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def share(self, memory: torch.Tensor, stream: Stream) -> None:
        assert isinstance(stream, TorchStream)
        memory.record_stream(stream.stream)

    def page_locked(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.is_pinned()

    def allocate_page_locked(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def accelerator_of(device: torch.device) -> Accelerator | None:
    """Return `device` as an accelerator; None for the CPU, and for a device without streams of its own."""
    module = None if device.type in ("cpu", "meta") else getattr(torch, device.type, None)
    return TorchAccelerator(device) if hasattr(module, "current_stream") and hasattr(module, "Stream") else None
