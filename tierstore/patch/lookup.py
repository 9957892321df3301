"""Lookups of a few rows of a large weight, read where they lie: the weight itself need not move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tierstore.backend import FileExtent
from tierstore.entry import Entry
from tierstore.open_file import OpenFile
from tierstore.patch.maps import Part, lying, pieces, readable_in_place
from tierstore.patch.stored import StoredSource
from tierstore.patch.wrapper import Wrapper
from tierstore.spec import TensorSpec, raw_bytes, typed_view
from tierstore.writing import Moves

LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.aten.index_select.default)
LARGE = 1 << 20  # bytes; smaller weights are fetched
_FEW = 8  # a lookup of at most this fraction of a weight does not fetch it


def look_up(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Run `func` on nothing but the rows it picks, if they are few of a large weight; else return None.

    A weight that is resident is used where it is, but no policy is told: for a few rows it need not stay.
    """
    table, indices = _arguments(func, args)
    source = table._source if isinstance(table, Wrapper) else None
    if not isinstance(source, StoredSource) or source.settled is not None or type(indices) is not torch.Tensor:
        return None
    spec = source.spec
    if spec.nbytes < LARGE or not (table._whole and _row_major(spec)) or indices.numel() * _FEW > spec.shape[0]:
        return None
    if source.resident:
        return _use_unnoticed(func, source, args, kwargs)
    if not readable_in_place(source):  # each lookup would get all of it, and keep nothing
        return None
    picked, places = torch.unique(indices.cpu(), return_inverse=True)
    if not picked.numel() or picked[0] < 0 or picked[-1] >= spec.shape[0]:
        return None
    rows = _read_rows(source, picked.tolist(), spec.nbytes // spec.shape[0])
    if rows is None:
        return None
    result: torch.Tensor = _on_rows(func, rows.to(table.device), places.to(table.device), args, kwargs)
    return result


def may_be_looked_up(source: StoredSource) -> bool:
    """True for a large value, unless all of it was needed for something before."""
    return any(entry.looked_up is not False for entry in source.stored) and source.spec.nbytes >= LARGE


def _arguments(func: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the weight and the indices of its rows, if `func` is a lookup of rows."""
    if func is torch.ops.aten.embedding.default:
        return args[0], args[1]
    if func is torch.ops.aten.index_select.default and args[1] == 0:
        return args[0], args[2]
    return None, None


def _use_unnoticed(func: Any, source: StoredSource, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Run `func` on the resident weight; None if it has left meanwhile."""
    moves = source.host.store.moves
    with moves.lock:
        if not moves.lease_unnoticed(source.stored):
            return None
    try:
        result: torch.Tensor = func(source.read(), *args[1:], **kwargs)
        return result
    finally:
        with moves.lock:
            moves.release(source.stored)


def _on_rows(func: Any, rows: torch.Tensor, places: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do the lookup in a table of just the rows; what else an embedding is told matters for its gradient only."""
    if func is torch.ops.aten.embedding.default:
        return func(rows, places)
    return func(rows, 0, places, **kwargs)


def _row_major(spec: TensorSpec) -> bool:
    return len(spec.shape) > 0 and spec.shape[0] > 0 and spec.dense and spec.stride[0] * spec.shape[0] == spec.extent


def _read_rows(source: StoredSource, rows: list[int], row_bytes: int) -> torch.Tensor | None:
    """Return these rows of a value, which are in ascending order, each once; None if they would have to be computed."""
    spec = source.spec
    with torch.inference_mode(False), torch.no_grad():
        out = torch.empty(len(rows) * row_bytes, dtype=torch.uint8)
        for start, entry in pieces(source):
            wanted = list(_within(rows, row_bytes, start, start + entry.nbytes))
            if wanted and not _read_piece(source, entry, wanted, out):
                return None
            entry.looked_up = True
        return typed_view(out, TensorSpec(spec.dtype, (len(rows), *spec.shape[1:]), spec.stride))


def _within(rows: list[int], row_bytes: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield what a piece from byte `start` to `stop` has of the rows: at which byte of it, where to put that, how many bytes."""
    for number, row in enumerate(rows):
        first, last = max(row * row_bytes, start), min((row + 1) * row_bytes, stop)
        if first < last:
            yield first - start, number * row_bytes + first - row * row_bytes, last - first


def _read_piece(source: StoredSource, entry: Entry, wanted: list[tuple[int, int, int]], out: torch.Tensor) -> bool:
    """Copy parts of a piece, resident or not, into `out`; False if no tier has it as it is."""
    moves = source.host.store.moves
    with moves.lock:
        resident = entry.resident and moves.acquire([entry], "a lookup")
    try:
        part: Part | None = entry.tensor if resident and entry.tensor is not None else lying(moves, entry)
        if part is None:
            return False
        if isinstance(part, FileExtent):
            _read_file(part, wanted, out)
        else:
            raw = raw_bytes(part)
            for offset, target, nbytes in wanted:
                out[target : target + nbytes].copy_(raw[offset : offset + nbytes])
    finally:
        if resident:
            with moves.lock:
                moves.release([entry])
    if not resident:
        with moves.lock:
            _count(moves, entry, sum(nbytes for _, _, nbytes in wanted))
    return True


def _read_file(extent: FileExtent, wanted: list[tuple[int, int, int]], out: torch.Tensor) -> None:
    """Read through the page cache: rows that are used often are there next time. See [Note: reading a part] for checksums."""
    memory, file = out.numpy().data, OpenFile.of(extent.path, extent.file)
    try:
        extent.prove(file, [(offset, nbytes) for offset, _, nbytes in wanted])
        for offset, target, nbytes in wanted:
            file.read_cached(memory[target : target + nbytes], extent.offset + offset)
    finally:
        file.close()


def _count(moves: Moves, entry: Entry, nbytes: int) -> None:
    """Count `nbytes` that were read from where a value lies; expects the lock held."""
    level, now = min(entry.tiers), moves.engine.now()
    if level:
        moves.counters.link_busy(level, 0, now)
        moves.counters.link_idle(level, 0, now, nbytes)
