"""What a backend must give back: memory of values that are gone, and threads and descriptors when it is closed."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from tierstore.backend import Backend
from tierstore.testing.rules import require

_COUNT = 2
_SIZE = 33 << 20  # bytes; glibc gives so much back to the system at once, so what grows is kept by somebody
_DESCRIPTORS = Path("/proc/self/fd")
_MEMORY = Path("/proc/self/statm")


def check_release(make_backend: Callable[[], Backend]) -> None:
    """The first round shows what a library keeps for the whole process, and is not counted."""
    for counted in (False, True):
        before = _held()
        backend = make_backend()
        _turn_over(backend)
        resident = _resident_bytes()
        for _ in range(_COUNT if counted else 0):
            _turn_over(backend)
        grown = _resident_bytes() - resident
        detail = f"{grown} bytes more after {2 * _COUNT} values of {_SIZE} bytes were replaced or deleted"
        require(grown < _SIZE, "release", detail)
        backend.close()
        del backend
        gc.collect()
        left = _held() - before
        require(not counted or not left, "close", f"after close() these are left: {sorted(left)}")


def _turn_over(backend: Backend) -> None:
    """Let one value be replaced and then deleted."""
    for seed in (1, 2):
        backend.put("key", torch.full((_SIZE,), seed, dtype=torch.uint8))
        backend.get("key")
    backend.delete("key")


def _resident_bytes() -> int:
    """Return what the process has in memory and nowhere else; 0 where the system does not tell."""
    if not _MEMORY.exists():
        return 0
    _, resident, shared, *_ = map(int, _MEMORY.read_text().split())
    return (resident - shared) * 4096


def _held() -> set[str]:
    """Name the threads and the open files of this process."""
    threads = {f"thread {thread.name} ({thread.native_id})" for thread in threading.enumerate()}
    names = list(_DESCRIPTORS.iterdir()) if _DESCRIPTORS.exists() else []
    return threads | {f"file {name.name} ({name.readlink()})" for name in names if name.is_symlink()}
