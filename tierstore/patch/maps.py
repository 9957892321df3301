"""Values shown where they lie, without being fetched: private maps of files, which take no memory until they are touched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from tierstore.backend import DivisibleBackend, FileBackend, FileExtent, MappedBackend, MemoryBackend, SourceBackend
from tierstore.entry import Entry
from tierstore.open_file import PAGE
from tierstore.patch.stored import DividedSource, StoredSource
from tierstore.spec import raw_bytes, typed_view
from tierstore.writing import Moves

Part = FileExtent | torch.Tensor


def mapped(source: StoredSource) -> torch.Tensor | None:
    """Return a private map of the newest value of `source`; None unless files hold all of it."""
    moves = source.host.store.moves
    if isinstance(source, DividedSource):
        extents = {start: extent_of(moves, entry) for start, entry in pieces(source)}
        found: dict[int, Part] = {start: extent for start, extent in extents.items() if extent is not None}
        return composed(source, found.items()) if len(found) == len(extents) else None
    (entry,) = source.stored
    with moves.lock:
        for level in _levels(moves, entry):
            if isinstance(moves.tiers[level].backend, MappedBackend):
                return moves.tiers[level].backend.get(entry.key)
    return None


def complete(source: DividedSource) -> torch.Tensor:
    """Put what is missing of a value into its own addresses, and return the whole: its pieces do not move any more."""
    moves = source.host.store.moves
    parts = {start: _kept(moves, entry) for start, entry in pieces(source) if not entry.resident}
    _divisible(moves).complete(raw_bytes(source.whole.tensor), parts)
    return source.whole.tensor


def composed(source: DividedSource, parts: Iterable[tuple[int, Part]]) -> torch.Tensor:
    """Return the value that consists of `parts`, by the byte at which each starts, in memory of its own."""
    backend = _divisible(source.host.store.moves)
    with torch.inference_mode(False), torch.no_grad():
        memory = backend.reserve(source.spec.nbytes, source.whole.tensor.data_ptr() % PAGE)
        for start, part in parts:
            backend.complete(memory, {start: part})
        return typed_view(memory, source.spec)


def pieces(source: StoredSource) -> Iterator[tuple[int, Entry]]:
    """Yield each piece with the byte at which it starts."""
    start = 0
    for entry in source.stored:
        yield start, entry
        start += entry.nbytes


def lying(moves: Moves, entry: Entry) -> Part | None:
    """Return where the newest value of a piece lies in a file, or else the uint8 tensor that holds it, which nobody must change.

    None if no tier has it as it is: it would have to be computed.
    """
    extent = extent_of(moves, entry)
    if extent is not None:
        return extent
    with moves.lock:
        levels = _levels(moves, entry)
        backend = moves.tiers[next((level for level in levels if _in_place(moves, level)), levels[0])].backend
        if isinstance(backend, SourceBackend):
            return None
        moves.mark_busy(entry)
    try:
        return raw_bytes(backend.get(entry.key))  # without the lock: it may have to be decompressed, or come from far away
    finally:
        with moves.lock:
            moves.unmark_busy(entry)


def readable_in_place(source: StoredSource) -> bool:
    """True if all of a value lies in memory or in mapped files, where a part of it can be read without the rest."""
    moves = source.host.store.moves
    with moves.lock:
        return all(any(_in_place(moves, level) for level in entry.tiers) for entry in source.stored)


def _in_place(moves: Moves, level: int) -> bool:
    return isinstance(moves.tiers[level].backend, MemoryBackend | MappedBackend)


def _kept(moves: Moves, entry: Entry) -> Part:
    """Like `lying`, for somebody who keeps the value: what has to be computed is, and written to a file if it can be."""
    part = lying(moves, entry)
    if part is None:
        with moves.lock:
            backend = moves.tiers[_levels(moves, entry)[0]].backend
        assert isinstance(backend, SourceBackend)
        value = backend.keep(entry.key)
        part = extent_of(moves, entry) or raw_bytes(value)
    return part


def extent_of(moves: Moves, entry: Entry) -> FileExtent | None:
    """Return where a file has the newest value of a piece; None if none has it as it is."""
    with moves.lock:
        backends = [moves.tiers[level].backend for level in _levels(moves, entry)]
        extents = (backend.extent(entry.key) for backend in backends if isinstance(backend, FileBackend))
        return next((extent for extent in extents if extent is not None), None)


def _levels(moves: Moves, entry: Entry) -> list[int]:
    """Return the levels that hold the newest value, fastest first, once it does not move; expects the lock held."""
    moves.wait_until_idle(entry)
    moves.refresh(entry)
    return sorted(entry.tiers)


def _divisible(moves: Moves) -> DivisibleBackend:
    backend = moves.tiers[0].backend
    assert isinstance(backend, DivisibleBackend)
    return backend
