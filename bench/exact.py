"""Runs something plainly, tiered and with accelerate, and says where two runs differ in one bit."""

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import disk_offload
from torch import Tensor, nn
from transformers import PretrainedConfig

from tierstore import BudgetError, from_pretrained, tiered

Grads = dict[str, Tensor | None]
MORE_BUDGET = 6  # how often a budget may be raised: each operation that needs more says so only when it is reached


@dataclass(frozen=True)
class Outcome:
    """What one run gave: its output tensors and, where it went backward, the gradients by name."""

    outputs: list[Tensor]
    grads: Grads = field(default_factory=dict)


def seed_all(seed: int = 0) -> None:
    """Seeds every generator a model may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # BigBird draws its blocks from the global one
    random.seed(seed)


def tensors_in(thing: object, seen: set[int] | None = None) -> list[Tensor]:
    """Returns every tensor in a nest of containers and plain objects, such as caches, in order."""
    seen = set() if seen is None else seen
    if isinstance(thing, Tensor):
        return [thing]
    if thing is None or isinstance(thing, (str, int, float, bool, nn.Module, PretrainedConfig)) or id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, dict):
        items = list(thing.values())
    else:
        items = list(thing) if isinstance(thing, (list, tuple)) else list(getattr(thing, "__dict__", {}).values())
    return [tensor for item in items for tensor in tensors_in(item, seen)]


def copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def forward_only(call: Callable[[], object]) -> Outcome:
    """Calls without autograd; the outputs are copies, so that they outlive the weights they may share memory with."""
    seed_all()
    with torch.no_grad():
        return Outcome([t.detach().clone() for t in tensors_in(call())])


def forward_backward(call: Callable[[], object], leaves: dict[str, Tensor]) -> Outcome:
    """Calls, sends a fixed random projection of the outputs backward, and collects the gradients of the leaves."""
    for leaf in leaves.values():
        leaf.grad = None
    seed_all()
    outputs = tensors_in(call())
    copies = [t.detach().clone() for t in outputs]
    dice = torch.Generator().manual_seed(1)
    roots = [t for t in outputs if t.requires_grad]
    weights = [torch.randn(t.shape, generator=dice, dtype=t.dtype) for t in roots]
    if roots:
        torch.autograd.backward(roots, weights)
    grads = {name: copied(leaf.grad) for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return Outcome(copies, grads)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Says whether two tensors have the same type, shape and bits; any NaN equals any other."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
        return False
    if a.layout != torch.strided:
        return same(a.to_dense(), b.to_dense())
    if a.is_floating_point() or a.is_complex():
        if not torch.equal(a.isnan(), b.isnan()):
            return False
        a, b = a.masked_fill(a.isnan(), 0), b.masked_fill(b.isnan(), 0)
    return torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def difference(expected: Outcome, got: Outcome) -> str:
    """Names the first output or gradient that differs, with how far; an empty string if none does."""
    if len(expected.outputs) != len(got.outputs):
        return f"{len(got.outputs)} outputs instead of {len(expected.outputs)}"
    pairs = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(expected.outputs, got.outputs, strict=True))]
    pairs += [(f"gradient of {name}", grad, got.grads.get(name)) for name, grad in expected.grads.items()]
    for name, a, b in pairs:
        if not same(a, b):
            return f"{name} {distance(a, b)}"
    return ""


def distance(a: Tensor | None, b: Tensor | None) -> str:
    if a is None or b is None:
        return "is missing" if b is None else "should be missing"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"is {b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
    return f"is off by up to {(a.to_dense().double() - b.to_dense().double()).abs().max().item():.2g}"


def model_bytes(model: nn.Module) -> dict[int, int]:
    """Returns the bytes of each different parameter and buffer, by identity."""
    return {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}


def state_of(model: nn.Module) -> Outcome:
    """Returns copies of all parameters and buffers, also of buffers that a state_dict leaves out."""
    return Outcome([t.detach().clone() for t in [*model.state_dict().values(), *model.buffers()] if isinstance(t, Tensor)])


@contextmanager
def accelerate_offload(model: nn.Module) -> Iterator[None]:
    """Offloads all weights to disk with accelerate; the model is not usable afterwards.

    A model without weights runs as it is: accelerate raises for it, which is no finding about numbers.
    """
    if not model_bytes(model):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="zoo-accelerate-") as folder:
        disk_offload(model, folder, execution_device=torch.device("cpu"))
        yield


def tiered_run(model: nn.Module, run: Callable[[], Outcome]) -> tuple[Outcome, float]:
    """Runs with a third of the model's bytes in the fast tier, a third in RAM and the rest on disk.

    Where one operation alone needs more than the third, the fast tier gets what the error asks for. Returns the outcome
    and the share of the model's bytes that the fast tier had.
    """
    total = sum(model_bytes(model).values())
    budget = total // 3
    before = [(t, t.detach().clone()) for t in [*model.parameters(), *model.buffers()]]
    for _ in range(MORE_BUDGET):
        try:
            with (
                tempfile.TemporaryDirectory(prefix="zoo-tiered-") as disk,
                tiered(model, gpu=budget, cpu=total // 3, disk=disk, device="cpu"),
            ):
                outcome = run()
            return outcome, budget / max(total, 1)
        except BudgetError as error:
            if error.required_bytes <= budget:
                raise
            budget = error.required_bytes
            with torch.no_grad():  # the attempt may have got as far as the running statistics of a BatchNorm
                for tensor, value in before:
                    tensor.copy_(value)
    raise RuntimeError(f"the budget was raised {MORE_BUDGET} times, to {budget} of {total} bytes, and still did not do")


def reloaded_run(kind: Any, folder: str, total: int, run: Callable[[nn.Module], Outcome]) -> Outcome:
    """Runs a model of class `kind` whose weights stay in the checkpoint in `folder`, with a third of their `total` bytes in RAM.

    Where one operation alone needs more than the third, RAM gets what the error asks for.
    """
    budget = total // 3
    for _ in range(MORE_BUDGET):
        try:
            model = from_pretrained(kind, folder, cpu=budget, device="cpu")
            try:
                return run(model)
            finally:
                model.tiered.close()
        except BudgetError as error:
            if error.required_bytes <= budget:
                raise
            budget = error.required_bytes
    raise RuntimeError(f"the budget was raised {MORE_BUDGET} times, to {budget} of {total} bytes, and still did not do")
