"""How often a tensor and its memory are referred to: what is not referred to by anybody else may leave."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch


def references(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return how often `tensor` is referred to from Python and from C++ (autograd), and its storage likewise (views, numpy).

    The numbers mean something only beside those of another moment, asked for in the same way.
    """
    counted = cast(Any, tensor)  # the counters are not in torch's stubs
    storage = counted.untyped_storage()
    return (
        sys.getrefcount(tensor),
        counted._use_count(),
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
    )
