"""Stores that earlier versions of the disk format wrote, and the values that are in them.

`disk_1` was written by the last tierstore of format version 1, `disk_2` by the first of version 2. Never write them again.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tierstore.spec import TensorSpec, typed_view

HERE = Path(__file__).parent
DISK_1, DISK_2 = HERE / "disk_1", HERE / "disk_2"


def golden_values() -> dict[str, torch.Tensor]:
    """Return what every golden store holds. The bytes are counted up, so that they need no random generator to stay the same."""
    layouts = {
        "layer.weight": (torch.bfloat16, (64, 48), (48, 1)),
        "layer.bias": (torch.float32, (7,), (1,)),
        "transposed": (torch.float32, (3, 5), (1, 3)),
        "sliced": (torch.int16, (3, 2), (8, 3)),
        "scalar": (torch.float64, (), ()),
        "empty": (torch.float16, (2, 0, 3), (3, 3, 1)),
        "../\u65e5\u672c/\U0001f9ca": (torch.float8_e4m3fn, (11,), (1,)),
        "lone \ud800 surrogate": (torch.complex64, (2, 2), (2, 1)),
    }
    return {key: _counted(TensorSpec(*layout), start) for start, (key, layout) in enumerate(layouts.items())}


def _counted(spec: TensorSpec, start: int) -> torch.Tensor:
    raw = ((torch.arange(spec.nbytes) + start) * 37 % 251).to(torch.uint8)
    return typed_view(raw, spec)
