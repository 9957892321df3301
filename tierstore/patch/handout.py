"""Plain tensors over resident bytes, and how long readers may use them without asking.

[Note: a reference is the lease]
A read of a weight that stays resident should cost next to nothing. So from its second read on, in one stay in the fast
tier, the same plain tensor is handed out without a lock or a lease. Before the bytes leave, it is taken out of reach, and
then its references are counted: those of Python, those of autograd to the tensor, and those of other tensors (views) to
its storage. Is there one more than our own, somebody still uses it; it is put back, and something else has to leave. So
what is in use never moves, and nobody writes to bytes that are not the store's any more. Writes in place are seen by
torch's own count of them. How many bytes may be handed out at once is limited, so that fetches and operations always find
room that is not.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from operator import gt
from typing import cast

import torch

from tierstore.entry import Entry
from tierstore.patch.references import references
from tierstore.patch.stored import StoredSource
from tierstore.patch.swap import own_attributes
from tierstore.patch.tensor import TieredTensor


class Tie:
    """Leads to a TieredTensor, which keeps it: torch swaps no tensor, as `module.to` asks it to, to which something refers weakly."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: TieredTensor) -> None:
        self.tensor = tensor

    @classmethod
    def to(cls, tensor: TieredTensor) -> Tie:
        if tensor._tie is None:
            tensor._tie = cls(tensor)
        return cast(Tie, tensor._tie)


class ResidentParameter(torch.nn.Parameter):
    """A parameter over resident bytes. `.data`, whose writes leave no trace, leads to the TieredTensor instead."""

    _tiered: weakref.ref[Tie]
    _keys: list[str]

    @property
    def tiered(self) -> TieredTensor | None:
        """The TieredTensor that this one stands for, as long as it exists."""
        tie = self._tiered()
        return None if tie is None else tie.tensor

    @property
    def data(self) -> torch.Tensor:
        return super().data if self.tiered is None else self.tiered.data

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if self.tiered is None:
            torch.nn.Parameter.data.__set__(self, value)  # type: ignore[attr-defined]
        else:
            self.tiered.data = value


def resident_parameter(source: StoredSource, value: TieredTensor) -> ResidentParameter:
    """Return a plain Parameter over the resident bytes of `source`, which `value` shows as a whole.

    It must not be a view and must have the same `requires_grad`: `matmul` folds differently otherwise, and the last bit
    changes.
    """
    plain = _plain_over(source.read(), requires_grad=value.requires_grad)
    plain.__dict__.update(own_attributes(value))
    plain._tiered, plain._keys = weakref.ref(Tie.to(value)), source.keys
    return plain


def _plain_over(tensor: torch.Tensor, *, requires_grad: bool) -> ResidentParameter:
    if not torch.is_inference_mode_enabled():
        return torch.Tensor._make_subclass(ResidentParameter, tensor, requires_grad)
    with torch.inference_mode(False):
        return torch.Tensor._make_subclass(ResidentParameter, tensor, requires_grad)


class ReadableParameter:
    """A `Handout`: reads of one TieredTensor find `plain` as its `_kept`, without a lease."""

    def __init__(self, plain: ResidentParameter, source: StoredSource) -> None:
        self._plain = plain
        self._tensors = source.tensors
        self.entries: Sequence[Entry] = source.stored

    def stands_for(self, value: TieredTensor) -> ResidentParameter | None:
        """Return the plain tensor if it is that of `value` as it is now."""
        same = self._plain.tiered is value and self._plain.requires_grad == value.requires_grad
        return self._plain if same else None

    def give(self) -> None:
        """Let readers have it, as long as it stands for the TieredTensor as that is."""
        value = self._plain.tiered
        if value is not None:
            value._kept = self.stands_for(value)

    def withdraw(self) -> bool:
        self.forget()
        if self.used():
            self.give()
            return False
        return True

    def forget(self) -> None:
        value = self._plain.tiered
        if value is not None:
            value._kept = None

    def used(self) -> bool:
        """True if anybody has the plain tensor or a view of it; to be asked while readers cannot get it."""
        return any(map(gt, references(self._plain), _our_references(self._tensors)))


class _Unused:
    """Refers to a plain tensor as a `ReadableParameter` does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._plain = _plain_over(tensor, requires_grad=False)


@functools.cache
def _our_references(tensors: int) -> tuple[int, ...]:
    """Return the counts of a handout that nobody uses, over memory that `tensors` of the store's own refer to.

    Measured, since releases of Python and torch may differ.
    """
    resident = [torch.zeros(1)]
    resident += [resident[0].detach() for _ in range(tensors - 1)]
    unused = _Unused(resident[0])
    return references(unused._plain)
