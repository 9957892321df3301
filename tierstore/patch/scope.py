"""Module scopes: for the length of a module's call, reading its parameters gives plain resident tensors.

[Note: two ways to the bytes]
A TieredTensor is always right, and pays for it at every operation. Without gradients nothing is saved for backward, so a
module that is being called may as well hold plain tensors: the scope leases each parameter when it is first read and
gives all of them back when the call ends. It does so only while enough of the budget stays free of leases for the
largest single operation; else, and whenever gradients are on, the TieredTensor itself is handed out.

A scope is entered through `module._compiled_call_impl`, which `Module.__call__` looks up, which copies and pickles leave
out by themselves, and which dynamo steps over: inside a compiled block there are no scopes, and graphs take TieredTensors
as inputs.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from tierstore.entry import Entry
from tierstore.patch.lookup import LARGE
from tierstore.patch.source import EntrySource
from tierstore.patch.swap import own_attributes
from tierstore.patch.tensor import TieredTensor
from tierstore.writing import Moves


class Room(Protocol):
    """What a scope asks its session: the mover of its store, and how many bytes leases must leave free."""

    @property
    def moves(self) -> Moves: ...
    @property
    def headroom(self) -> int: ...


class Scope:
    """The calls that are inside one module now, at most one frame a thread (a re-entrant call shares the outer one)."""

    def __init__(self, module: torch.nn.Module, room: Room) -> None:
        self._module = weakref.ref(module)
        self._room = room
        self._frames: dict[int, Frame] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        assert module is not None
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        thread = threading.get_ident()
        if thread in self._frames:
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        frame = self._frames[thread] = Frame(self._room)
        try:
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            del self._frames[thread]
            frame.close()

    def read(self, value: TieredTensor, neighbours: Iterable[object]) -> torch.Tensor:
        """Return what a reader of the attribute gets now: a plain tensor inside a call of this thread, else `value`."""
        frame = self._frames.get(threading.get_ident())
        return value if frame is None else frame.hand_out(value, neighbours)


class Frame:
    """The leases of one call, and what was handed out under them."""

    __slots__ = ("_entries", "_plain", "_room", "_versions")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._plain: dict[int, ResidentParameter] = {}  # by the id of the TieredTensor
        self._entries: list[Entry] = []
        self._versions: list[int] = []

    def hand_out(self, value: TieredTensor, neighbours: Iterable[object]) -> torch.Tensor:
        """Lease `value`'s entry and return the plain tensor in its place; `value` itself where that cannot be.

        The first read leases what else of the module is resident, `neighbours`, in the same turn of the lock.
        """
        plain = self._plain.get(id(value))
        if plain is not None:
            return plain if plain.requires_grad == value.requires_grad else value
        entry = _entry_behind(value)
        if entry is None or (not entry.resident and entry.looked_up is not False and entry.nbytes >= LARGE):
            return value  # what is done with it may need a few rows only
        room = self._room
        moves = room.moves
        with moves.lock:
            resident = moves.lease_resident(entry, room.headroom)
            if not resident and not moves.acquire([entry], "a module scope", headroom=room.headroom, wait=False):
                return value
            plain = self._note(entry, value)
            if len(self._entries) == 1:
                self._lease_resident(neighbours)
        return plain

    def _lease_resident(self, values: Iterable[object]) -> None:
        for value in values:
            if type(value) is TieredTensor and id(value) not in self._plain:
                entry = _entry_behind(value)
                if entry is not None and self._room.moves.lease_resident(entry, self._room.headroom):
                    self._note(entry, value)

    def _note(self, entry: Entry, value: TieredTensor) -> ResidentParameter:
        plain = self._plain[id(value)] = _plain_of(entry, value)
        self._entries.append(entry)
        self._versions.append(plain._version)
        return plain

    def close(self) -> None:
        """Record what was written in place and give the leases back."""
        if not self._entries:
            return
        moves = self._room.moves
        with moves.lock:
            plain: ResidentParameter | None
            for entry, plain, version in zip(self._entries, self._plain.values(), self._versions, strict=True):
                if plain._version != version:
                    plain._tiered._source.forget_snapshot()
                    moves.outdate(entry)
            moves.release(self._entries)
            plain = None
            self._plain.clear()  # or what leaves now would live on, and the new value beside it
            moves.pump()


def _entry_behind(value: TieredTensor) -> Entry | None:
    """Return the entry that `value` shows as a whole; None where a plain tensor cannot stand in its place."""
    source = value._source
    if value._whole and type(source) is EntrySource and source.settled is None and not source.has_pending_copies:
        return source.entry
    return None


class ResidentParameter(torch.nn.Parameter):
    """A parameter over resident bytes. `.data`, whose writes leave no trace, leads to the TieredTensor instead."""

    _tiered: TieredTensor

    @property
    def data(self) -> torch.Tensor:
        return self._tiered.data

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self._tiered.data = value


def _plain_of(entry: Entry, value: TieredTensor) -> ResidentParameter:
    """Return the plain Parameter over the resident bytes; kept for later from its second use in one stay in the fast tier.

    What is streamed is used once, and then keeping it would only scatter small objects over the heap.
    It must not be a view and must have the same `requires_grad`: `matmul` folds differently otherwise, and the last bit
    changes.
    """
    cached = entry.derived
    if isinstance(cached, ResidentParameter) and cached._tiered is value and cached.requires_grad == value.requires_grad:
        return cached
    assert entry.tensor is not None
    with torch.inference_mode(False):
        plain: ResidentParameter = torch.Tensor._make_subclass(ResidentParameter, entry.tensor, value.requires_grad)
    plain.__dict__.update(own_attributes(value))
    plain._tiered = value
    entry.derived = True if entry.derived is None else plain
    return plain


class ScopedParameters(dict[str, Any]):
    """A module's `_parameters`: reading one by name inside a scope gives the plain tensor, iterating moves nothing."""

    def __init__(self, original: dict[str, torch.nn.Parameter | None], scope: Scope) -> None:
        super().__init__(original)
        self.original = original
        self.scope = scope

    def __getitem__(self, name: str) -> Any:
        value = dict.__getitem__(self, name)
        if type(value) is not TieredTensor or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return value  # a Parameter subclass stays wrapped too: readers may test for its class
        return self.scope.read(value, self.values())

    def __setitem__(self, name: str, value: Any) -> None:
        dict.__setitem__(self, name, value._tiered if isinstance(value, ResidentParameter) else value)

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self.items()), memo)


def install_scope(module: torch.nn.Module, room: Room) -> None:
    """Give `module` a scope, unless it compiled its own call."""
    if module._compiled_call_impl is not None or isinstance(module._parameters, ScopedParameters) or not module._parameters:
        return
    scope = Scope(module, room)
    module.__dict__["_parameters"] = ScopedParameters(module._parameters, scope)
    module.__dict__["_compiled_call_impl"] = scope


def remove_scope(module: torch.nn.Module) -> None:
    """Put the module's own dict back, with the entries as they are now."""
    scoped = module._parameters
    if isinstance(scoped, ScopedParameters):
        original = scoped.original
        original.clear()
        original.update(scoped.items())
        module.__dict__["_parameters"] = original
    if isinstance(module._compiled_call_impl, Scope):
        del module.__dict__["_compiled_call_impl"]
