"""`cpu_offload`, `cpu_offload_with_hook`, `disk_offload`: the whole model below the fast tier, as accelerate has them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from tierstore.compat.device_map import Casts, Sizes, memory_of, ram_for
from tierstore.compat.hooks import Before, Dispatch, align, dispatch_of, remove_hook_from_module
from tierstore.compat.places import Name, device_of
from tierstore.compat.values import take_values
from tierstore.devices import compute_device
from tierstore.errors import ModelError
from tierstore.patch.regions import check_modules, named_tensors
from tierstore.patch.watch import refuse_attached
from tierstore.session import tiered


def cpu_offload(
    model: torch.nn.Module,
    execution_device: Name | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Sequence[str] | None = None,
) -> torch.nn.Module:
    """Keep the weights of `model` in RAM, compute on `execution_device`, and return the model.

    At most four of the largest layers are on the device at a time, and no more than half of the model unless two layers need
    it (`model.tiered.resize(gpu=...)` changes that); unless `offload_buffers`, there is room for all buffers beside them.
    `execution_device`: by default where the first parameter is. `state_dict`: values that the model takes first; also for
    parameters on the meta device. `preload_module_classes` has no effect: a weight that is used outside of its own module's
    call is found anyway. Inputs are moved to the device, and outputs back to where the inputs came from.
    Raises `ModelError` or `BackendError` before anything changes.
    """
    return _offload(model, execution_device, offload_buffers, state_dict, None)


def disk_offload(
    model: torch.nn.Module,
    offload_dir: str | os.PathLike[str],
    execution_device: Name | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Sequence[str] | None = None,
) -> torch.nn.Module:
    """Keep the weights of `model` in a file below `offload_dir`, compute on `execution_device`, and return the model.

    The file has no name and goes with the session; what accelerate may have left in `offload_dir` is neither read nor
    changed: the values are the model's own. Everything else is as for `cpu_offload`.
    """
    return _offload(model, execution_device, offload_buffers, None, offload_dir)


def _offload(
    model: torch.nn.Module,
    execution_device: Name | None,
    offload_buffers: bool,
    state_dict: Mapping[str, torch.Tensor] | None,
    offload_dir: str | os.PathLike[str] | None,
) -> torch.nn.Module:
    check_modules({"": model})
    refuse_attached({"": model})
    device = compute_device(_first_device(model) if execution_device is None else device_of(execution_device))
    passing = Sizes(model, Casts()).generous(offload_buffers=offload_buffers)
    take_values(model, state_dict or {})
    ram = ram_for(model) if offload_dir is None else None
    session = tiered(model, gpu=passing, cpu=ram, disk=offload_dir, device=device)
    session.store.offload(session.store)
    Dispatch(model, session, align(model, device, back=True))
    return model


def _first_device(model: torch.nn.Module) -> torch.device:
    first = next((tensor.device for _, tensor in named_tensors({"": model})), torch.device("cpu"))
    return torch.device("cpu") if first.type == "meta" else first


def cpu_offload_with_hook(
    model: torch.nn.Module,
    execution_device: Name | None = None,
    prev_module_hook: UserCpuOffloadHook | None = None,
) -> tuple[torch.nn.Module, UserCpuOffloadHook]:
    """Keep `model` in RAM until it is called, then on `execution_device` until the hook that is returned says `.offload()`.

    For models that run one after the other, each maybe in a loop: before a call of this one, the model of `prev_module_hook`
    is offloaded. `execution_device`: by default the accelerator if one works, else the CPU. Inputs are moved there, and
    outputs stay there. All of the model fits there: where it does not, `tiered([model_1, model_2, ...])` runs them inside a
    budget. Raises `ModelError` or `BackendError` before anything changes.
    """
    if prev_module_hook is not None and not isinstance(prev_module_hook, UserCpuOffloadHook):
        raise ModelError(
            f"prev_module_hook is a {type(prev_module_hook).__name__}; give the second value that cpu_offload_with_hook of "
            "tierstore.compat.accelerate returned for the model before"
        )
    check_modules({"": model})
    refuse_attached({"": model})
    device = compute_device(None if execution_device is None else device_of(execution_device))
    session = tiered(model, gpu=memory_of(model), cpu=ram_for(model), device=device)
    handles = align(model, device, back=False)
    if prev_module_hook is not None:
        handles.append(model.register_forward_pre_hook(Before(prev_module_hook)))
    Dispatch(model, session, handles)
    hook = UserCpuOffloadHook(model)
    hook.offload()
    return model, hook


class UserCpuOffloadHook:
    """What `cpu_offload_with_hook` returns for `model`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def offload(self) -> None:
        """Take the weights from the execution device; the next call brings them back. Does nothing once removed."""
        dispatch = dispatch_of(self.model)
        if dispatch is not None:
            dispatch.session.offload(self.model)

    def remove(self) -> None:
        """Make the model plain again: see `remove_hook_from_module`."""
        remove_hook_from_module(self.model)
