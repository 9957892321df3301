"""Module scopes: for the length of a module's call, reading its parameters gives plain resident tensors.

[Note: two ways to the bytes]
A TieredTensor is always right, and pays for it at every operation. Without gradients nothing is saved for backward, so a
module that is being called may as well hold plain tensors: the scope leases each parameter when it is first read and
gives all of them back when the call ends. It does so only while enough of the budget stays free of leases for the
largest single operation; else, and whenever gradients are on, the TieredTensor itself is handed out. What stays resident
is soon read without a lease (see `handout`), so that a call of its module only notes that it was used.

A scope is entered through `module._compiled_call_impl`, which `Module.__call__` looks up, which copies and pickles leave
out by themselves, and which dynamo steps over: inside a compiled block there are no scopes, and graphs take TieredTensors
as inputs.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import is_grad_enabled

from tierstore.errors import ModelError
from tierstore.patch.buffers import BufferCopies, ScopedBuffers, copied_for_calls
from tierstore.patch.handout import ReadableParameter, ResidentParameter, resident_parameter
from tierstore.patch.lookup import may_be_looked_up
from tierstore.patch.pressure import Pressure
from tierstore.patch.stored import StoredSource
from tierstore.patch.tensor import TieredTensor
from tierstore.shield import observed
from tierstore.writing import Moves

_MOST_NOTED = 512  # uses without a lease that are told to the policy at once


class Room(Protocol):
    """What a scope asks its session: the mover of its store, how many bytes leases must leave free, and what to tell of its calls."""

    @property
    def moves(self) -> Moves: ...
    @property
    def headroom(self) -> int: ...
    @property
    def pressure(self) -> Pressure: ...


class Scope:
    """The calls that are inside one module now, at most one frame a thread (a re-entrant call shares the outer one).

    `inside` has the threads of these calls, each with its frame once it has leased something.
    """

    def __init__(self, module: torch.nn.Module, room: Room) -> None:
        self.inside: dict[int, Frame | None] = {}
        self.noted = room.moves.noted
        self.computing = room.moves.engine.computing
        self.copies_buffers = False
        self._module = weakref.ref(module)
        self._room = room

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._module()._call_impl  # type: ignore[union-attr]
        if (is_grad_enabled() and not self.copies_buffers) or observed():
            return call(*args, **kwargs)
        thread, inside = get_ident(), self.inside
        if thread in inside:
            return call(*args, **kwargs)
        inside[thread] = None
        try:
            return call(*args, **kwargs)
        finally:
            frame = inside.pop(thread)
            if frame is not None:
                frame.close()
            elif len(self.noted) > _MOST_NOTED:
                with self._room.moves.lock:
                    self._room.moves.catch_up()
                self._room.pressure.look()

    def read(self, value: TieredTensor, neighbours: Iterable[object]) -> torch.Tensor:
        """Return the plain tensor of `value` if it can be leased for this thread's call, else `value`."""
        return self._frame().hand_out(value, neighbours)

    def copies(self) -> BufferCopies | None:
        """Return the buffers of this thread's call; None outside of one, and where somebody looks at each operation."""
        return None if get_ident() not in self.inside or observed() else self._frame().copies

    def _frame(self) -> Frame:
        thread = get_ident()
        frame = self.inside[thread]
        if frame is None:
            frame = self.inside[thread] = Frame(self._room)
        return frame


class Frame:
    """The leases of one call, and what was handed out under them; and its buffers."""

    __slots__ = ("_moves", "_plain", "_room", "_sources", "copies")

    def __init__(self, room: Room) -> None:
        self.copies = BufferCopies()
        self._room = room
        self._moves = room.moves
        self._plain: dict[int, ResidentParameter] = {}  # by the id of the TieredTensor
        self._sources: list[StoredSource] = []  # in the same order

    def hand_out(self, value: TieredTensor, neighbours: Iterable[object]) -> torch.Tensor:
        """Lease `value`'s entry and return the plain tensor in its place; `value` itself where that cannot be.

        The first read leases what else of the module is resident, `neighbours`, in the same turn of the lock.
        """
        plain = self._plain.get(id(value))
        if plain is not None:
            return plain if plain.requires_grad == value.requires_grad else value
        source = self._source_behind(value)
        if source is None or may_be_looked_up(source):
            return value  # what is done with it may need a few rows only, which is no reason to keep it
        with self._moves.lock:
            if not self._lease(source):
                return value
            plain = self._show(source, value)
            if len(self._plain) == 1:
                self._lease_resident(neighbours)
        return plain

    def _lease(self, source: StoredSource) -> bool:
        """Lease what holds a value; False if that cannot be now. Whoever meets the TieredTensor instead makes room in memory for it."""
        moves, headroom, entries = self._moves, self._room.headroom, source.stored
        if moves.lease_resident(entries, headroom):
            return True
        try:
            return moves.acquire(entries, "a module scope", headroom=headroom, wait=False)
        except torch.OutOfMemoryError:
            return False

    def _lease_resident(self, values: Iterable[object]) -> None:
        for value in values:
            if type(value) is not TieredTensor or id(value) in self._plain or value._kept is not None:
                continue
            source = self._source_behind(value)
            if source is None or len(source.stored) > 1:
                continue
            if self._moves.lease_resident(source.stored, self._room.headroom):
                self._show(source, value)

    def _source_behind(self, value: TieredTensor) -> StoredSource | None:
        """Return the source that `value` shows as a whole; None where no plain tensor can stand in its place, or another store has it."""
        source = value._source
        if value._whole and isinstance(source, StoredSource) and source.settled is None and not source.has_pending_copies:
            host: object = source.host
            return source if host is self._room else None
        return None

    def _show(self, source: StoredSource, value: TieredTensor) -> ResidentParameter:
        handout = source.stored[0].handout
        kept = handout.stands_for(value) if isinstance(handout, ReadableParameter) else None
        if kept is None:
            for entry in source.stored:
                if entry.handout is None:
                    self._moves.refresh(entry)
                else:
                    self._moves.withdraw(entry)
        plain = self._plain[id(value)] = resident_parameter(source, value) if kept is None else kept
        self._sources.append(source)
        return plain

    def close(self) -> None:
        """Record what was written in place and give the leases back."""
        try:
            self.copies.write_back()
        finally:
            self._give_back()

    def _give_back(self) -> None:
        if not self._sources:
            return
        moves = self._moves
        with moves.lock:
            for source, identity in zip(self._sources, list(self._plain), strict=True):
                for entry in source.stored:
                    moves.refresh(entry)
                self._keep(ReadableParameter(self._plain.pop(identity), source))  # or it would live on when it has to leave
            moves.release(entry for source in self._sources for entry in source.stored)
            moves.pump()
        self._room.pressure.tick()

    def _keep(self, handout: ReadableParameter) -> None:
        """Hand the plain tensor out for good from its second call on, in one stay in the fast tier, if nobody has it now.

        What is streamed is used once, and then keeping it would only scatter small objects over the heap.
        """
        moves, entries = self._moves, handout.entries
        again = all(entry.shown for entry in entries)
        for entry in entries:
            entry.shown = True
        if not again or any(entry.handout is not None for entry in entries):
            return
        if moves.may_hand_out(sum(entry.nbytes for entry in entries), self._room.headroom) and not handout.used():
            moves.hand_out(handout)
            handout.give()


class ScopedParameters(dict[str, Any]):
    """A module's `_parameters`: reading one by name inside a scope gives the plain tensor, iterating moves nothing."""

    def __init__(self, original: dict[str, torch.nn.Parameter | None], scope: Scope) -> None:
        super().__init__(original)
        self.original = original
        self.scope = scope

    def __getitem__(self, name: str) -> Any:
        value = dict.__getitem__(self, name)
        scope = self.scope
        if not scope.inside or type(value) is not TieredTensor or is_grad_enabled() or observed():
            return value  # a Parameter subclass stays wrapped too: readers may test for its class
        if get_ident() not in scope.inside:
            return value
        plain: ResidentParameter | None = value._kept
        if plain is None:
            return scope.read(value, self.values())
        scope.noted.extend(plain._keys)
        scope.computing()  # while `plain` keeps the bytes from leaving
        return plain

    def __setitem__(self, name: str, value: Any) -> None:
        behind = value.tiered if isinstance(value, ResidentParameter) else None
        if isinstance(value, torch.Tensor) and value.is_meta and _has_bytes(self.get(name)):
            raise ModelError(f"{name!r} is under tiered() and cannot be emptied: turn off what offloads weights itself inside the `with`")
        dict.__setitem__(self, name, value if behind is None else behind)

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self.items()), memo)


def _has_bytes(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta


def install_scope(module: torch.nn.Module, room: Room) -> None:
    """Give `module` a scope, unless it compiled its own call or has nothing to read."""
    scope = module._compiled_call_impl
    if scope is None and (module._parameters or module._buffers):
        scope = module.__dict__["_compiled_call_impl"] = Scope(module, room)
    if not isinstance(scope, Scope):
        return
    if module._parameters and not isinstance(module._parameters, ScopedParameters):
        module.__dict__["_parameters"] = ScopedParameters(module._parameters, scope)
    if any(map(copied_for_calls, module._buffers.values())) and not isinstance(module._buffers, ScopedBuffers):
        scope.copies_buffers = True
        module.__dict__["_buffers"] = ScopedBuffers(module._buffers, scope)


def remove_scope(module: torch.nn.Module) -> None:
    """Put the module's own dicts back, with the entries as they are now."""
    for name in ("_parameters", "_buffers"):
        scoped = module.__dict__[name]
        if isinstance(scoped, ScopedParameters | ScopedBuffers):
            original = scoped.original
            original.clear()
            original.update(scoped.items())
            module.__dict__[name] = original
    if isinstance(module._compiled_call_impl, Scope):
        del module.__dict__["_compiled_call_impl"]
