"""How fast memory is copied, how fast a device is filled from it, and how fast weights are computed with; measured shortly."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from functools import partial

import torch

from tierstore.backend import MemoryBackend
from tierstore.errors import BackendError, TierStoreError
from tierstore.registry import open_backend
from tierstore.spec import TensorSpec

_NBYTES = 64 << 20
_WIDTH = 4096  # of a weight that one token meets
_SECONDS = 0.3
_COMPUTED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def copy_speed() -> float:
    """Return bytes per second that are copied from one place in RAM to another."""
    source, target = (torch.zeros(_NBYTES, dtype=torch.uint8, device="cpu") for _ in range(2))
    return _NBYTES / _seconds(lambda: target.copy_(source), torch.device("cpu"))


def upload_speed(device: torch.device) -> float:
    """Return bytes per second from page-locked memory to an accelerator; raise `BackendError` if no such memory can be had."""
    try:
        with closing(open_backend("pinned")) as pinned:
            assert isinstance(pinned, MemoryBackend)
            source = pinned.allocate("measured", TensorSpec(torch.uint8, (_NBYTES,), (1,)))
            source.zero_()
            target = torch.empty(_NBYTES, dtype=torch.uint8, device=device)
            return _NBYTES / _seconds(partial(target.copy_, source, non_blocking=True), device)
    except (RuntimeError, MemoryError, OSError, TierStoreError) as error:
        raise BackendError(f"{device} cannot be measured: {error}") from error


def weight_speed(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return bytes of weights per second through which one token is computed: what a decode step costs at least.

    Other dtypes than the usual floating ones are computed as bfloat16.
    """
    dtype = dtype if dtype in _COMPUTED else torch.bfloat16
    rows = _NBYTES // _WIDTH // dtype.itemsize
    weight, token = torch.zeros(rows, _WIDTH, dtype=dtype, device=device), torch.ones(1, _WIDTH, dtype=dtype, device=device)
    with torch.no_grad():
        return weight.nbytes / _seconds(lambda: torch.nn.functional.linear(token, weight), device)


def _seconds(act: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds that `act` took, of as many runs as fit into a short time, at least two after a first one."""
    _timed(act, device)
    best, started = min(_timed(act, device), _timed(act, device)), time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        best = min(best, _timed(act, device))
    return max(best, 1e-9)


def _timed(act: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    act()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started
