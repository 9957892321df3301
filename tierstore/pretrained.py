"""`from_pretrained`: a model of transformers whose weights stay where its checkpoint is."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tierstore.backend import SourceBackend
from tierstore.building import Disk, GpuSize, closing_on_failure
from tierstore.checkpoint.binding import Bound
from tierstore.checkpoint.lazy import CheckpointTensor, replace_by
from tierstore.checkpoint.library import load_unread
from tierstore.checkpoint.source import local_path, open_source
from tierstore.errors import BackendError, CheckpointError, TierStoreError
from tierstore.patch.regions import named_tensors
from tierstore.planning.names import policy_factory
from tierstore.planning.policy import PolicyFactory
from tierstore.recipe import Recipe
from tierstore.running import close_when_unused
from tierstore.session import budgets_of, over_checkpoint
from tierstore.sizes import Size

_OURS = ("device_map", "max_memory", "offload_folder", "state_dict", "gguf_file", "output_loading_info", "ignore_mismatched_sizes")


def from_pretrained(
    auto_class: Any,
    checkpoint: str | os.PathLike[str],
    *,
    gpu: GpuSize | None = None,
    cpu: Size | None = None,
    disk: Disk | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    policy: str | PolicyFactory = "auto",
    strict: bool = True,
    **options: Any,
) -> Any:
    """Return what `auto_class.from_pretrained(checkpoint, dtype=dtype, **options)` of transformers would, already under `tiered`.

    `checkpoint` is a directory, or the URL of one. No weight is read before it is used, and none is copied: the files are
    the disk tier. All that transformers does on loading is done (renames, fusions, casts, ties, buffers, the generation
    config, evaluation mode); what has to be computed is, weight by weight, when it is needed. `dtype` is that of the config
    by default. The other arguments are those of `tiered`. The session is `model.tiered`; `model.tiered.close()` makes the
    model plain.

    Weights that the checkpoint lacks raise `CheckpointError`, or are initialised by transformers if not `strict`; those of
    another shape always raise.
    """
    library = transformers_library()
    refused = [name for name in options if name in _OURS]
    if refused:
        raise CheckpointError(f"{', '.join(refused)} cannot be given here: gpu=, cpu= and disk= say where weights go")
    policy_factory(policy)
    budgets = budgets_of(device, gpu, cpu, policy)
    folder = local_path(checkpoint, disk[0] if isinstance(disk, tuple) else disk)
    source = open_source(folder, disk)
    with closing_on_failure(source):
        model = unread_model(library, auto_class, folder, source, dtype=dtype, strict=strict, **options)
        bound = bind_itself(model)
    session = over_checkpoint({"": model}, source, bound, budgets)
    close_when_unused(session)
    model.tiered = session
    return model


def transformers_library() -> Any:
    """Return the package transformers; raise `BackendError` with the way to get it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise BackendError(f"from_pretrained needs transformers ({error}); pip install 'transformers>=5'") from error


@contextmanager
def explained(what: str, place: Path) -> Iterator[None]:
    """Turn what transformers says of something that it cannot load from `place` into one line of a `CheckpointError`."""
    try:
        yield
    except TierStoreError:  # some are OSErrors or ValueErrors as well, and clear already
        raise
    except (ImportError, KeyError, OSError, ValueError) as error:
        raise CheckpointError(f"transformers cannot load {what} from {place}: {' '.join(str(error).split())}") from error


def unread_model(
    library: Any, auto_class: Any, folder: Path, source: SourceBackend, *, dtype: torch.dtype | str | None, strict: bool, **options: Any
) -> Any:
    """Let transformers build the model and load it from tensors that nobody reads; its parameters are `CheckpointTensor`s."""
    config = options.pop("config", None)
    if not isinstance(config, library.PretrainedConfig):
        loader = getattr(auto_class, "config_class", None) or library.AutoConfig
        config, options = loader.from_pretrained(config or folder, return_unused_kwargs=True, **options)
    kind, config = _concrete(auto_class, config, options.pop("trust_remote_code", None))
    if options.get("generation_config") is None and kind.can_generate():
        options["generation_config"] = _generation_config(library, folder)
    model, fit = load_unread(kind, config, source, dtype=dtype or "auto", **options)
    fit.report(strict=strict)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model


def _concrete(auto_class: Any, config: Any, trust: bool | None) -> tuple[Any, Any]:
    """Return the class that an auto class chooses for a config, and the config that it gives it."""
    if isinstance(auto_class, type) and issubclass(auto_class, torch.nn.Module):
        return auto_class, config
    with torch.device("meta"):
        chosen = auto_class.from_config(config, **({} if trust is None else {"trust_remote_code": trust}))
    return type(chosen), chosen.config


def _generation_config(library: Any, folder: Path) -> Any:
    try:
        return library.GenerationConfig.from_pretrained(folder)
    except OSError:  # older checkpoints keep these settings in the model's config
        return library.GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def bind_itself(model: torch.nn.Module) -> Bound:
    """Turn the unread tensors of a model into ones on the meta device, and return what they were."""
    names: dict[int, str] = {}
    recipes: dict[str, Recipe] = {}
    for name, tensor in named_tensors({"": model}):
        if not isinstance(tensor, CheckpointTensor):
            continue
        recipes[name], spec, names[id(tensor)] = tensor.recipe, tensor.recipe.spec, name
        meta = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")
        replace_by(tensor, meta)
    return Bound(names, recipes)
