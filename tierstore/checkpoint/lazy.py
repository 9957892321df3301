"""Tensors of a checkpoint that nobody has read yet: what is done with them is written down as a recipe.

[Note: why a tensor]
What a library does on loading (renames, casts, stacks of experts, permutations of heads) it does with tensors, in code of
its own that changes from release to release. Given these in the place of the checkpoint's tensors, that code runs as it
is, in no time and in no memory, and leaves recipes in the place of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from tierstore.backend import SourceBackend
from tierstore.errors import UnsupportedTensorError
from tierstore.patch.ops import Geometry, Kind, describe, view_geometry
from tierstore.patch.prestored import make_plain
from tierstore.recipe import Computed, Recipe, Stored, replace_parts
from tierstore.shield import shielded
from tierstore.spec import TensorSpec

_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
_PLACE = ("device", "pin_memory", "non_blocking")


class CheckpointTensor(torch.Tensor):
    """Stands for the value of `recipe` over the tensors of `source`, on the CPU.

    Functional operators give another one. What needs the values (a comparison, an operator that mixes it with plain
    tensors) computes them for that one time. Once written to, it and its views, whose `root` it is, stand for plain memory:
    `written`. That is refused where views of it were taken, or it is one, that strides alone do not describe (`opaque`).
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    recipe: Recipe
    source: SourceBackend
    root: CheckpointTensor | None = None
    written: torch.Tensor | None = None
    opaque = False
    _is_hf_initialized = True  # to transformers: no random values, neither here nor in what a parametrization computes from it

    @classmethod
    def of(cls, recipe: Recipe, source: SourceBackend) -> CheckpointTensor:
        spec = recipe.spec
        tensor: CheckpointTensor = torch.Tensor._make_wrapper_subclass(
            cls, spec.shape, strides=spec.stride, dtype=spec.dtype, device=torch.device("cpu")
        )
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        tensor.recipe, tensor.source = recipe, source
        return tensor

    def plain(self) -> torch.Tensor:
        """Return the value: in memory of its own, or that which was written to."""
        written = self.own()
        if written is not None:
            return written
        with shielded():
            return self.source.compute(self.recipe)

    @property
    def owner(self) -> CheckpointTensor:
        """What it is a view of, or itself."""
        return self if self.root is None else self.root

    def own(self) -> torch.Tensor | None:
        """Return the memory that it stands for since it, or what it is a view of, was written to."""
        root = self.owner
        if root.written is None or root is self:
            return root.written
        assert isinstance(self.recipe, Stored)
        assert isinstance(root.recipe, Stored)
        spec = self.recipe.spec
        with torch.inference_mode(False), torch.no_grad():
            return root.written.as_strided(spec.shape, spec.stride, self.recipe.offset - root.recipe.offset)

    def make_writable(self) -> None:
        """Let it, and what it is a view of, stand for plain memory from now on."""
        root = self.owner
        if self.opaque or root.opaque:
            raise UnsupportedTensorError(
                f"{self.recipe} of a checkpoint cannot be written to while it is loaded, since it was viewed in another dtype, or after a "
                "computation; load the model plainly and put it under tiered()"
            )
        if root.written is None:
            root.written = root.plain()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        return self.plain().numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain().numpy().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        return self.plain().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CheckpointTensor({self.recipe}, {self.dtype}, shape={tuple(self.shape)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        written = self.own()
        if written is not None:
            return torch.nn.Parameter(written.clone(), self.requires_grad) if isinstance(self, torch.nn.Parameter) else written.clone()
        copy = memo[id(self)] = CheckpointTensor.of(self.recipe, self.source)
        if isinstance(self, torch.nn.Parameter):
            copy.requires_grad_(self.requires_grad)
            copy._is_param = True
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __dlpack__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedTensorError(f"{self.recipe} of a checkpoint has no memory to share through dlpack; use .plain()")


def replace_by(tensor: CheckpointTensor, value: torch.Tensor) -> None:
    """Let the object `tensor` be a plain tensor, or parameter, over the memory of `value`."""
    make_plain(tensor, value)
    for attribute in ("recipe", "source", "root", "written", "opaque"):
        tensor.__dict__.pop(attribute, None)


def unread_tensors(source: SourceBackend) -> dict[str, torch.Tensor]:
    """Return a tensor for each one of the checkpoint, by name; nothing is read."""
    return {name: CheckpointTensor.of(stored, source) for name, stored in source.tensors().items()}


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    op = describe(func)
    if op.kind is Kind.RESHAPES:
        raise UnsupportedTensorError(f"{func} would change the shape of {_unread((*args, *kwargs.values()))[0].recipe} of a checkpoint")
    targets = _unread([args[i] for i in op.written if i < len(args)] + [kwargs.get(name) for name in op.written_names])
    for target in targets:
        target.make_writable()
    owners: dict[int, CheckpointTensor] = {}  # by what they stand for since they were written to

    def own(tensor: CheckpointTensor) -> torch.Tensor:
        written = tensor.own()
        if written is None:
            return tensor
        owners[id(written)] = tensor
        return written

    args, kwargs = _replaced(args, own), {name: _replaced(value, own) for name, value in kwargs.items()}
    found = _tensors((*args, *kwargs.values()))
    first = next((tensor for tensor in found if isinstance(tensor, CheckpointTensor)), None)
    if first is not None and op.kind is Kind.LIKE:
        meta = _replaced(args, lambda tensor: _meta_of(tensor.recipe))
        return func(*meta, **{**kwargs, "device": kwargs.get("device") or "cpu"})
    if first is not None and _can_wait(func, op.written or op.written_names, found, kwargs):
        return _recorded(func, op.kind, args, kwargs, first.source)
    result = func(
        *_replaced(args, CheckpointTensor.plain), **{name: _replaced(value, CheckpointTensor.plain) for name, value in kwargs.items()}
    )
    return owners.get(id(result), result)


def _can_wait(func: Any, writes: object, found: list[torch.Tensor], kwargs: Mapping[str, Any]) -> bool:
    """True if `func` can be run later, and what it returns is known without the values."""
    only_unread = all(isinstance(tensor, CheckpointTensor) for tensor in found)
    stays = torch.device(kwargs.get("device") or "cpu").type == "cpu" and not kwargs.get("pin_memory")
    gives_tensors = all(str(value.type) in ("Tensor", "List[Tensor]") for value in func._schema.returns)
    return only_unread and stays and gives_tensors and not writes and not _BY_VALUE.intersection(func.tags)


def _recorded(func: Any, kind: Kind, args: tuple[Any, ...], kwargs: Mapping[str, Any], source: SourceBackend) -> Any:
    recipes = _replaced(args, lambda tensor: tensor.recipe)
    kwargs = {name: _replaced(value, lambda tensor: tensor.recipe) for name, value in kwargs.items() if name not in _PLACE}
    base = recipes[0]
    if kind is Kind.VIEW and isinstance(base, Stored):
        view = view_geometry(func, Geometry(base.spec, base.offset), args[1:], dict(kwargs))
        if view is not None:
            parts = view if isinstance(view, list) else [view]
            tensors = [CheckpointTensor.of(Stored(base.name, part.spec, part.offset), source) for part in parts]
            for tensor in tensors:
                tensor.root = args[0].owner
                if tensor.dtype != tensor.root.dtype:
                    tensor.root.opaque = True
            return tensors if isinstance(view, list) else tensors[0]
    result = func(*replace_parts(recipes, _meta_of), **{name: replace_parts(value, _meta_of) for name, value in kwargs.items()})
    if isinstance(result, torch.Tensor):
        made = [CheckpointTensor.of(_plainest(Computed(func, recipes, kwargs, TensorSpec.of(result))), source)]
    else:
        made = [CheckpointTensor.of(Computed(func, recipes, kwargs, TensorSpec.of(part), i), source) for i, part in enumerate(result)]
    if kind is Kind.VIEW:
        for tensor in (*made, *(tensor.owner for tensor in _unread(args))):
            tensor.opaque = True
    return made[0] if isinstance(result, torch.Tensor) else made


def _plainest(recipe: Computed) -> Recipe:
    """Return what a recipe copies where that is all it does: values of a checkpoint never change."""
    base: Recipe = recipe.args[0]
    copies = recipe.function in (torch.ops.aten.clone.default, torch.ops.aten.alias.default, torch.ops.aten.detach.default)
    return base if copies and base.spec == recipe.spec else recipe


def _meta_of(recipe: Recipe) -> torch.Tensor:
    return torch.empty_strided(recipe.spec.shape, recipe.spec.stride, dtype=recipe.spec.dtype, device="meta")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _unread(value: Any) -> list[CheckpointTensor]:
    return [tensor for tensor in _tensors(value) if isinstance(tensor, CheckpointTensor)]


def _replaced(value: Any, make: Callable[[CheckpointTensor], Any]) -> Any:
    if isinstance(value, CheckpointTensor):
        return make(value)
    return type(value)(_replaced(item, make) for item in value) if isinstance(value, list | tuple) else value
