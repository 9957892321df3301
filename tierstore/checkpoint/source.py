"""Opens what `checkpoint=` names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, cast

from tierstore.backend import Backend, SourceBackend
from tierstore.checkpoint.remote import fetched
from tierstore.errors import CheckpointError
from tierstore.registry import backend_class, open_url
from tierstore.sizes import Size, parse_size

Scratch = str | os.PathLike[str] | Backend


class _Opener(Protocol):
    def __call__(self, path: Path, *, scratch: Scratch | None, limit: int | None) -> SourceBackend: ...


def open_source(checkpoint: str | os.PathLike[str], disk: Scratch | tuple[Scratch, Size] | None) -> SourceBackend:
    """Open a checkpoint by its path, or by a URL whose files are fetched first; `disk` is where what is written goes.

    A size in `disk` limits what is written; the checkpoint's own bytes do not count.
    """
    scratch, size = disk if isinstance(disk, tuple) else (disk, None)
    limit = None if size is None else parse_size(size)
    path = local_path(checkpoint, scratch)
    opener = cast(_Opener, backend_class("checkpoint"))
    if isinstance(scratch, str) and "://" in scratch:
        scratch = open_url(scratch)
    return opener(path, scratch=scratch, limit=limit)


def local_path(checkpoint: str | os.PathLike[str], scratch: Scratch | None) -> Path:
    """Return where a checkpoint lies on this machine, after fetching it below the directory `scratch` if it is a URL."""
    text = os.fspath(checkpoint)
    if "://" not in text:
        return Path(text).expanduser()
    if scratch is None or isinstance(scratch, Backend) or "://" in os.fspath(scratch):
        raise CheckpointError(f"{text} has to be fetched to this machine; give disk=PATH for it, a directory with room for all of it")
    return fetched(text, Path(scratch))
