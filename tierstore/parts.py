"""Finds the modules in what a user wants to run: a module, several, or an object that holds some, such as a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tierstore.errors import ModelError, listed

_LISTED = 12  # names in an error


@dataclass(slots=True)
class Parts:
    """The modules found, by the names that begin those of their tensors, and the objects that hold them."""

    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    holders: list[object] = field(default_factory=list)

    def add(self, name: str, module: torch.nn.Module) -> None:
        if self.modules.setdefault(name, module) is not module:
            raise ModelError(f"two modules would be called {name!r}; give them other keys")


def find_parts(model: object) -> Parts:
    """Return the modules of `model` by name: "" for a module itself, keys of a mapping, positions in a list, else attributes.

    An object that is no module holds those in its `components`, if that is a mapping with modules, else those among its
    attributes. Lists and dicts may hold such objects too; their names are joined with a dot. Raises `ModelError` for what
    holds no module.
    """
    parts = Parts()
    _collect("", model, parts)
    return parts


def _collect(name: str, model: object, parts: Parts) -> None:
    if isinstance(model, torch.nn.Module):
        parts.add(name, model)
    elif isinstance(model, Mapping | list | tuple):
        for key, part in _items(model):
            _collect(_joined(name, key), part, parts)
    else:
        held = list(_modules(_components(model))) or list(_modules(_attributes(model)))
        if not held:
            raise ModelError(_nothing_in(name, model))
        parts.holders.append(model)
        for key, module in held:
            parts.add(_joined(name, key), module)


def _modules(named: Mapping[str, object]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules among some values, also those in lists and dicts."""
    for name, value in named.items():
        if isinstance(value, torch.nn.Module):
            yield name, value
        elif isinstance(value, Mapping | list | tuple):
            yield from ((_joined(name, key), part) for key, part in _items(value) if isinstance(part, torch.nn.Module))


def _items(models: Mapping[object, object] | Sequence[object]) -> Iterable[tuple[str, object]]:
    named = models.items() if isinstance(models, Mapping) else enumerate(models)
    return ((str(key), part) for key, part in named)


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _components(holder: object) -> Mapping[str, object]:
    components = getattr(holder, "components", None)
    return components if isinstance(components, Mapping) else {}


def _attributes(holder: object) -> Mapping[str, object]:
    """Return the attributes that `holder` itself has; a class has none of its instances'."""
    return {} if isinstance(holder, type) else getattr(holder, "__dict__", {})


def _nothing_in(name: str, model: object) -> str:
    what = f"{type(model).__name__} at {name!r}" if name else type(model).__name__
    names = list(dict.fromkeys([*_components(model), *_attributes(model)]))
    attributes = listed(names, _LISTED) or "it has none"
    return (
        f"expected a torch.nn.Module, a list or dict of them, or an object that holds some, got {what}: no module in its "
        f"`components` or among its attributes ({attributes}); pass the modules themselves: tiered([encoder, unet])"
    )


class KeptDevices:
    """The attribute `device` of objects that remember where their modules are, for as long as these compute elsewhere.

    Only an attribute of the object itself that is a `torch.device` counts; a property finds out by itself.
    """

    def __init__(self, holders: Iterable[object], device: torch.device) -> None:
        kept = ((holder, _attributes(holder).get("device")) for holder in holders)
        self._before = [(holder, before) for holder, before in kept if isinstance(before, torch.device) and before != device]
        self._device = device
        for holder, _ in self._before:
            setattr(holder, "device", device)  # noqa: B010  (what class it is is not known)

    def restore(self) -> None:
        """Give the objects the devices that they had, unless they have got others meanwhile."""
        for holder, before in self._before:
            if _attributes(holder).get("device") == self._device:
                setattr(holder, "device", before)  # noqa: B010
        self._before = []
