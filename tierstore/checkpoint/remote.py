"""Checkpoints elsewhere: their files are fetched once, and used where they are from then on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import fsspec
from tqdm import tqdm

from tierstore.errors import CheckpointError

_FOLDER = "tierstore-checkpoints"
_PARTIAL = ".partial-"
_MARKS = ("ETag", "etag", "md5Hash", "md5", "crc32c", "sha256", "mtime", "LastModified", "last_modified", "created")


def fetched(url: str, below: Path) -> Path:
    """Fetch every file that lies directly in the directory `url` (or the one file there) and return where it is.

    The place is below `below` and belongs to these files as they are: once one is another there, all are fetched anew to
    another place. Files that are complete are not fetched again. Raises `CheckpointError` if there is nothing.
    """
    system, root = fsspec.core.url_to_fs(url)
    listed = [entry for entry in system.ls(root, detail=True) if entry["type"] == "file"]
    if not listed:
        raise CheckpointError(f"there are no files at {url}")
    marks = {_name(entry): [entry.get("size"), *(str(entry[mark]) for mark in _MARKS if mark in entry)] for entry in listed}
    digest = hashlib.sha256(json.dumps([url, sorted(marks.items())]).encode()).hexdigest()[:32]
    folder = below / _FOLDER / digest
    folder.mkdir(parents=True, exist_ok=True)
    for entry in tqdm(listed, desc="fetching the checkpoint", unit="file", delay=1.0, leave=False):
        _fetch(system, entry, folder / _name(entry))
    return folder / _name(listed[0]) if system.isfile(root) else folder


def _name(entry: dict[str, Any]) -> str:
    name: str = entry["name"].rstrip("/").rpartition("/")[2]
    return name


def _fetch(system: Any, entry: dict[str, Any], target: Path) -> None:
    """Fetch one file under another name and rename it: what has its name is complete."""
    if target.exists():
        return
    partial = target.with_name(f"{_PARTIAL}{target.name}")
    system.get_file(entry["name"], str(partial))
    size = partial.stat().st_size
    if entry.get("size") is not None and size != entry["size"]:
        raise CheckpointError(f"{entry['name']} came with {size} bytes instead of {entry['size']}; try again")
    partial.replace(target)
