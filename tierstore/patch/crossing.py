"""Activations of a model on several devices: the operands of each operation are brought to one of them.

[Note: where an operation runs]
Weights stay where they are, so an operation with one runs there; if it has several, in the module that is being called or
where the largest is. One that writes into a tensor runs where that is, and indexing where the indexed tensor is. Everything
else, such as a residual, a mask or a rotary table that an earlier device made, is brought to the device of the innermost
module being called whose weights are all on one device; outside of those, to the one later in the chain. Operands move by
`.to()`, above autograd, so gradients flow back the same way. Tensors on other devices than those of the chain are left to
torch, and so are scalars in RAM.

Nothing is moved on entry to an inner module, whose arguments it may write into; only whole calls from outside have their
inputs brought to where the first weights are, and their outputs back to where the inputs were.

A torch function mode does this, which has torch's own modules leave their fused paths. So where one of them, with all that
it consists of, is torch's own, has its weights on one device and writes to no argument, its arguments are moved on entry and
the mode is off inside.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from tierstore.patch.scope import Room, Scope
from tierstore.patch.wrapper import Wrapper

_ANYWHERE = frozenset({
    torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.type_as, torch.Tensor.set_, torch.Tensor.backward,
    torch.Tensor.view_as, torch.Tensor.expand_as, torch.Tensor.reshape_as, torch.Tensor.is_set_to,
    torch.autograd.backward, torch.autograd.grad,
})  # fmt: skip
"""What takes tensors of several devices as it is, or needs no more than the shape of one of them."""
_INDEXING = ("__getitem__", "gather", "index_select", "take", "take_along_dim", "masked_select")
_AUGMENTED = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul")
)

Call = Callable[..., Any]


class Crossing:
    """Brings operands together while modules of one session are called; `devices` in the order of their shares.

    State belongs to threads: each one that calls a module has its own frame.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self.needed = len(set(devices)) > 1
        self._here = threading.local()

    def frame(self) -> Frame | None:
        """Return what this thread is inside of; None outside of all calls."""
        return getattr(self._here, "frame", None)

    def call(self, call: Call, places: Sequence[int], alone: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a module with weights at `places`, positions of devices; `alone`: it needs its arguments only, on one device."""
        frame = self.frame()
        if not self.needed or torch.compiler.is_compiling():
            return call(*args, **kwargs)
        if frame is None:
            return self._call_from_outside(call, places, alone, args, kwargs)
        device = frame.device
        if places:
            frame.device = self.devices[places[0]] if len(places) == 1 else None
        try:
            return self._run(frame, call, alone, args, kwargs)
        finally:
            frame.device = device

    def _call_from_outside(self, call: Call, places: Sequence[int], alone: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        frame = self._here.frame = Frame(self.devices)
        back = None
        try:
            if torch._C._current_graph_task_id() == -1:  # else a checkpoint computes a part of a pass again, for its gradients
                back = next((tensor.device for tensor in tensors_in((args, kwargs))), None)
                args, kwargs = moved((args, kwargs), partial(frame.to, device=self.devices[places[0] if places else 0]))
            if len(places) == 1:
                frame.device = self.devices[places[0]]
            with frame.mode:
                result = self._run(frame, call, alone, args, kwargs)
            return result if back is None else moved(result, partial(frame.to, device=back))
        finally:
            self._here.frame = None

    @staticmethod
    def _run(frame: Frame, call: Call, alone: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        if alone and frame.device is not None and torch.overrides._get_current_function_mode() is frame.mode:  # type: ignore[no-untyped-call]
            args, kwargs = moved((args, kwargs), partial(frame.bring, device=frame.device))
            with torch.overrides._pop_mode_temporarily():
                return call(*args, **kwargs)
        if not alone and not frame.active():
            with frame.mode:
                return call(*args, **kwargs)
        return call(*args, **kwargs)


class Frame:
    """One call from outside, in one thread: where the innermost module is, and copies of tensors that were moved."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.device: torch.device | None = None
        self.mode = _Together(self)
        self.rank = {device: number for number, device in enumerate(devices)}
        self._copies: dict[tuple[object, ...], _Copy] = {}

    def movable(self, tensor: torch.Tensor) -> bool:
        """True for what has to be with the other operands: torch takes scalars in RAM beside any, and complains of the rest itself."""
        return tensor.device in self.rank and not (tensor.dim() == 0 and tensor.device.type == "cpu")

    def bring(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return `tensor` where an operation on `device` can use it."""
        return self.to(tensor, device) if self.movable(tensor) else tensor

    def active(self) -> bool:
        """True while the mode sees the operations of this thread."""
        return any(mode is self.mode for mode in torch.overrides._get_current_function_mode_stack())  # type: ignore[no-untyped-call]

    def to(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return `tensor` on `device`; the same copy as before, if neither was written to since.

        A copy is kept as long as the tensor lives, and no longer than the call from outside takes; of weights, and in
        inference mode, where nobody counts writes, there is none.
        """
        if tensor.device == device:
            return tensor
        if isinstance(tensor, torch.nn.Parameter | Wrapper) or tensor.is_inference():
            return tensor.to(device)
        base = tensor if tensor.requires_grad or tensor._base is None else tensor._base  # views of a table are made for each layer anew
        layout = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        key = (id(base), layout, device, torch.is_grad_enabled())
        known = self._copies.get(key)
        if known is not None and known.source() is base and known.fresh(base):
            return known.copy
        copy = tensor.to(device)
        if not copy.is_inference():
            copies = self._copies
            end = weakref.ref(base, lambda _: copies.pop(key, None) and None)
            copies[key] = _Copy(end, base._version, copy, copy._version)
        return copy


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
    """A moved tensor, and torch's counts of writes to it and to what it was made from."""

    source: weakref.ref[torch.Tensor]
    version: int
    copy: torch.Tensor
    copy_version: int

    def fresh(self, source: torch.Tensor) -> bool:
        """True if neither was written to since."""
        return self.version == source._version and self.copy_version == self.copy._version


class _Together(TorchFunctionMode):
    """Brings the operands of every operation of one thread to one device."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self._frame = weakref.proxy(frame)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs is None:
            kwargs = {}
        if _on_one_device(args) and (not kwargs or _on_one_device((*args, *kwargs.values()))):
            return func(*args, **kwargs)
        frame: Frame = self._frame
        operands = [tensor for tensor in tensors_in((args, kwargs)) if frame.movable(tensor)]
        if len(operands) < 2 or len({tensor.device for tensor in operands}) < 2 or _goes_anywhere(func):
            return func(*args, **kwargs)
        device = self._target(func, args, kwargs, operands)
        args, kwargs = moved((args, kwargs), partial(frame.bring, device=device))
        return func(*args, **kwargs)

    def _target(self, func: Any, args: Any, kwargs: dict[str, Any], operands: list[torch.Tensor]) -> torch.device:
        written = _written(func, args, kwargs)
        if written is not None:
            return written.device
        frame: Frame = self._frame
        here = frame.device
        weights = [tensor for tensor in operands if isinstance(tensor, torch.nn.Parameter | Wrapper)]
        if weights:
            largest = max(weights, key=lambda tensor: tensor.nbytes)
            return here if here is not None and any(tensor.device == here for tensor in weights) else largest.device
        if getattr(func, "__name__", "") in _INDEXING and args and isinstance(args[0], torch.Tensor):
            return args[0].device
        return here or max((tensor.device for tensor in operands), key=frame.rank.__getitem__)


class CrossingScope(Scope):
    """A scope that also tells where its module is. `places`: the positions of the devices that have weights of it."""

    def __init__(self, module: torch.nn.Module, room: Room, crossing: Crossing, places: Sequence[int]) -> None:
        super().__init__(module, room)
        self._crossing = crossing
        self._places = places
        self._alone = len(places) == 1 and needs_arguments_only(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        alone = self._alone and self._crossing.needed and not _hooked(self._module())
        return self._crossing.call(super().__call__, self._places, alone, args, kwargs)


def needs_arguments_only(module: torch.nn.Module) -> bool:
    """True if a module and all that it consists of is torch's own, and none works in place: what it uses comes in by its arguments."""
    return all(type(part).__module__.startswith("torch.nn.modules.") and not getattr(part, "inplace", False) for part in module.modules())


def _hooked(module: torch.nn.Module | None) -> bool:
    return module is not None and any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def _on_one_device(values: Any) -> bool:
    """True if all tensors among `values` are plainly on one device; a look that costs little, for most operations."""
    device = None
    for value in values:
        if isinstance(value, torch.Tensor):
            if device is None:
                device = value.device
            elif value.device != device:
                return False
        elif isinstance(value, dict) or (
            isinstance(value, tuple | list) and any(isinstance(i, torch.Tensor | tuple | list) for i in value)
        ):
            return False
    return True


def _goes_anywhere(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__set__" or name.startswith("_foreach_") or func in _ANYWHERE


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the tensor that an operation writes into, if any: by its `out`, or by its name."""
    out = kwargs.get("out")
    if out is not None:
        return next(tensors_in(out), None)
    name = getattr(func, "__name__", "")
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name in _AUGMENTED
    return args[0] if in_place and args and isinstance(args[0], torch.Tensor) else None


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in tuples, lists and dicts, also nested. What else holds some is its own affair."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def moved(value: Any, to: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return `value` with `to` of each tensor in it, in tuples, lists and dicts, also nested; `value` itself where nothing changes."""
    if isinstance(value, torch.Tensor):
        return to(value)
    if isinstance(value, PackedSequence):  # its sizes stay where they are
        return value.to(to(value.data).device)  # type: ignore[arg-type]
    if isinstance(value, tuple | list):
        items = [moved(item, to) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        new = {key: moved(item, to) for key, item in value.items()}
        if all(new[key] is item for key, item in value.items()):
            return value
        filled = copy.copy(value)  # outputs of transformers are dicts of classes of their own
        for key, item in new.items():
            filled[key] = item
        return filled
    return value
