"""Runs one operator with TieredTensor arguments."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch

from tierstore.devices import names_device
from tierstore.entry import Entry
from tierstore.errors import ModelError, UnsupportedTensorError
from tierstore.patch.lookup import LOOKUPS, look_up
from tierstore.patch.ops import Kind, Op, describe, view_geometry
from tierstore.patch.source import CopySource, Host
from tierstore.patch.wrapper import Wrapper
from tierstore.spec import TensorSpec

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def dispatch(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Do `func` as its kind demands; anything not special fetches the bytes, runs and lets go of them."""
    op = describe(func)
    first = args[0] if args else None
    if isinstance(first, Wrapper):
        if op.kind is Kind.VIEW:
            if op.composite:  # it may turn out to be a copy
                return func.decompose(*args, **kwargs)
            view = _view(func, first, args[1:], kwargs)
            if view is not None:
                return view
        elif first._source.settled is None:
            if (op.kind is Kind.COPY and not _changes_place(first, kwargs)) or func in first.late:
                return _lazy_copy(func, first, kwargs)
            if op.kind is Kind.LIKE:
                return func(_stand_in(first), *args[1:], **{**kwargs, "device": kwargs.get("device") or first.device})
            if op.kind is Kind.RESHAPES:
                raise UnsupportedTensorError(
                    f"{func} would change the shape of {first._source.name!r} in place, which a tiered tensor "
                    "cannot do; assign a new Parameter to the module"
                )
    if op.kind is Kind.EACH:
        return _each(func, op, args, kwargs)
    if (func is torch.ops.aten.cat.default or func is torch.ops.aten.stack.default) and _too_many(args[0]):
        return _joined(func, *args, **kwargs)
    if func in LOOKUPS:
        rows = look_up(func, args, kwargs)
        if rows is not None:
            return rows
    return _compute(func, op, args, kwargs)


# -- without bytes --------------------------------------------------------------------------------------------------


def _view(func: Any, base: Wrapper, args: Args, kwargs: Kwargs) -> Any:
    if func is torch.ops.aten.detach.default or func is torch.ops.aten.alias.default:
        return base.view_of_source(base.geometry())
    if base._source.settled is not None:
        return None
    geometry = view_geometry(func, base.geometry(), args, kwargs)
    if isinstance(geometry, list):
        return [base.view_of_source(part) for part in geometry]
    return None if geometry is None else base.view_of_source(geometry)


def _stand_in(wrapper: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(wrapper.shape, wrapper.stride(), dtype=wrapper.dtype, device="meta")


def _changes_place(wrapper: Wrapper, kwargs: Kwargs) -> bool:
    """True if a `_to_copy` goes to another device or layout; raise if it is `module.to(device)` that asks."""
    device, layout = kwargs.get("device"), kwargs.get("layout")
    moves = device is not None and not names_device(device, wrapper.device)
    if moves and _inside_module_apply():
        raise ModelError(
            f"the model is tiered: its weights compute on {wrapper.device} and cannot be moved to {device} as a whole; "
            f"leave the `with` or close the session first, or give tiered(..., device={str(device)!r})"
        )
    return moves or layout not in (None, torch.strided) or bool(kwargs.get("pin_memory"))


def _inside_module_apply() -> bool:
    frame, code = sys._getframe(), torch.nn.Module._apply.__code__
    for _ in range(12):
        if frame.f_code is code:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _lazy_copy(func: Any, wrapper: Wrapper, kwargs: Kwargs) -> Wrapper:
    """Return a copy that is computed when it is read; it refers to the source, not to `wrapper`, which may be swapped."""
    options = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
    spec = TensorSpec.of(func(_stand_in(wrapper), **options))
    original = wrapper.view_of_source(wrapper.geometry())
    source = CopySource(
        spec, wrapper._source, functools.partial(_copy_now, func, original, options), f"{wrapper._source.name} as {spec.dtype}"
    )
    return wrapper.view_class.wrap(source, wrapper.device)


def _copy_now(func: Any, original: Wrapper, options: Kwargs, base: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = func(original.show(base), **options)
    return result


# -- with bytes -----------------------------------------------------------------------------------------------------


def _each(func: Any, op: Op, args: Args, kwargs: Kwargs) -> Any:
    """Run a list operator once per position of its lists."""
    values = (*args, *kwargs.values())
    count = max((len(v) for v in values if isinstance(v, list | tuple) and any(isinstance(t, torch.Tensor) for t in v)), default=0)

    def at(value: Any, i: int) -> Any:
        return value[i : i + 1] if isinstance(value, list | tuple) and len(value) == count else value

    results = [_compute(func, op, tuple(at(v, i) for v in args), {k: at(v, i) for k, v in kwargs.items()}) for i in range(count)]
    if not results or results[0] is None:
        return None
    if isinstance(results[0], tuple):
        return tuple([part for result in results for part in result[k]] for k in range(len(results[0])))
    return [part for result in results for part in result]


def _too_many(tensors: list[torch.Tensor]) -> bool:
    """True if the fast tier cannot hold all of `tensors` at once."""
    wrappers = _wrappers(tensors)
    tiers = {id(w._source.host): w._source.host.store.tiers[0] for w in wrappers if w._source.settled is None}
    needed = sum(w.nbytes for w in wrappers)
    return any(not tier.ledger.fits(needed) for tier in tiers.values())


def _joined(func: Any, tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """`cat` or `stack`, one part at a time: only the result has to fit, and that is the caller's memory."""
    if func is torch.ops.aten.stack.default:
        dim = dim if dim >= 0 else dim + tensors[0].dim() + 1
        tensors = [tensor.unsqueeze(dim) for tensor in tensors]
    parts = [tensor for tensor in tensors if tensor.shape != (0,)]  # which `cat` skips whatever the other shapes are
    shape = torch.cat([_stand_in(part) for part in tensors], dim).shape
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    result = torch.empty(shape, dtype=dtype, device=tensors[0].device)
    start = 0
    for part in parts:
        result.narrow(dim, start, part.shape[dim]).copy_(part)
        start += part.shape[dim]
    return result


def _compute(func: Any, op: Op, args: Args, kwargs: Kwargs) -> Any:
    """Run `func` on plain tensors; once more if the device was out of memory, and nothing is half written."""
    try:
        return _compute_once(func, op, args, kwargs)
    except torch.OutOfMemoryError:
        if op.written or op.written_names:
            raise
    _make_way(func, args, kwargs)  # out here, where nothing refers to the tensors of the first attempt any more
    return _compute_once(func, op, args, kwargs)


def _make_way(func: Any, args: Args, kwargs: Kwargs) -> None:
    """Let weights leave for an operation that found no memory: as many bytes as it reads and returns, or more."""
    values = [item for value in (*args, *kwargs.values()) for item in (value if isinstance(value, list | tuple) else [value])]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    nbytes = sum(tensor.nbytes for tensor in tensors) + _bytes_returned(func, args, kwargs)
    needed: dict[Host, list[Entry]] = {}
    for wrapper in _wrappers(tensors):
        if wrapper._source.settled is None:
            needed.setdefault(wrapper._source.host, []).extend(wrapper._source.entries())
    for host, entries in needed.items():
        host.make_way(nbytes, entries)


def _bytes_returned(func: Any, args: Args, kwargs: Kwargs) -> int:
    """Return how many bytes the result of `func` has; 0 if only running it would tell."""
    with suppress(NotImplementedError, RuntimeError):  # no rule for shapes, or they depend on values
        result = func(*map(_shapes, args), **{name: _shapes(value) for name, value in kwargs.items()})
        parts = result if isinstance(result, list | tuple) else [result]
        return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    return 0


def _shapes(value: Any) -> Any:
    """Return an operator's argument with tensors that have no bytes."""
    if isinstance(value, torch.Tensor):
        return _stand_in(value)
    return [_shapes(item) for item in value] if isinstance(value, list | tuple) else value


def _compute_once(func: Any, op: Op, args: Args, kwargs: Kwargs) -> Any:
    """Lease what the arguments stand for, run `func` on plain tensors, and record what it wrote."""
    wrappers = _wrappers(args)
    if kwargs:
        wrappers += _wrappers(kwargs.values())
    written = _written(op, args, kwargs) if op.written or op.written_names else []
    for wrapper in written:
        wrapper._source.before_write()
    held = _acquire(wrappers, func)
    if held is None:
        return _compute_once(func, op, args, kwargs)
    try:
        plain = {id(wrapper): wrapper.show(wrapper._source.read()) for wrapper in wrappers}
        if op.custom or op.composite:
            plain = {id(wrapper): _flagged(plain[id(wrapper)], wrapper) for wrapper in wrappers}
        try:
            with _views_keep_flags() if op.composite else nullcontext():
                result = func(*[_replace(a, plain) for a in args], **{name: _replace(a, plain) for name, a in kwargs.items()})
        finally:
            for wrapper in written:
                wrapper._source.after_write()
    finally:
        _release(held)
    return _rewrap(result, {id(plain[id(wrapper)]): wrapper for wrapper in written}) if written else result


def _flagged(plain: torch.Tensor, wrapper: Wrapper) -> torch.Tensor:
    """Return `plain` with the `requires_grad` of `wrapper`: `matmul` inside a kernel folds by it, and the last bit changes."""
    return plain.detach().requires_grad_() if wrapper.requires_grad else plain


def _views_keep_flags() -> AbstractContextManager[None]:
    """Let views that a composite operator takes have the `requires_grad` of what they show, as they have where torch calls it."""
    guard: AbstractContextManager[None] = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False)
    return guard


def _written(op: Op, args: Args, kwargs: Kwargs) -> list[Wrapper]:
    positional = [args[i] for i in op.written if i < len(args)]
    return _wrappers([*positional, *(kwargs[name] for name in op.written_names if name in kwargs)])


def _wrappers(values: Iterable[Any]) -> list[Wrapper]:
    """Return the wrappers among operator arguments, which nest at most one list deep."""
    found: list[Wrapper] = []
    for value in values:
        if isinstance(value, Wrapper):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, Wrapper)]
    return found


def _replace(value: Any, plain: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, Wrapper):
        return plain[id(value)]
    if isinstance(value, list | tuple):
        return [plain[id(item)] if isinstance(item, Wrapper) else item for item in value]
    return value


def _rewrap(result: Any, wrappers: dict[int, Wrapper]) -> Any:
    """Give back the argument itself where an operator returns what it wrote to."""
    if isinstance(result, torch.Tensor):
        return wrappers.get(id(result), result)
    if isinstance(result, list | tuple):
        return type(result)(_rewrap(item, wrappers) for item in result)
    return result


def _acquire(wrappers: list[Wrapper], func: Any) -> dict[Host, list[Entry]] | None:
    """Lease all entries behind `wrappers`, per store at once; return what to give back, or None if there may be more wrappers now."""
    wanted: dict[Host, list[Entry]] = {}
    for wrapper in wrappers:
        source = wrapper._source
        if source.settled is None:
            entries = wanted.setdefault(source.host, [])
            entries += [entry for entry in source.entries() if entry not in entries]
    held: dict[Host, list[Entry]] = {}
    try:
        for host in sorted(wanted, key=id) if len(wanted) > 1 else wanted:  # in one order, or two threads wait for each other
            entries = wanted[host]
            host.worked_on(sum(entry.nbytes for entry in entries))
            changed = host.lease(entries, func)
            held[host] = entries
            if changed:
                _release(held)
                return None
            for entry in entries:
                entry.looked_up = entry.looked_up or False
    except BaseException:
        _release(held)
        raise
    return held


def _release(held: dict[Host, list[Entry]]) -> None:
    for host, entries in held.items():
        moves = host.store.moves
        with moves.lock:
            moves.release(entries)
