"""Hears of what is registered on modules, anywhere, without keeping the session that wants to know alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch.nn.modules.module import (
    _global_module_registration_hooks,
    _global_parameter_registration_hooks,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils.hooks import RemovableHandle

from tierstore.errors import ModelError


class Watcher(Protocol):
    """A session's side: what it has, and what it does when something is set on one of its modules."""

    def has(self, module: torch.nn.Module) -> bool: ...
    def module_added(self, parent: torch.nn.Module, name: str, module: torch.nn.Module | None) -> None: ...
    def parameter_added(self, module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None: ...


class _Hook:
    """Calls `method` of a watcher as long as that lives.

    A hook whose watcher is gone stays until another one is registered: its end comes from the garbage collector, maybe while
    torch goes through the hooks.
    """

    def __init__(self, watcher: Watcher, method: str) -> None:
        self._watcher = weakref.ref(watcher)
        self._method = method

    @property
    def watcher(self) -> Watcher | None:
        return self._watcher()

    def __call__(self, *args: Any) -> Any:
        watcher = self.watcher
        return None if watcher is None else getattr(watcher, self._method)(*args)


def watch(watcher: Watcher) -> list[RemovableHandle]:
    """Tell `watcher` of every module and parameter that is set on a module, until the handles are removed or it is gone."""
    for hooks in (_global_module_registration_hooks, _global_parameter_registration_hooks):
        for number, hook in list(hooks.items()):
            if isinstance(hook, _Hook) and hook.watcher is None:
                hooks.pop(number, None)
    return [
        register_module_module_registration_hook(_Hook(watcher, "module_added")),
        register_module_parameter_registration_hook(cast(Callable[..., None], _Hook(watcher, "parameter_added"))),  # it may return a tensor
    ]


def is_watched(module: torch.nn.Module) -> bool:
    """True if a running session has `module`, also where it holds all tensors plain."""
    watchers = [hook.watcher for hook in list(_global_module_registration_hooks.values()) if isinstance(hook, _Hook)]
    return any(watcher.has(module) for watcher in watchers if watcher is not None)


def refuse_attached(roots: Mapping[str, torch.nn.Module]) -> None:
    """Raise `ModelError` for a module that a running session has."""
    for prefix, root in roots.items():
        for path, module in root.named_modules(prefix=prefix):
            if is_watched(module):
                raise ModelError(
                    f"{path or type(module).__name__!r} is already under tiered(); leave that `with`, or close its session, first"
                )
