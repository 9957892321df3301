"""Keeps every use of device memory in an order that the device knows, without a thread that waits.

[Note: why no copy meets a computation]
Memory of the device comes from torch's allocator, from the pool of the stream that computes: the owner of the memory.
When the last tensor over a block is gone, the allocator gives the block to whoever asks next, at once, because on the
owner whatever is put in later also runs later. So weights and activations share memory without a copy or a wait. What
is left to do is to bring everything else that touches such a block into the owner's order:

1. A copy into new memory. Whatever used the block before was put into the owner before the block was given back, and
   that was before it was handed out again. A mark set on the owner after the allocation is therefore behind all of it,
   and the stream that copies waits for that mark.
2. A computation with what was copied. A mark behind the copy travels with the value; whoever leases the value lets its
   own current stream wait for it.
3. A computation on another stream than the owner. Every stream that ever computed with a value is remembered. When a
   value leaves, the owner waits for a mark set on each of them at that moment: the leases have ended, so all they put in
   is before their marks, and whoever gets the block is behind the owner's wait.
4. A value that leaves before anybody waited for its copy. The owner waits for the mark behind the copy.
5. A copy down to RAM. The stream that copies down waits for a mark on each stream that computes, any of which may have
   written to the value, and for the mark behind the copy that filled it. The host waits for its end: it reads the bytes.
6. Memory in RAM that a copy reads, or a slab. Hosts know no streams: it is referred to until the mark has been passed.
7. Memory that somebody else allocated and the store took over. Its owner is not known; the allocator is told of every
   stream that may have used it (`record_stream`), which is needed for nothing else.

What this cannot see is a side stream under which nothing was ever read through the store: a weight read on one stream
and used on another one. A tensor from `get` that is kept after it left is under torch's own rules too.
"""

from __future__ import annotations

import threading

import torch

from tierstore.backend import MemoryBackend
from tierstore.spec import TensorSpec
from tierstore.transfer.accelerator import Accelerator, Stream


class StreamOrder:
    """The streams that compute, and which of them owns the memory of each value.

    Safe to call from several threads; its lock is never held while something is put into a stream.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._lock = threading.Lock()
        self._latest = accelerator.current()
        self._seen = [self._latest]
        self._owners: dict[int, Stream] = {}  # by the address of the memory

    def note(self) -> Stream:
        """Remember the current stream of this thread as one that computes; new memory is the latest one's."""
        stream = self._accelerator.current()
        if stream is not self._latest:
            with self._lock:
                self._latest = stream
                if not any(stream is other for other in self._seen):
                    self._seen.append(stream)
        return stream

    def allocate(self, target: MemoryBackend, key: str, spec: TensorSpec) -> tuple[torch.Tensor, Stream]:
        """Return memory for the value of `key`, and its owner; whoever fills it on another stream waits for a mark on the owner first."""
        owner = self._latest
        with self._accelerator.on(owner):
            memory = target.allocate(key, spec)
        self.own(memory, owner)
        return memory, owner

    def own(self, memory: torch.Tensor, owner: Stream) -> None:
        """Take note that `memory` was allocated on `owner`."""
        with self._lock:
            self._owners[_address(memory)] = owner  # empty ones share the address 0, and nothing depends on theirs

    def part(self, memory: torch.Tensor) -> None:
        """Order what comes after `memory`, which its owner is about to get back, behind all computations so far."""
        if not memory.numel():
            return
        with self._lock:
            owner = self._owners.pop(_address(memory), None)
        if owner is not None:
            self.join(owner)
            return
        for stream in tuple(self._seen):
            self._accelerator.share(memory, stream)

    def forget(self, memory: torch.Tensor) -> None:
        """The same for memory that no computation has used, and no copy uses any more."""
        with self._lock:
            self._owners.pop(_address(memory), None)

    def join(self, stream: Stream) -> None:
        """Let `stream` wait for all computations so far."""
        for other in tuple(self._seen):
            if other is not stream:
                stream.wait(other.record())

    def close(self) -> None:
        """Let every stream wait for all others: what is given back from now on may have been used by any of them."""
        for stream in tuple(self._seen):
            self.join(stream)


def _address(memory: torch.Tensor) -> int:
    return memory.untyped_storage().data_ptr()
