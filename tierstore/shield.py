"""Keeps the store's own work out of what a caller records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def shielded() -> Iterator[None]:
    """Run without the caller's dispatch modes (a compiler's fake tensors, a FLOP counter) and outside a TorchScript trace."""
    state = torch._C._get_tracing_state()
    if state is not None:
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with torch._C._DisableTorchDispatch():
            yield
    finally:
        if state is not None:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
