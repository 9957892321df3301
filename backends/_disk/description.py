"""What is in the directory of a disk store, told without opening it as a tier and without changing anything."""

from __future__ import annotations

import os
from pathlib import Path

from tierstore.backends._disk.layout import LOCK, Root, existing_format, give_lock, open_index, read_rows
from tierstore.backends._disk.rows import Row
from tierstore.backends._lock import opening
from tierstore.file_system import FileSystem
from tierstore.maintenance import Contents


def describe(path: Path, system: FileSystem) -> Contents:
    """Return what the index of the store at `path` says, also while another process writes."""
    with opening(path):
        root = Root(path, system)
        try:
            found = existing_format(root)
            facts: dict[str, str | int | bool] = {"format": found.version, "store": found.store}
            if found.version == 1:
                rows = {row.key: row for row in read_rows(root)}
                facts["generation"] = max((row.generation for row in rows.values()), default=0)
            else:
                index = open_index(root, found.store, writable=False)
                rows, state = dict(index.rows), index.state
                index.close()
                facts |= {"generation": state.generation, "commits": state.commits}
            return _contents(root, rows, facts | {"open for writing": _is_locked(root)})
        finally:
            root.close()


def _contents(root: Root, rows: dict[str, Row], facts: dict[str, str | int | bool]) -> Contents:
    tensors = {key: (row.spec, row.name) for key, row in rows.items()}
    files = {str(file.relative_to(root.path)): file.stat().st_size for file in sorted(root.path.rglob("*")) if file.is_file()}
    return Contents(str(root.path), "disk store", tensors, files, facts)


def _is_locked(root: Root) -> bool:
    """True if another process, or another part of this one, has the store open for writing at this moment."""
    try:
        descriptor = root.system.open(LOCK, os.O_RDONLY, folder=root.descriptor)
    except FileNotFoundError:
        return False
    taken = False
    try:
        taken = root.system.lock(descriptor)
        return not taken
    finally:
        if taken:
            give_lock(root, descriptor)
        else:
            root.system.close(descriptor)
