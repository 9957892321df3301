"""Keeps the store's own work out of what a caller records, and tells whether anything does."""

from __future__ import annotations

from types import TracebackType

import torch
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling


def observed() -> bool:
    """True where operations are more than done: in a compiler, a TorchScript trace or a functorch transform, under a dispatch mode."""
    return is_compiling() or _get_tracing_state() is not None or peek_interpreter_stack() is not None or _len_torch_dispatch_stack() > 0


class shielded:  # noqa: N801  (read like the function that it would be, if each copy did not pass through it)
    """Run without the caller's dispatch modes (a compiler's fake tensors, a FLOP counter) and outside a TorchScript trace."""

    __slots__ = ("_modes", "_trace")

    def __enter__(self) -> None:
        self._trace = _get_tracing_state()
        if self._trace is not None:
            torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        self._modes = torch._C._DisableTorchDispatch()
        self._modes.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._modes.__exit__(kind, error, trace)
        if self._trace is not None:
            torch._C._set_tracing_state(self._trace)  # type: ignore[attr-defined]
