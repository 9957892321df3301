"""The directory of a disk store: who owns it, which version it has, and what a crash left in it.

FORMAT        {"format": "tierstore-disk", "version": 2, "store": "<32 hex>"}, written last: a directory without it is nobody's
LOCK          locked while a store writes
index.sqlite  see `index`; with index.sqlite-wal and -shm while somebody has it open
COMMITS       how many commits there were
blobs/<2 hex>/<32 hex>.safetensors
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tierstore.backends._disk.blob import FORMAT_VERSION, decode_head, head_size
from tierstore.backends._disk.index import COMMITS, JOURNAL, PARTS, Commits, Index, State, damaged, read_commits, write_all
from tierstore.backends._disk.rows import BLOB_ID, SUFFIX, Row, blob_name
from tierstore.backends._disk.version_1 import decode_head_1
from tierstore.backends._lock import TEMPORARY, parse_json
from tierstore.checksum import checksum
from tierstore.errors import BackendError, CorruptionError
from tierstore.file_system import FileSystem

FORMAT_NAME = "tierstore-disk"
MARKER, LOCK, BLOBS = "FORMAT", "LOCK", "blobs"

_MOST = 4096  # bytes of FORMAT that are looked at
_SHARD = re.compile(r"[0-9a-f]{2}")


class VersionError(BackendError):
    """A store that another version of tierstore has written, which this one must leave alone."""


@dataclass(frozen=True, slots=True)
class Format:
    version: int
    store: str


class Root:
    """The open directory of a store. Names are looked up in it, wherever it may have been moved, and whatever has its path now."""

    def __init__(self, path: Path, system: FileSystem) -> None:
        self.path = path
        self.system = system
        self.descriptor = system.open(str(path), os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        with suppress(OSError):
            self.system.close(self.descriptor)

    @contextmanager
    def folder(self, name: str) -> Iterator[int]:
        """Open a directory in it for the length of a `with`."""
        descriptor = self.system.open(name, os.O_RDONLY | os.O_DIRECTORY, folder=self.descriptor)
        try:
            yield descriptor
        finally:
            with suppress(OSError):  # nothing is written through it
                self.system.close(descriptor)

    def sync(self) -> None:
        self.system.sync(self.descriptor)

    def make_folder(self, name: str) -> None:
        """Make a directory in it, unless there is one."""
        with suppress(FileExistsError):
            self.system.make_folder(self.descriptor, name)

    def remove(self, name: str) -> None:
        """Take a name away, unless it is gone."""
        with suppress(FileNotFoundError):
            self.system.unlink(self.descriptor, name)

    def read_start(self, name: str, most: int) -> tuple[bytes, int]:
        """Return up to `most` first bytes of a file, and its size."""
        descriptor = self.system.open(name, os.O_RDONLY, folder=self.descriptor)
        try:
            size = self.system.status(descriptor).st_size
            memory = memoryview(bytearray(min(most, size)))
            done = 0
            while done < len(memory) and (count := self.system.read(descriptor, memory[done:], done)):
                done += count
            return bytes(memory[:done]), size
        finally:
            self.system.close(descriptor)

    def replace(self, name: str, data: bytes) -> None:
        """Write a small file so that it has its old content or the whole new one, also after a power loss."""
        temporary = f"{TEMPORARY}{secrets.token_hex(8)}"
        descriptor = self.system.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder=self.descriptor)
        try:
            try:
                write_all(self.system, descriptor, data)
                self.system.sync(descriptor)
            finally:
                self.system.close(descriptor)
            self.system.rename(self.descriptor, temporary, name)
        except BaseException:
            with suppress(OSError):  # swept when the store is opened
                self.remove(temporary)
            raise
        self.sync()

    def shards(self) -> list[str]:
        """Return the directories of blobs, by name."""
        try:
            with self.folder(BLOBS) as blobs:
                return sorted(f"{BLOBS}/{name}" for name in self.system.names(blobs) if _SHARD.fullmatch(name))
        except FileNotFoundError:
            return []

    def files(self) -> Iterator[str]:
        """Yield the names of all files in the directories of blobs."""
        for shard in self.shards():
            with self.folder(shard) as folder:
                names = self.system.names(folder)
            yield from (f"{shard}/{name}" for name in sorted(names))

    def blobs(self) -> Iterator[str]:
        """Yield the id of every blob."""
        for name in self.files():
            blob = name.rpartition("/")[2].removesuffix(SUFFIX)
            if BLOB_ID.fullmatch(blob) and name == blob_name(blob):
                yield blob

    def read_blob(self, blob: str) -> tuple[Row, str]:
        """Return the row that a blob's header describes, and its store ("" for version 1); `CorruptionError` if it is damaged."""
        name = blob_name(blob)
        try:
            prefix, size = self.read_start(name, 8)
            head, _ = self.read_start(name, head_size(prefix, size))
            row, store = (decode_head_1(head, blob), "") if b'"tierstore":"1"' in head else decode_head(head, blob)
            if size != row.file_size:
                raise ValueError(f"the file has {size} bytes instead of {row.file_size}")
        except ValueError as error:
            raise CorruptionError("?", str(self.path / name), str(error)) from error
        return row, store


def read_format(root: Root) -> Format | None:
    """Return what FORMAT says, None if there is none; raise `BackendError` if the directory is not this format's to read."""
    try:
        text, _ = root.read_start(MARKER, _MOST)
    except FileNotFoundError:
        _refuse_foreign(root)
        return None
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT_NAME:
        raise BackendError(f"{root.path} belongs to something else than {FORMAT_NAME}; choose another directory")
    version, store = found.get("version"), found.get("store", "")
    if version not in (1, FORMAT_VERSION):
        raise VersionError(
            f"{root.path} has version {version!r} of {FORMAT_NAME}, and this tierstore reads versions 1 to {FORMAT_VERSION}; "
            "open it with the tierstore that wrote it"
        )
    if not isinstance(store, str) or (version > 1 and text != _encode_format(store)):
        raise BackendError(f"{root.path / MARKER} does not match its checksum; `python -m tierstore repair` makes it anew")
    return Format(version, store)


def existing_format(root: Root) -> Format:
    """Return what FORMAT says; raise `BackendError` also if there is none."""
    found = read_format(root)
    if found is None:
        raise BackendError(f"there is no store in {root.path}")
    return found


def read_rows(root: Root) -> list[Row]:
    """Return a row for every blob of a store that has no index; raise `CorruptionError` for the first that is damaged."""
    return [root.read_blob(blob)[0] for blob in root.blobs()]


def write_format(root: Root, store: str) -> None:
    root.replace(MARKER, _encode_format(store))


def _encode_format(store: str) -> bytes:
    fields = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "store": store}
    return json.dumps(fields | {"seal": checksum(json.dumps(fields).encode()).hex()}).encode()


def _refuse_foreign(root: Root) -> None:
    """Raise unless a directory without FORMAT is empty, or what a crash at its first opening leaves."""
    ours = {LOCK, COMMITS, *PARTS, JOURNAL}
    foreign = sorted(name for name in root.system.names(root.descriptor) if name not in ours and not name.startswith(TEMPORARY))
    if foreign:
        raise BackendError(
            f"{root.path} belongs to something else (it holds {foreign[0]!r} and no {MARKER}); choose an empty or new directory"
        )


def take_lock(root: Root) -> int:
    """Lock the directory for one writer; return the descriptor that holds the lock. The kernel frees it if the process dies."""
    descriptor = root.system.open(LOCK, os.O_RDWR | os.O_CREAT, folder=root.descriptor)
    try:
        if not root.system.lock(descriptor):
            raise BackendError(f"another store has {root.path} open; close that one first or choose another directory")
    except BaseException:
        root.system.close(descriptor)
        raise
    return descriptor


def give_lock(root: Root, descriptor: int) -> None:
    with suppress(OSError):
        root.system.unlock(descriptor)
    with suppress(OSError):
        root.system.close(descriptor)


def make_root(path: Path, system: FileSystem) -> None:
    """Make a directory and those above it that are missing, so that they are there after a power loss too."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        parent = system.open(str(folder.parent), os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(FileExistsError):
                system.make_folder(parent, folder.name)
            system.sync(parent)
        finally:
            system.close(parent)


def prepare(root: Root) -> Index:
    """Open the index of a directory that the caller has locked, after making or migrating what there is to be."""
    found = read_format(root)
    store = _found(root) if found is None or found.version == 1 else found.store
    return open_index(root, store, writable=True)


def open_index(root: Root, store: str, *, writable: bool) -> Index:
    """Open the index of the store with this id; raise `CorruptionError` if it is not the one that was committed to last."""
    counted, image = read_count(root, store)  # before the index is read, since another process may go on committing
    index = Index(root.path, root.system, writable=writable)
    missing = counted - index.state.commits
    if missing > 0 or index.state.store != store:
        index.close()
        reason = f"{missing} commits are missing" if index.state.store == store else f"it is of another store than {MARKER}"
        raise damaged(reason, index.path)
    if image and not missing and index.image() not in (image, b""):
        index.close()
        raise damaged("it has changed since it was closed", index.path)
    return index


def read_count(root: Root, store: str) -> tuple[int, bytes]:
    """Return what `COMMITS` says, 0 and b"" if there is none; raise `CorruptionError` if it is damaged."""
    try:
        return read_commits(root.read_start(COMMITS, 64)[0], store)
    except FileNotFoundError:
        return 0, b""
    except ValueError as error:
        raise CorruptionError("?", str(root.path / COMMITS), f"{error}; `python -m tierstore repair` makes it anew") from error


def _found(root: Root) -> str:
    """Write index and FORMAT of a new store, or of one in version 1, whose blobs stay as they are; return the store's id.

    FORMAT comes last: until it is there, a crash leaves a directory that is new, or in version 1, as before.
    """
    state = State(secrets.token_hex(16), commits=1)
    new_index(root, state, read_rows(root))
    write_format(root, state.store)
    return state.store


def new_index(root: Root, state: State, rows: Iterable[Row]) -> None:
    """Write an index with these rows in the place of whatever is there, and how many commits it has."""
    for name in (*PARTS, JOURNAL, COMMITS):
        root.remove(name)
    Index.create(root.path / PARTS[0], root.system, state, rows)
    commits = Commits(root.system, root.descriptor)
    try:
        commits.write(state, sync=True)
    finally:
        commits.close()
    root.sync()


def sweep(root: Root, rows: dict[str, Row]) -> None:
    """Remove unfinished files, and blobs that no row names: what a crash left between a blob and its commit, or after it."""
    for name in root.system.names(root.descriptor):
        if name.startswith(TEMPORARY):
            root.remove(name)
    known = {row.name for row in rows.values()}
    for name in list(root.files()):
        last = name.rpartition("/")[2]
        orphan = BLOB_ID.fullmatch(last.removesuffix(SUFFIX)) and last.endswith(SUFFIX) and name not in known
        if orphan or last.startswith(TEMPORARY):
            root.remove(name)
