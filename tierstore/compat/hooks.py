"""What a dispatched model carries: its session, and what happens before and after its call."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from tierstore.errors import ModelError
from tierstore.patch.watch import is_watched
from tierstore.running import Tiered, close_when_unused

_ATTRIBUTE = "_tierstore_dispatch"
_SHOWN_TO_USERS = ("tiered", "hf_device_map")
_LEVELS = 2  # below a model down to which parts are called by themselves: model.model.encoder


class _OnlyHere:
    """A hook that copies and pickles of the model do not take along: they are plain."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Any:
    return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    """The hook that copies have instead."""


class AlignInputs(_OnlyHere):
    """Moves what a module is called with to `device`, apart from the keyword arguments `skip`, before its call."""

    def __init__(self, device: torch.device, skip: Collection[str]) -> None:
        self.device = device
        self._skip = frozenset(skip)

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return move(args, self.device), {k: v if k in self._skip else move(v, self.device) for k, v in kwargs.items()}


class NotingInputs(AlignInputs):
    """Notes also where the first tensor came from, for `AlignOutputs`. Calls may nest, and threads may share the module."""

    def __init__(self, device: torch.device, skip: Collection[str]) -> None:
        super().__init__(device, skip)
        self._calls = threading.local()

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        first = next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)), None)
        self.entered().append(first)
        return super().__call__(module, args, kwargs)

    def entered(self) -> list[torch.device | None]:
        """Return where the inputs of this thread's calls came from, the innermost call last."""
        if not hasattr(self._calls, "devices"):
            self._calls.devices = []
        devices: list[torch.device | None] = self._calls.devices
        return devices


class AlignOutputs(_OnlyHere):
    """Moves what a call returns to where its inputs came from, as `inputs` noted."""

    def __init__(self, inputs: NotingInputs) -> None:
        self._inputs = inputs

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        calls = self._inputs.entered()
        device = calls.pop() if calls else None  # empty if a hook before ours refused the call
        return output if device is None else move(output, device)


def move(tree: Any, device: torch.device) -> Any:
    """Return `tree` with its tensors on `device`; the same objects where they are there already."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor if tensor.device == device else tensor.to(device), tree)


class Before(_OnlyHere):
    """Offloads another model before the call of the one that it is registered on."""

    def __init__(self, hook: Any) -> None:
        self._hook = hook

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        self._hook.offload()


class Dispatch:
    """The session of one model, and the hooks that belong to it; lives as long as the model."""

    def __init__(self, model: torch.nn.Module, session: Tiered, handles: Iterable[RemovableHandle]) -> None:
        self.session = session
        self._handles = list(handles)
        close_when_unused(session)
        model.__dict__[_ATTRIBUTE] = self
        model.__dict__["tiered"] = session

    def close(self, model: torch.nn.Module) -> None:
        """Make the model plain and take everything off it; if weights cannot be brought back, `TierStoreError`, and all stays."""
        self.session.close()
        for handle in self._handles:
            handle.remove()
        for name in (_ATTRIBUTE, *_SHOWN_TO_USERS):
            model.__dict__.pop(name, None)

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copy of a dispatched model is plain."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def dispatch_of(module: torch.nn.Module) -> Dispatch | None:
    """Return what `module` itself was dispatched with."""
    found: Dispatch | None = module.__dict__.get(_ATTRIBUTE)
    return found


def align(model: torch.nn.Module, device: torch.device, *, back: bool, skip: str | Collection[str] | None = None) -> list[RemovableHandle]:
    """Let a model, and the parts that may be called by themselves (an encoder), be called with tensors from anywhere.

    With `back`, what the model returns goes to where its inputs came from.
    """
    names = [skip] if isinstance(skip, str) else skip or ()
    parts = [module for module in _parts(model, _LEVELS) if module is not model]
    handles = [part.register_forward_pre_hook(AlignInputs(device, names), with_kwargs=True) for part in dict.fromkeys(parts)]
    if not back:
        return [*handles, model.register_forward_pre_hook(AlignInputs(device, names), with_kwargs=True)]
    inputs = NotingInputs(device, names)
    handles.append(model.register_forward_pre_hook(inputs, with_kwargs=True))
    return [*handles, model.register_forward_hook(AlignOutputs(inputs), always_call=True)]


def _parts(module: torch.nn.Module, levels: int) -> Iterator[torch.nn.Module]:
    """Yield the modules below `module`, down to `levels`, that consist of others: layers by themselves are called by those."""
    for child in module.children():
        if levels and any(True for _ in child.children()):
            yield child
            yield from _parts(child, levels - 1)


def remove_hook_from_module(module: torch.nn.Module, recurse: bool = False) -> torch.nn.Module:
    """Make a model plain again that one of the functions here took, and return it: weights as last written, on their old devices.

    With `recurse`, also every submodule that was given to one of them by itself. A module without a session stays as it is.
    Part of a model that was taken as a whole cannot leave alone: that is a `ModelError`, and nothing changes.
    """
    dispatch = dispatch_of(module)
    if dispatch is not None:
        dispatch.close(module)
    elif is_watched(module):
        raise ModelError(
            f"this {type(module).__name__} is part of a model that is tiered as a whole; "
            "give that model to remove_hook_from_module, or close its session (model.tiered.close())"
        )
    if recurse:
        for child in module.children():
            remove_hook_from_module(child, recurse=True)
    return module


def remove_hook_from_submodules(module: torch.nn.Module) -> None:
    """The same with `recurse=True`, as accelerate also calls it."""
    remove_hook_from_module(module, recurse=True)
