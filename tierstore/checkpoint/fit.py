"""How well a checkpoint fits a model: what is missing, too much, or of another shape."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch

from tierstore.backend import SourceBackend
from tierstore.errors import CheckpointError

_SHOWN = 20  # names of one kind in a message


class Fit:
    """Collects differences between the model called `model` and `source`, and reports all of them at once."""

    def __init__(self, model: str, source: SourceBackend) -> None:
        self._what = f"{source} does not fit {model}"
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self._buffers: list[str] = []
        self._mismatched: dict[str, str] = {}

    def mismatched(self, name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
        """Note a tensor of another shape."""
        self._mismatched[name] = f"{name}: {tuple(found)} in the checkpoint, {tuple(wanted)} in the model"

    def lacking(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Note tensors that have no value, neither here nor of their own."""
        for name, tensor in tensors:
            if name in self._mismatched or name in self.missing:
                continue
            (self.missing if isinstance(tensor, torch.nn.Parameter) else self._buffers).append(name)

    def report(self, *, strict: bool = True) -> None:
        """Raise `CheckpointError` for values that have another shape or, if `strict`, are missing; warn of those that nothing needs."""
        lines = []
        if self.missing and strict:
            lines.append(f"missing ({len(self.missing)}): {_list(self.missing)}")
        if self._mismatched:
            lines.append(f"of another shape ({len(self._mismatched)}): {_list(list(self._mismatched.values()), '; ')}")
        if self._buffers:
            lines.append(
                f"buffers on the meta device that it has no value for ({len(self._buffers)}): {_list(self._buffers)}; "
                "build the model under tierstore.on_meta(), which keeps buffers real, or register them again with real values"
            )
        if lines:
            if self.unexpected:
                lines.append(f"not in the model ({len(self.unexpected)}): {_list(self.unexpected)}")
            raise CheckpointError(
                "\n  ".join([f"{self._what}:", *lines]),
                missing=[*self.missing, *self._buffers], unexpected=self.unexpected, mismatched=list(self._mismatched),
            )  # fmt: skip
        if self.unexpected:
            warnings.warn(f"{self._what} in all: not in the model ({len(self.unexpected)}): {_list(self.unexpected)}", stacklevel=2)


def _list(names: Sequence[str], separator: str = ", ") -> str:
    return separator.join(names[:_SHOWN]) + (f"{separator}..." if len(names) > _SHOWN else "")
