"""Runs a model plainly and tiered, and compares everything bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tierstore import Tiered, tiered

Step = Callable[[torch.nn.Module], Any]


def nbytes(model: torch.nn.Module) -> int:
    """Bytes of the distinct parameters and buffers of `model`."""
    return sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def largest(model: torch.nn.Module) -> int:
    """Bytes of the largest set of tensors that one module owns directly."""
    return max(sum(t.nbytes for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))) for m in model.modules())


def anonymous_bytes() -> int:
    """Bytes of this process's memory that are no pages of files."""
    return told_bytes("status", "RssAnon")


def told_bytes(file: str, row: str) -> int:
    """Bytes that Linux tells of this process in a row of a file; `OSError` or `KeyError` where it does not."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self", file).read_text().splitlines())
    return int(rows[row].split()[0]) * 1024


def under_pressure(model: torch.nn.Module, disk: Path, share: float = 1 / 3) -> Tiered:
    """A third of the bytes in the fast tier (or what one module needs), a third in the next, the rest on disk."""
    total = nbytes(model)
    return tiered(model, gpu=max(int(total * share), largest(model)), cpu=int(total * share), disk=disk, device="cpu")


def same(a: Any, b: Any) -> bool:
    """True if two structures hold bitwise equal tensors (NaN equals NaN) of equal dtype and shape."""
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(_same(x, y) for x, y in zip(left, right, strict=True))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return type(a) is type(b) and (a == b or a is b)
    return (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(t.detach()).clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def compare(
    make: Callable[[], torch.nn.Module],
    step: Step,
    disk: Path,
    *,
    grad: bool = True,
    start: Callable[[torch.nn.Module, Path], Tiered] = under_pressure,
) -> Tiered:
    """Run `step` on a plain model and on an equal one that `start` tiers; results, gradients, state and what remains are the same."""
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    model = make()
    objects = dict(model.named_parameters())
    torch.manual_seed(1)
    with torch.set_grad_enabled(grad):
        expected = step(plain)
    expected_random = torch.rand(1)
    torch.manual_seed(1)
    with start(model, disk) as session, torch.set_grad_enabled(grad):
        result = step(model)
        assert torch.equal(torch.rand(1), expected_random), "random numbers differ"
        assert same(result, expected), "results differ"
        assert same(gradients(model), gradients(plain)), "gradients differ"
        assert same(state(model), state(plain)), "state inside the `with` differs"
        within_budget(session)
    assert same(state(model), state(plain)), "state after the `with` differs"
    assert same(gradients(model), gradients(plain)), "gradients after the `with` differ"
    assert restored(model, objects)
    return session


def nothing_leased(session: Tiered) -> bool:
    """True if no lease is left but those of what is held plain for good."""
    held = sum(entry.nbytes for entry in session._attachment._held.values())
    return session.store.moves.leased_bytes == held


def within_budget(session: Tiered) -> None:
    for name, tier in session.stats().tiers.items():
        assert tier.budget_bytes is None or tier.peak_bytes <= tier.budget_bytes, name


def restored(model: torch.nn.Module, objects: dict[str, torch.nn.Parameter]) -> bool:
    """True if `model` holds the same Parameter objects as before, plain, in plain dicts, and nothing of ours is left on it."""
    for module in model.modules():
        assert type(module._parameters) is dict, type(module._parameters)
        assert "_compiled_call_impl" not in module.__dict__
    for name, parameter in model.named_parameters():
        assert parameter is objects[name], f"{name} is another object"
        assert type(parameter).__module__.startswith("torch") or not hasattr(parameter, "_source"), type(parameter)
        assert not hasattr(parameter, "_source"), name
    return True
