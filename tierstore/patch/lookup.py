"""Lookups of a few rows of a large weight, served from the file that holds it: the weight itself need not move."""

from __future__ import annotations

from typing import Any

import torch

from tierstore.backend import MappedBackend
from tierstore.entry import Entry
from tierstore.patch.source import EntrySource, Host
from tierstore.patch.wrapper import Wrapper

LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.aten.index_select.default)
LARGE = 1 << 20  # bytes; smaller weights are fetched
_FEW = 8  # a lookup of at most this fraction of a weight does not fetch it


def look_up(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Run `func` on a map of the weight's file if it picks few rows of a weight that is not resident; else return None.

    Only the pages of those rows are read, into the system's page cache.
    """
    table, indices = _arguments(func, args)
    source = table._source if isinstance(table, Wrapper) else None
    if not isinstance(source, EntrySource) or source.settled is not None or type(indices) is not torch.Tensor:
        return None
    assert isinstance(table, Wrapper)
    entry, device = source.entry, table.device
    picked = indices.numel() * (table.nbytes // max(table.shape[0], 1) if table.dim() else 0)
    if device.type != "cpu" or entry.nbytes < LARGE or picked * _FEW > entry.nbytes:
        return None
    plain = _map(source.host, entry, picked)
    if plain is None:
        return None
    result: torch.Tensor = func(table.show(plain), *args[1:], **kwargs)
    return result


def _arguments(func: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the weight and the indices of its rows, if `func` is a lookup of rows."""
    if func is torch.ops.aten.embedding.default:
        return args[0], args[1]
    if func is torch.ops.aten.index_select.default and args[1] == 0:
        return args[0], args[2]
    return None, None


def _map(host: Host, entry: Entry, nbytes: int) -> torch.Tensor | None:
    """Return a map of the file that holds the newest value of `entry`, unless it is resident or no file does."""
    moves = host.store.moves
    with moves.lock:
        moves.wait_until_idle(entry)
        if entry.resident:
            return None
        for level in sorted(entry.tiers):
            backend = moves.tiers[level].backend
            if isinstance(backend, MappedBackend):
                entry.looked_up = True
                now = moves.engine.now()
                moves.counters.link_busy(level, 0, now)
                moves.counters.link_idle(level, 0, now, nbytes)
                return backend.get(entry.key)
    return None
