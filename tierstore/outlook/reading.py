"""Finds out what a checkpoint's model would keep in tiers: from headers and the config, as `from_pretrained` would bind them.

[Note: in which order]
The model is built on the meta device, and its modules are gone through in the order in which they were registered, which is
nearly always the order in which they are called. A module that is called several times in a pass counts once, an expert that
a router may leave out counts as used. Without transformers, or a config that it knows, only the files are left: their order,
and no ties, no buffers and no lookups of rows.
"""

from __future__ import annotations

import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tierstore.backend import DivisibleBackend, SourceBackend
from tierstore.checkpoint.dividing import phase_of, pieces_of
from tierstore.checkpoint.lazy import CheckpointTensor, unread_tensors
from tierstore.checkpoint.source import open_source
from tierstore.errors import BackendError, CheckpointError
from tierstore.outlook.weights import Part, Weight, Weights
from tierstore.patch.lookup import LARGE
from tierstore.patch.regions import find_regions, named_tensors
from tierstore.pretrained import bind_itself, explained, transformers_library, unread_model
from tierstore.recipe import Recipe, Stored, leaves_of
from tierstore.registry import open_backend
from tierstore.spec import TensorSpec

_AUTO = "AutoModelForCausalLM"  # for a config that names no class


def read_weights(checkpoint: Path, dtype: torch.dtype | None = None) -> Weights:
    """Return the weights of the model at `checkpoint`, a local directory or file, cast to `dtype` where that is given.

    Headers are read, and no weight. Raises `CheckpointError` or `CorruptionError` as opening the checkpoint would, also for
    weights that the model needs and the checkpoint lacks.
    """
    source = open_source(checkpoint, None)
    with closing(source), closing(open_backend("ram")) as ram:
        assert isinstance(ram, DivisibleBackend)
        model, note = _model(checkpoint, source, dtype)
        make = _Maker(source, ram)
        return _of_files(make, dtype, note) if model is None else _of_model(make, model, note)


def _model(checkpoint: Path, source: SourceBackend, dtype: torch.dtype | None) -> tuple[Any, str]:
    """Return the unread model, and what was warned of; None and the reason if only the files can be looked at."""
    if not (checkpoint / "config.json").is_file():
        return None, "there is no config.json"
    try:
        library = transformers_library()
    except BackendError as error:
        return None, str(error).removeprefix("from_pretrained needs ")
    try:
        config = library.AutoConfig.from_pretrained(checkpoint)
    except OSError as error:
        raise CheckpointError(f"{checkpoint / 'config.json'} cannot be read: {error}") from error
    except (ValueError, KeyError) as error:
        return None, f"transformers does not know this model ({str(error).splitlines()[0]})"
    kind = _kind(library, config)
    with warnings.catch_warnings(record=True) as heard, explained("the model", checkpoint):
        warnings.simplefilter("always", UserWarning)
        model = unread_model(library, kind, checkpoint, source, config=config, dtype=dtype, strict=True)
    return model, "; ".join(str(warning.message) for warning in heard if warning.category is UserWarning)


def _kind(library: Any, config: Any) -> Any:
    """Return the class that the config names, or else what chooses one."""
    for name in config.architectures or ():
        found = getattr(library, name, None)
        if found is not None:
            return found
    return getattr(library, _AUTO)


def _of_model(make: _Maker, model: Any, note: str) -> Weights:
    bound = bind_itself(model)
    make.source.bind(bound.recipes)
    named = list(named_tensors({"": model}))
    tables = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    weights: dict[str, Weight] = {}
    names: dict[int, str] = {}
    for region in find_regions(named):
        keys = [bound.names[id(binding.tensor)] for binding in region.bindings if id(binding.tensor) in bound.names]
        recipe = bound.recipes[keys[0]] if keys else None
        owners = tuple({_owner(name): None for binding in region.bindings for name in binding.names})
        rows = recipe is not None and not tables.isdisjoint(owners) and _is_looked_up(recipe)
        weights[region.name] = make.weight(region.name, recipe, region.spec, owners, rows=rows)
        names |= {id(binding.tensor): region.name for binding in region.bindings}
    found = [(path, names[id(tensor)]) for path, tensor in named if id(tensor) in names]
    trace = tuple(name for path, name in found if not (weights[name].row_bytes and _owner(path) in tables))
    return Weights(weights, trace, make.ram.piece_bytes, f"the modules of {type(model).__name__}", (note,) if note else ())


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _is_looked_up(recipe: Recipe) -> bool:
    """True if rows of a value are read by themselves: it is large, and lies in a file as it is."""
    return isinstance(recipe, Stored) and recipe.spec.nbytes >= LARGE


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes weights of the values that `source` presents; `ram` says how they would be divided."""

    source: SourceBackend
    ram: DivisibleBackend

    def weight(self, name: str, recipe: Recipe | None, spec: TensorSpec, owners: tuple[str, ...], *, rows: bool = False) -> Weight:
        """Return a weight; one without a recipe has its value in memory already, like a buffer that was computed."""
        if recipe is None:
            return Weight(name, spec, spec.nbytes, owners, (Part(name, spec.nbytes, spec.nbytes),))
        pieces = pieces_of(name, recipe, phase_of(self.source, name), self.ram, self.ram.piece_bytes) or {name: recipe}
        parts = tuple(Part(key, part.spec.nbytes, _file_bytes(part)) for key, part in pieces.items())
        row_bytes = spec.nbytes // spec.shape[0] if rows else 0
        return Weight(name, recipe.spec, _file_bytes(recipe), owners, parts, row_bytes)


def _file_bytes(recipe: Recipe) -> int:
    """Return the bytes that are read to make a value."""
    return sum(leaf.spec.nbytes for leaf in leaves_of(recipe))


def _of_files(make: _Maker, dtype: torch.dtype | None, why: str) -> Weights:
    """Return every tensor as a weight, in the order in which they lie in the files."""
    source = make.source
    recipes = {name: _cast(tensor, dtype).recipe for name, tensor in unread_tensors(source).items()}
    places = {name: source.extent(name) for name in recipes}
    order = sorted(recipes, key=lambda name: (place.path, place.offset, name) if (place := places[name]) else ("", 0, name))
    source.bind(recipes)
    weights = {name: make.weight(name, recipes[name], recipes[name].spec, (_owner(name),)) for name in order}
    note = f"{why}: the order of use is taken to be the order in the files; ties, buffers and lookups of rows are not known"
    return Weights(weights, tuple(order), make.ram.piece_bytes, "the files", (note,))


def _cast(tensor: Any, dtype: torch.dtype | None) -> CheckpointTensor:
    made: CheckpointTensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return made
