"""Memory that is given out again at the first moment it is free, and backends over it."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch

POISON = 0xA5

_GRAIN = 64  # bytes; blocks are rounded up, so that every dtype is aligned
_ROOM = 1 << 28  # bytes of addresses; only what is used takes memory


class Pool:
    """Addresses that are handed out as tensors, full of poison, and come back when the last view of one is gone.

    What came back last is handed out first, to the same owner only, like memory of a stream. Out of `capacity`, it raises
    torch's `OutOfMemoryError`. Safe to call from several threads.
    """

    def __init__(self, capacity: int = 1 << 40) -> None:
        self.capacity = capacity
        self.allocated = 0
        self._room = np.empty(_ROOM, np.uint8)
        self._start = self._room.ctypes.data
        self._top = -self._start % _GRAIN
        self._free: dict[str, list[tuple[int, int]]] = {}  # by owner: (offset, bytes), the one to take first last
        self._lock = threading.RLock()

    def __contains__(self, address: int) -> bool:
        return self._start <= address < self._start + _ROOM

    def allocate(self, nbytes: int, owner: str) -> torch.Tensor:
        """Return a uint8 tensor of `nbytes` with a storage of its own."""
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        size = -(-nbytes // _GRAIN) * _GRAIN
        with self._lock:
            if self.allocated + nbytes > self.capacity:
                raise torch.OutOfMemoryError(f"{nbytes} bytes more than the {self.allocated} allocated of {self.capacity}")
            self.allocated += nbytes
            offset = self._take(size, self._free.setdefault(owner, []))
        token = self._room[offset : offset + nbytes]
        token[:] = POISON
        weakref.finalize(token, self._give_back, owner, offset, size, nbytes).atexit = False
        return torch.from_numpy(token)

    def _take(self, size: int, free: list[tuple[int, int]]) -> int:
        for index in reversed(range(len(free))):
            offset, found = free[index]
            if found >= size:
                free[index : index + 1] = [(offset + size, found - size)] if found > size else []
                return offset
        offset, self._top = self._top, self._top + size
        if self._top > _ROOM:
            raise MemoryError("the addresses of this pool are used up")
        return offset

    def _give_back(self, owner: str, offset: int, size: int, nbytes: int) -> None:
        with self._lock:
            self.allocated -= nbytes
            self._free[owner].append((offset, size))
