"""Exchange what two tensor objects are, so that everybody who holds one of them sees the other's content."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch

_OURS = ("_source", "_whole", "_is_param")


def own_attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """Return the attributes that users set on `tensor`, without ours."""
    return {name: value for name, value in tensor.__dict__.items() if name not in _OURS}


def replace_content(target: torch.Tensor, content: torch.Tensor) -> None:
    """Make the object `target` be what the fresh tensor `content` is; its users' attributes, hooks and gradient stay with it.

    A gradient that a graph made earlier still computes for the old content is passed on to `target` when it arrives.
    """
    content.__dict__.update(own_attributes(target))
    if isinstance(target, torch.nn.Parameter) and not isinstance(content, torch.nn.Parameter):
        content._is_param = True  # type: ignore[attr-defined]
    gradient, target.grad = target.grad, None
    _swap_payload(target, content)
    if gradient is not None:
        target.grad = gradient.to(target.device)
    if content.requires_grad and content._use_count() > 1:  # type: ignore[attr-defined]
        content.register_post_accumulate_grad_hook(functools.partial(_pass_on, weakref.ref(target)))


def _swap_payload(a: torch.Tensor, b: torch.Tensor) -> None:
    """Swap class, attributes and content of two tensors; the objects themselves keep their identity.

    Unlike `torch.utils.swap_tensors` it allows weak references, which stay on the objects (RNNs keep some to their
    weights), and graphs that are alive.
    """
    _swap_keeping(a, b, "_backward_hooks")
    _swap_keeping(a, b, "_post_accumulate_grad_hooks")
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)  # type: ignore[attr-defined]


def _swap_keeping(a: torch.Tensor, b: torch.Tensor, name: str) -> None:
    """Exchange a hook table in advance: it lives in the content, and so comes back with the swap."""
    of_a, of_b = getattr(a, name), getattr(b, name)
    if of_a or of_b:
        setattr(a, name, of_b)
        setattr(b, name, of_a)


def _pass_on(target: weakref.ref[torch.Tensor], old: torch.Tensor) -> None:
    gradient, old.grad = old.grad, None
    tensor = target()
    if tensor is not None and gradient is not None:
        gradient = gradient.to(tensor.device)
        tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
