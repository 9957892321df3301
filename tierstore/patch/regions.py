"""Finds the tensors of a model and how they share memory; refuses what cannot be tiered, before anything changes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from tierstore.errors import ModelError, UnsupportedTensorError
from tierstore.patch.ops import Geometry
from tierstore.patch.wrapper import Wrapper
from tierstore.spec import TensorSpec, storable, typed_view

_MOVING = ("offload", "unknown")  # in the names of hooks
_ALIGNMENT = 16  # bytes; the largest element size, so that every view of a region starts at a whole element


@dataclass(eq=False, slots=True)
class Binding:
    """One tensor object of the model: under which names it is found, and where it lies in its region."""

    tensor: torch.Tensor
    names: list[str]
    geometry: Geometry
    device: torch.device
    kind: type[torch.Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class StoredValue:
    """A value that a store has from its beginning: under one key, or in pieces, which lie in `memory` where they are resident."""

    spec: TensorSpec
    keys: tuple[str, ...]
    memory: torch.Tensor | None = None


@dataclass(eq=False, slots=True)
class Region:
    """A piece of memory that one or more tensors share (ties, views of one buffer): one entry in the store.

    `base`: the plain bytes, until they are handed to the store; `stored`: where it has them already.
    """

    bindings: list[Binding]
    spec: TensorSpec
    base: torch.Tensor | None = field(repr=False)
    stored: StoredValue | None = None

    @property
    def name(self) -> str:
        return self.bindings[0].names[0]

    @property
    def lone_buffer(self) -> bool:
        """True for a tensor without gradient that has one name and shares its memory with no other."""
        tensor = self.bindings[0].tensor
        alone = len(self.bindings) == 1 and len(self.bindings[0].names) == 1
        return alone and not tensor.requires_grad and not isinstance(tensor, torch.nn.Parameter)


def named_tensors(roots: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer under each name it has, ties included."""
    seen: set[torch.nn.Module] = set()
    for prefix, root in roots.items():
        for path, module in root.named_modules(prefix=prefix):
            if module in seen:
                continue
            seen.add(module)
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        yield f"{path}.{name}" if path else name, tensor


def check_model(roots: Mapping[str, torch.nn.Module], stored: Container[int] = ()) -> None:
    """Raise `ModelError` for a model that is already managed, or whose tensors have no bytes.

    `stored` has the ids of tensors whose bytes are in the store already.
    """
    check_modules(roots)
    for name, tensor in named_tensors(roots):
        if id(tensor) not in stored:
            _check_tensor(name, tensor)


def check_modules(roots: Mapping[str, torch.nn.Module]) -> None:
    """Raise `ModelError` for what is not a module, or is already managed."""
    for prefix, root in roots.items():
        if not isinstance(root, torch.nn.Module):
            raise ModelError(f"expected a torch.nn.Module, or a list or dict of them, got {type(root).__name__}")
        for path, module in root.named_modules(prefix=prefix):
            _check_module(path or type(module).__name__, module)


def _check_module(path: str, module: torch.nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(f"{path!r} is a TorchScript module, whose weights are read from C++; pass the original module")
    if hasattr(module, "_hf_hook"):
        raise ModelError(
            f"{path!r} carries accelerate's hooks; remove them first: pipe.remove_all_hooks() for a pipeline of diffusers, "
            "else accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    moving = _hooks_that_move_weights(module)
    if moving:
        raise ModelError(
            f"{path!r} carries diffusers' hooks {moving}, which move its weights themselves; load the pipeline without offloading"
        )
    for table in (module._parameters, module._buffers):
        if not type(table).__module__.startswith(("builtins", "collections", "tierstore.")):
            raise ModelError(
                f"the parameters of {path!r} are managed by {type(table).__module__}.{type(table).__name__}; remove that first"
            )


def _hooks_that_move_weights(module: torch.nn.Module) -> list[str]:
    """Return the names of diffusers' hooks on `module` that keep its weights elsewhere; others, such as caches, may stay.

    A model that ran once may carry a register of hooks without any.
    """
    register = getattr(module, "_diffusers_hook", None)
    names = [] if register is None else list(getattr(register, "hooks", ["of an unknown kind"]))
    return [name for name in names if not isinstance(name, str) or any(word in name for word in _MOVING)]


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if isinstance(tensor, Wrapper):
        raise ModelError(f"{name!r} is already under tiered(); leave that `with` first, or pass all models to one tiered([...])")
    if torch.nn.parameter.is_lazy(tensor):
        raise ModelError(f"{name!r} is not initialised yet; run the model once so that lazy modules get their shapes")
    if tensor.device.type == "meta":
        raise ModelError(
            f"{name!r} is on the meta device and has no data; give checkpoint=DIR, "
            "or load the weights first (for example load_state_dict(..., assign=True))"
        )
    if not _inert(type(tensor)):
        raise ModelError(
            f"{name!r} is a {type(tensor).__name__}, which intercepts operations itself; convert it to a plain Parameter first"
        )
    try:
        storable(tensor)
    except UnsupportedTensorError as error:
        raise ModelError(f"{name!r} cannot be tiered: {error}") from error


def _inert(kind: type[torch.Tensor]) -> bool:
    """True for plain tensors and Parameters, and for subclasses of Parameter that only carry attributes."""
    if kind is torch.Tensor or issubclass(kind, torch.nn.Buffer):
        return True
    return kind.__torch_function__ is torch._C._disabled_torch_function_impl and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def find_regions(named: Iterable[tuple[str, torch.Tensor]]) -> list[Region]:
    """Group tensors by the memory they share: overlapping ones form one region. Tensors that autograd computed are left out."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in named:
        if tensor.is_leaf:
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
    by_storage: dict[int, list[Binding]] = {}
    for identity, tensor in tensors.items():
        kind = type(tensor)
        geometry = Geometry(TensorSpec.of(tensor), 0)
        binding = Binding(tensor, names[identity], geometry, tensor.device, kind)
        storage = tensor.untyped_storage()
        by_storage.setdefault(storage._cdata if storage.nbytes() else -identity, []).append(binding)
    return [region for bindings in by_storage.values() for region in _regions_of_storage(bindings)]


def _span(binding: Binding) -> tuple[int, int]:
    start = int(binding.tensor.storage_offset()) * binding.tensor.dtype.itemsize
    return start, start + binding.geometry.spec.nbytes


def _regions_of_storage(bindings: list[Binding]) -> Iterator[Region]:
    """Merge overlapping byte ranges of one storage."""
    group: list[Binding] = []
    end = -1
    for binding in sorted(bindings, key=_span):
        start, stop = _span(binding)
        if group and start >= end:
            yield _region(group)
            group = []
        group.append(binding)
        end = max(end, stop) if len(group) > 1 else stop
    yield _region(group)


def _region(group: list[Binding]) -> Region:
    first = group[0]
    base = first.tensor.detach()
    if all(_span(b) == _span(first) and b.geometry.spec == first.geometry.spec for b in group):
        return Region(group, first.geometry.spec, base.resolve_conj().resolve_neg())
    start = _span(first)[0] // _ALIGNMENT * _ALIGNMENT
    stop = max(_span(binding)[1] for binding in group)
    for binding in group:
        offset = (_span(binding)[0] - start) // binding.tensor.dtype.itemsize
        binding.geometry = Geometry(binding.geometry.spec, offset)
    spec = TensorSpec(torch.uint8, (stop - start,), (1,))
    raw = torch.empty(0, dtype=torch.uint8, device=base.device).set_(base.untyped_storage(), start, (0,), (1,))
    return Region(group, spec, typed_view(raw, spec))
