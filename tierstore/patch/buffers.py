"""Small buffers as plain tensors for the length of their module's call, with and without gradients.

[Note: why copies]
Some of torch's kernels take another order of summation where an argument is a tensor subclass, so a class weight or a
running mean must be plain for the last bit to be the same. Buffers have no gradient, autograd may save them, and kernels
write to some of them without saying so in their schema. So a module gets a copy of its own, which is compared when the
call ends and written back if it differs. That is done only where it cannot be seen: for a small buffer that is bound
once, under one name. Larger ones, and those that several modules share, stay TieredTensors.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch

from tierstore.patch.swap import own_attributes
from tierstore.patch.tensor import TieredTensor
from tierstore.spec import raw_bytes


class BufferCopies:
    """The copies that one call of a module works with."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[TieredTensor, torch.Tensor, torch.Tensor]] = {}  # by the id of the TieredTensor

    def of(self, value: TieredTensor) -> torch.Tensor:
        """Return the copy that this call has of `value`; the first time it is made."""
        if id(value) not in self._copies:
            with torch.inference_mode(False), torch.no_grad():
                plain = value.plain().clone(memory_format=torch.preserve_format)
            plain.__dict__.update(own_attributes(value))
            plain._tiered = weakref.ref(value)  # type: ignore[attr-defined]
            self._copies[id(value)] = value, plain, raw_bytes(plain).clone()
        return self._copies[id(value)][1]

    def write_back(self) -> None:
        """Give what was written to the copies to the buffers themselves."""
        for value, plain, before in self._copies.values():
            if not torch.equal(raw_bytes(plain), before):
                with torch.inference_mode(False), torch.no_grad():
                    value.copy_(plain)
        self._copies.clear()


def copied_for_calls(value: torch.Tensor | None) -> bool:
    return type(value) is TieredTensor and value._copied


class ScopedBuffers(dict[str, Any]):
    """A module's `_buffers`: reading a small one by name inside a call gives that call's copy, iterating moves nothing."""

    def __init__(self, original: dict[str, torch.Tensor | None], scope: Any) -> None:
        super().__init__(original)
        self.original = original
        self.scope = scope

    def __getitem__(self, name: str) -> Any:
        value = dict.__getitem__(self, name)
        if not copied_for_calls(value):
            return value
        copies = self.scope.copies()
        return value if copies is None else copies.of(value)

    def __setitem__(self, name: str, value: Any) -> None:
        """A call that assigns its copy to the name it has anyway (`self.count += 1`) changes nothing but the copy."""
        old = self.get(name)
        dict.__setitem__(self, name, old if isinstance(old, TieredTensor) and _stands_for(value, old) else value)

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self.items()), memo)


def _stands_for(value: Any, old: TieredTensor) -> bool:
    behind = getattr(value, "_tiered", None)
    return behind is not None and behind() is old
