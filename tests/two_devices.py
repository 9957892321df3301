"""Devices that differ, on a machine that has one: tensors that say they are on "pair:0" or "pair:1" and hold their values in RAM.

Torch lets a process have one backend of its own, for good, so this belongs into a process of its own: see `test_crossing`.
Operations on tensors of several devices raise, as kernels do, except where torch copies between devices. Autograd of such a
backend knows one device, so gradients are looked at between "pair:0" and the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from tierstore.patch.crossing import Crossing, CrossingScope
from tierstore.patch.regions import find_regions, named_tensors
from tierstore.patch.shares import Share, share_out

CPU = torch.device("cpu")
ACROSS = (torch.ops.aten.copy_.default,)


class Module(_DummyBackendModule):
    def device_count(self) -> int:
        return 2

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Placed(torch.Tensor):
    """A tensor on a device of the pair; `raw` has its values."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, device: torch.device) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=device
        )

    def __init__(self, raw: torch.Tensor, device: torch.device) -> None:
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, dict(kwargs or {}))


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, after checking that it meets one device; what is new is where it asks for, or where the others are."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.dim() or tensor.device != CPU}
    if func is torch.ops.aten.index.Tensor and args[0].device != CPU:
        devices.discard(CPU)  # indices may come from there
    asked = kwargs.pop("device", None)
    if len(devices) > 1 and func not in ACROSS and not func.__name__.startswith("_foreach_"):
        raise RuntimeError(f"expected all tensors on one device, {func} got {sorted(map(str, devices))}")
    target = torch.device(asked) if asked is not None else args[0].device if func in ACROSS else next(iter(devices), CPU)
    target = torch.device("pair", target.index or 0) if target.type == "pair" else target
    result = func(*tree_map(values, args), **tree_map(values, kwargs))
    if func is torch.ops.aten._to_copy.default and result.data_ptr() == values(args[0]).data_ptr():
        result = result.clone()
    known = {id(values(tensor)): tensor for tensor in tensors}
    return tree_map(lambda item: known.get(id(item)) if id(item) in known else placed(item, target), result)


def values(item: Any) -> Any:
    return item.raw if isinstance(item, Placed) else item


def placed(item: Any, device: torch.device) -> Any:
    """Return a tensor of RAM as one on `device`."""
    return Placed(item, device) if isinstance(item, torch.Tensor) and device != CPU else item


_library = torch.library.Library("_", "IMPL")


def register() -> None:
    """Give this process the devices; once."""
    _setup_privateuseone_for_python_backend("pair", Module())
    _library.fallback(lambda func, *args, **kwargs: run(func, args, kwargs), dispatch_key="PrivateUse1")
    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        """Torch's own fails inside torch where the backend is written in Python."""
        return made(data, **options) if device is None else made(data, **options).to(device)

    torch.tensor = tensor  # type: ignore[assignment]


def spread(model: nn.Module, devices: Sequence[torch.device], *, alone: bool = False) -> nn.Module:
    """Put each share of a model, cut for equal budgets, on its device, and let its activations cross; or all `alone` on the first."""
    regions = find_regions(named_tensors({"": model}))
    shares = share_out({"": model}, regions, [sum(region.spec.nbytes for region in regions) // len(devices)] * len(devices))
    if alone:
        shares.parts = [Share(regions, list(model.modules())), *(Share() for _ in devices[1:])]
        shares.places = {module: places and (0,) for module, places in shares.places.items()}
    for part, device in zip(shares.parts, devices, strict=True):
        for region in part.regions:
            new = None
            for binding in region.bindings:
                kind = nn.Parameter if isinstance(binding.tensor, nn.Parameter) else torch.Tensor
                value = placed(binding.tensor.detach().clone(), device)
                new = new if new is not None else (nn.Parameter(value, binding.tensor.requires_grad) if kind is nn.Parameter else value)
                for name in binding.names:
                    owner, _, own = name.rpartition(".")
                    table = model.get_submodule(owner)
                    (table._parameters if kind is nn.Parameter else table._buffers)[own] = new  # type: ignore[assignment]
    crossing = Crossing(devices)
    room: Any = SimpleNamespace(moves=SimpleNamespace(noted=[], engine=SimpleNamespace(computing=lambda: None)))
    for module in model.modules():
        module.__dict__["_compiled_call_impl"] = CrossingScope(module, room, crossing, shares.places[module])
    return model


Make = Callable[[], nn.Module]
Step = Callable[[nn.Module], Any]


def compare(make: Make, step: Step, devices: Sequence[str], *, grad: bool = False) -> nn.Module:
    """Run `step` on a model that is all on the first device, and on an equal one that is spread: results and gradients are the same.

    Bit for bit between devices of the pair; the CPU has other kernels.
    """
    chain = [torch.device(device) for device in devices]
    results = []
    for alone in (True, False):
        torch.manual_seed(0)
        model = spread(make(), chain, alone=alone)
        where = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        assert where == set(chain[:1] if alone else chain), f"the model is on {where}"
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            found = step(model)
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        for name, weight in model.named_parameters():
            assert weight.grad is None or weight.grad.device == weight.device, name
        results.append((found, gradients))
    expected, spreads = (tree_leaves(result) for result in results)
    assert len(expected) == len(spreads)
    for want, have in zip(expected, spreads, strict=True):
        assert type(want) is type(have) or isinstance(want, torch.Tensor)
        if isinstance(want, torch.Tensor):
            close(values(have.detach()), values(want.detach()), exact=CPU not in chain)
    return model


def close(have: torch.Tensor, want: torch.Tensor, *, exact: bool) -> None:
    torch.testing.assert_close(have, want, **({"rtol": 0, "atol": 0} if exact else {}))
