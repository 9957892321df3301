"""Keeps the store's own work out of what a caller records, and tells whether anything does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling


def observed() -> bool:
    """True where operations are more than done: in a compiler, a TorchScript trace or a functorch transform, under a dispatch mode."""
    return is_compiling() or _get_tracing_state() is not None or peek_interpreter_stack() is not None or _len_torch_dispatch_stack() > 0


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
