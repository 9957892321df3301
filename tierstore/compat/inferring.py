"""`infer_auto_device_map` and `get_balanced_memory`: what fits where, from sizes alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence

import torch

from tierstore.compat.device_map import Casts, Sizes, fill_in_order
from tierstore.compat.places import Name, read_max_memory
from tierstore.errors import UnsupportedTensorError
from tierstore.sizes import Size, format_size
from tierstore.spec import dtype_named

_log = logging.getLogger(__name__)

DType = str | torch.dtype


def infer_auto_device_map(
    model: torch.nn.Module,
    max_memory: Mapping[Name, Size] | None = None,
    no_split_module_classes: str | Sequence[str] | None = None,
    dtype: DType | None = None,
    special_dtypes: Mapping[str, DType] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> dict[str, Name]:
    """Return a map of module names to the places that `max_memory` names, filled in the order of the modules, then "disk".

    `max_memory`: bytes or sizes such as `{0: "8GiB", "cpu": "32GiB"}`; by default what is free. Where
    not everything fits on the first place, room is kept there for what passes through, two of the largest layers. `dtype`, and
    `special_dtypes` by tensor names, say what weights are cast to on loading. The model may be on the meta device. Tied tensors
    count once. With `clean_result`, modules whose parts are all in one place stand for them; `verbose` logs what each place gets.

    `no_split_module_classes` has no effect: a layer may lie in several places, since its weights, not its inputs, are what
    moves. Neither has `fallback_allocation`: modules are split down to single layers before a place is left.
    """
    memory = read_max_memory(max_memory)
    sizes = Sizes(model, Casts(dtype_of(dtype), {name: _checked(kind) for name, kind in (special_dtypes or {}).items()}))
    first = next(iter(memory))
    passing = sizes.passing(offload_buffers=True)
    if min(passing, sizes.total - 1) >= memory[first]:
        warnings.warn(
            f"nothing stays in the {format_size(memory[first])} of {first!r}: the largest layers, which pass through it, take up to "
            f"{format_size(passing)}; give it more, or dispatch_model will take that much",
            stacklevel=2,
        )
    found = fill_in_order(model, sizes, memory, offload_buffers=offload_buffers, merge=clean_result)
    if verbose:
        for name, place in found.items():
            _log.info("%s goes to %s", name or type(model).__name__, place)
    return found


def get_balanced_memory(
    model: torch.nn.Module,
    max_memory: Mapping[Name, Size] | None = None,
    no_split_module_classes: str | Sequence[str] | None = None,
    dtype: DType | None = None,
    special_dtypes: Mapping[str, DType] | None = None,
    low_zero: bool = False,
) -> dict[Name, int]:
    """Return `max_memory` in bytes, or what is free: there is nothing to balance.

    A session divides a model among several accelerators in proportion to these. So the other arguments have no effect.
    """
    return read_max_memory(max_memory)


def dtype_of(dtype: DType | None) -> torch.dtype | None:
    """Return the dtype that `dtype` names ("float16", "torch.float16"); raise `UnsupportedTensorError` if none has that name."""
    return None if dtype is None else _checked(dtype)


def _checked(dtype: DType) -> torch.dtype:
    found = dtype_named(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise UnsupportedTensorError(f'{dtype!r} is no dtype; give a torch.dtype or its name, such as "bfloat16"')
    return found
