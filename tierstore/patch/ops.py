"""What an operator does to its arguments, read from its schema once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch

from tierstore.spec import TensorSpec


class Kind(Enum):
    """How a TieredTensor argument of an operator is treated."""

    VIEW = auto()
    """The result shares memory with the first argument: only geometry is computed, no byte moves."""
    COPY = auto()
    """`_to_copy`: a cast that can wait until it is read."""
    LIKE = auto()
    """Only shape, dtype and device of the first argument matter (`zeros_like`, `new_empty`, ...): no byte moves."""
    EACH = auto()
    """A list operator that treats the elements of its lists one by one: run in pieces, so that not all must be resident."""
    RESHAPES = auto()
    """Changes the metadata of its argument in place, which a TieredTensor cannot do."""
    COMPUTE = auto()
    """Everything else: needs the bytes."""


@dataclass(frozen=True, slots=True)
class Op:
    """`written`: positions, and `written_names` keyword names, of the arguments that the operator changes.

    `custom`: not one of torch's own. Such a kernel may be Python that asks for `requires_grad`, or calls what does.
    `composite`: made of other operators. With gradients torch takes it apart itself, in inference mode it arrives as a whole.
    """

    kind: Kind
    written: tuple[int, ...]
    written_names: tuple[str, ...]
    custom: bool
    composite: bool


# These write their running statistics without saying so in the schema.
_UNDECLARED_WRITES = {
    "aten::native_batch_norm": (3, 4),
    "aten::cudnn_batch_norm": (3, 4),
    "aten::miopen_batch_norm": (3, 4),
    "aten::batch_norm_gather_stats": (3, 4),
    "aten::batch_norm_gather_stats_with_counts": (3, 4),
}
_EACH_PREFIXES = ("aten::_foreach_", "aten::_fused_", "aten::_amp_foreach_")
_ALIASES_WITHOUT_SAYING = {"aten::_unsafe_view"}


@functools.cache
def describe(func: Any) -> Op:
    """Return what `func`, an `OpOverload`, does to its arguments."""
    schema = func._schema
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    written = [i for i, argument in enumerate(positional) if argument.alias_info is not None and argument.alias_info.is_write]
    names = [a.name for a in schema.arguments if a.kwarg_only and a.alias_info is not None and a.alias_info.is_write]
    written += _UNDECLARED_WRITES.get(schema.name, ())
    custom = func.namespace not in ("aten", "prim", "prims")
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return Op(_kind(func, schema, bool(written or names)), tuple(written), tuple(names), custom, composite)


def _kind(func: Any, schema: Any, writes: bool) -> Kind:
    name = schema.name
    if torch.Tag.inplace_view in func.tags:
        return Kind.RESHAPES
    if name == "aten::_to_copy":
        return Kind.COPY
    if name.startswith(_EACH_PREFIXES):
        return Kind.EACH
    if not writes and (name.endswith("_like") or name.startswith("aten::new_")):
        return Kind.LIKE
    aliases = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
    if not writes and (aliases or name in _ALIASES_WITHOUT_SAYING):
        return Kind.VIEW
    return Kind.COMPUTE


@dataclass(frozen=True, slots=True)
class Geometry:
    """A view: what it looks like, and where it starts, in its own elements from the start of the source."""

    spec: TensorSpec
    offset: int


View = Geometry | list[Geometry] | None


def view_geometry(func: Any, base: Geometry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> View:
    """Return what `func` makes of a view of geometry `base`; None for a copy, or a view that geometry cannot describe (a lazy conjugate).

    Some operators decide by layout or dtype whether they copy (`reshape`, `contiguous`, `to`).
    """
    try:
        return _cached_geometry(func, base, _frozen(args), tuple(kwargs.items()))
    except TypeError:  # an argument that cannot be hashed, such as a symbolic size
        return _geometry(func, base, args, kwargs)


@functools.lru_cache(maxsize=8192)
def _cached_geometry(func: Any, base: Geometry, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> View:
    return _geometry(func, base, args, dict(kwargs))


def _frozen(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(value) if isinstance(value, list) else value for value in args)


def _geometry(func: Any, base: Geometry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> View:
    """Run the view on a meta tensor whose storage starts where the source starts, so that absolute offsets come out right."""
    itemsize = base.spec.dtype.itemsize
    with torch.inference_mode(False), torch.no_grad():
        storage = torch.UntypedStorage((base.offset + base.spec.extent) * itemsize, device="meta")  # type: ignore[no-untyped-call]
        meta = torch.empty(0, dtype=base.spec.dtype, device="meta").set_(storage, base.offset, base.spec.shape, base.spec.stride)
        result = func(meta, *args, **kwargs)
    if isinstance(result, torch.Tensor):
        return _of_meta(result, storage)
    parts = [part for part in (_of_meta(part, storage) for part in result) if part is not None]
    return parts if len(parts) == len(result) else None


def _of_meta(meta: torch.Tensor, storage: torch.UntypedStorage) -> Geometry | None:
    if meta.is_conj() or meta.is_neg() or meta.untyped_storage()._cdata != storage._cdata:
        return None
    return Geometry(TensorSpec.of(meta), int(meta.storage_offset()))
