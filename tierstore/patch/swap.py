"""Exchange what two tensor objects are, so that everybody who holds one of them sees the other's content."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OURS = ("_source", "_whole", "_is_param", "_kept", "_tie", "_copied", "_tiered", "_keys", "_image")


def own_attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """Return the attributes that users set on `tensor`, without ours."""
    return {name: value for name, value in tensor.__dict__.items() if name not in _OURS}


def replace_content(target: torch.Tensor, content: torch.Tensor) -> None:
    """Make the object `target` be what the fresh tensor `content` is; its users' attributes, hooks and gradient stay with it.

    A gradient that a graph made earlier still computes for the old content is passed on to `target` when it arrives.
    """
    content.__dict__.update(own_attributes(target))
    if isinstance(target, torch.nn.Parameter) and not isinstance(content, torch.nn.Parameter):
        content._is_param = True
    gradient, target.grad = target.grad, None
    try:
        _swap_payload(target, content)
    except BaseException:
        target.grad = gradient
        raise
    if gradient is not None:
        target.grad = gradient.to(target.device)
    if content.requires_grad and content._use_count() > 1:  # type: ignore[attr-defined]
        content.register_post_accumulate_grad_hook(functools.partial(_pass_on, weakref.ref(target)))  # type: ignore[no-untyped-call]


def _swap_payload(a: torch.Tensor, b: torch.Tensor) -> None:
    """Swap class, attributes and content of two tensors; the objects themselves keep their identity.

    Unlike `torch.utils.swap_tensors` it allows weak references, which stay on the objects (RNNs keep some to their
    weights), and graphs that are alive.
    """
    hooks = [(name, getattr(a, name), getattr(b, name)) for name in _HOOKS]
    for name, _, _ in hooks:  # they are tied to object and content both, and would come apart
        setattr(a, name, None)
        setattr(b, name, None)
    try:
        torch._C._swap_tensor_impl(a, b)  # first: it may refuse
        a.__class__, b.__class__ = b.__class__, a.__class__
        a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    finally:
        for name, of_a, of_b in hooks:
            setattr(a, name, of_a)
            setattr(b, name, of_b)


def _pass_on(target: weakref.ref[torch.Tensor], old: torch.Tensor) -> None:
    gradient, old.grad = old.grad, None
    tensor = target()
    if tensor is not None and gradient is not None:
        gradient = gradient.to(tensor.device)
        tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
