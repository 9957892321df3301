"""Loading as the library of a model does it: its own code runs, on tensors that nobody has read yet.

[Note: a twin]
transformers renames, fuses, splits, casts and ties on loading, by rules that belong to the architecture and change with
its releases; and it computes buffers that no checkpoint has. All of that is done by `from_pretrained`, which takes a dict
of tensors as well as a directory. So it loads a second model from a dict of `CheckpointTensor`s: no weight is read or
allocated, and each of its parameters is a recipe. The user's model is then bound to those, by name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from tierstore.backend import SourceBackend
from tierstore.checkpoint.fit import Fit
from tierstore.checkpoint.lazy import CheckpointTensor, replace_by, unread_tensors
from tierstore.patch.regions import named_tensors


def load_as_its_library(
    model: torch.nn.Module, source: SourceBackend, dtype: torch.dtype | None
) -> tuple[Mapping[str, torch.Tensor], Fit] | None:
    """Return a value for each tensor of `model` by name, as transformers would load it; None for models that are not its own."""
    library: Any = sys.modules.get("transformers")  # the library of a model that exists has been imported
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    twin, fit = load_unread(type(model), model.config, source, dtype=dtype or model.dtype)
    values = dict(named_tensors({"": twin}))
    own = dict(named_tensors({"": model}))
    for name in own.keys() & values.keys():
        if values[name].shape != own[name].shape:
            fit.mismatched(name, values[name].shape, own[name].shape)
    return values, fit


def load_unread(kind: Any, config: Any, source: SourceBackend, **options: Any) -> tuple[Any, Fit]:
    """Let transformers load a model of class `kind` from the tensors of a checkpoint without reading them.

    The parameters of what it returns are `CheckpointTensor`s, apart from those that the checkpoint does not have, and those
    that were written to on loading: they are plain.
    """
    model, info = kind.from_pretrained(
        None, config=config, state_dict=unread_tensors(source), output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    for _, tensor in named_tensors({"": model}):
        if isinstance(tensor, CheckpointTensor) and tensor.own() is not None:
            replace_by(tensor, tensor.plain())
    fit = Fit(kind.__name__, source)
    fit.missing.extend(sorted(info["missing_keys"]))
    fit.unexpected.extend(sorted(info["unexpected_keys"]))
    for name, found, wanted in sorted(info["mismatched_keys"]):
        fit.mismatched(name, found, wanted)
    return model, fit
