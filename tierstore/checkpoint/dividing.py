"""Cuts values of a checkpoint into pieces that come and go by themselves, like those of any other model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tierstore.backend import DivisibleBackend, SourceBackend
from tierstore.open_file import PAGE
from tierstore.patch.regions import StoredValue
from tierstore.pieces import piece_bytes
from tierstore.recipe import Recipe, cut
from tierstore.tier import Tier


def present(source: SourceBackend, recipes: Mapping[str, Recipe], fast: Tier) -> dict[str, StoredValue]:
    """Let `source` present these values to a store whose first tier is `fast`, and return how, by their names.

    Where not all of them fit into `fast`, each one that it divides, and whose bytes lie in a file in their order (a cast may
    come between), is presented in pieces.
    """
    return present_to_all(source, [(recipes, fast)])[0]


def present_to_all(source: SourceBackend, shares: Sequence[tuple[Mapping[str, Recipe], Tier]]) -> list[dict[str, StoredValue]]:
    """The same for several stores, each with values of its own and its first tier."""
    parts = {name: recipe for recipes, _ in shares for name, recipe in recipes.items()}
    source.bind(parts)
    found = [_presented(source, recipes, fast) for recipes, fast in shares]
    pieces = {key: part for _, divided in found for key, part in divided.items()}
    if pieces:
        whole = {value.keys[0] for values, _ in found for value in values.values() if value.memory is None}
        source.bind({name: recipe for name, recipe in parts.items() if name in whole} | pieces)
    return [values for values, _ in found]


def _presented(source: SourceBackend, recipes: Mapping[str, Recipe], fast: Tier) -> tuple[dict[str, StoredValue], dict[str, Recipe]]:
    """Return how `source` presents values to the store of `fast`, by their names, and the pieces of those that are divided."""
    values = {name: StoredValue(recipe.spec, (name,)) for name, recipe in recipes.items()}
    budget, backend = fast.ledger.budget, fast.backend
    total = sum(recipe.spec.nbytes for recipe in recipes.values())
    if not isinstance(backend, DivisibleBackend) or budget is None or total <= budget:
        return values, {}
    size = piece_bytes(backend, budget, total)
    parts: dict[str, Recipe] = {}
    for name, recipe in recipes.items():
        phase = phase_of(source, name)
        pieces = pieces_of(name, recipe, phase, backend, size)
        if pieces:
            parts |= pieces
            values[name] = _placed(recipe, pieces, phase, backend)
    return values, parts


def phase_of(source: SourceBackend, name: str) -> int:
    """Return how far after a page of the file a value begins: so it should lie in memory, to be read around the page cache."""
    extent = source.extent(name)
    return 0 if extent is None else extent.offset % PAGE


def pieces_of(name: str, recipe: Recipe, phase: int, backend: DivisibleBackend, size: int) -> dict[str, Recipe]:
    """Return the recipe of each piece, of `size` bytes, of a value by its key; none if the value cannot, or should not, be divided."""
    nbytes = recipe.spec.nbytes
    if not backend.divides(phase + nbytes):
        return {}
    parts = [cut(recipe, start, stop - start) for start, stop in _borders(nbytes, phase, size)]
    found = {f"{name}[{number}]": part for number, part in enumerate(parts) if part is not None}
    return found if len(found) == len(parts) else {}


def _borders(nbytes: int, phase: int, size: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < nbytes:
        stop = min(nbytes, start + size - (start + phase) % size)
        yield start, stop
        start = stop


def _placed(recipe: Recipe, pieces: Mapping[str, Recipe], phase: int, backend: DivisibleBackend) -> StoredValue:
    memory = backend.reserve(recipe.spec.nbytes, phase)
    backend.place(memory, {key: part.spec.nbytes for key, part in pieces.items()})
    return StoredValue(recipe.spec, tuple(pieces), memory)
