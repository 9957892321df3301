"""Verifying and repairing a disk store: reads every blob, and makes the index anew from them where it has to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tierstore.backends._disk.index import COMMITS, Index, State
from tierstore.backends._disk.layout import (
    LOCK,
    MARKER,
    Format,
    Root,
    VersionError,
    existing_format,
    give_lock,
    new_index,
    open_index,
    prepare,
    read_count,
    read_format,
    sweep,
    take_lock,
    write_format,
)  # fmt: skip
from tierstore.backends._disk.reading import Blobs
from tierstore.backends._disk.rows import Row, blob_name
from tierstore.backends._lock import opening
from tierstore.errors import BackendError, CorruptionError
from tierstore.file_system import FileSystem
from tierstore.maintenance import Finding, Inspection

DAMAGED = "damaged"
"""Where `repair` puts blobs that are not sound: most of their bytes may be right, and only their owner can tell."""

_LEAP = 1 << 20


@dataclass(slots=True)
class Scan:
    """What reading every blob has shown: the sound ones, by id, with the store that each belongs to; and what is wrong."""

    sound: dict[str, tuple[Row, str]] = field(default_factory=dict)
    damaged: dict[str, Finding] = field(default_factory=dict)

    def newest(self, store: str) -> dict[str, Row]:
        """Return the rows that an index made from the blobs of one store has."""
        rows: dict[str, Row] = {}
        for row, owner in self.sound.values():
            if owner in (store, "") and (row.key not in rows or row.generation > rows[row.key].generation):
                rows[row.key] = row
        return rows

    def owner(self) -> str:
        """Return the store that most blobs belong to; "" if there are none."""
        counts = Counter(owner for _, owner in self.sound.values() if owner)
        return counts.most_common(1)[0][0] if counts else ""


def verify(path: Path, system: FileSystem) -> Inspection:
    """Check everything in a store that other processes may be using."""
    with _at(path, system) as (root, blobs):
        found = existing_format(root)
        if found.version == 1:
            scan = scan_blobs(root, blobs)
            return _inspection(scan.newest("").values(), scan.damaged.values())
        try:
            index = open_index(root, found.store, writable=False)
        except CorruptionError as error:
            scan = scan_blobs(root, blobs)
            wrong = Finding(error.key, error.file, error.reason)
            return _inspection(scan.newest(found.store).values(), [wrong, *scan.damaged.values()])
        try:
            return _verify_rows(root, blobs, index)
        finally:
            index.close()


def repair(path: Path, system: FileSystem) -> Inspection:
    """Put a store right that nobody else has open."""
    with _at(path, system) as (root, blobs):
        if MARKER not in root.system.names(root.descriptor) and not root.shards():  # the lock would make a file
            raise BackendError(f"there is no store in {path}")
        lock = take_lock(root)
        try:
            return _repair(root, blobs)
        finally:
            give_lock(root, lock)


def scan_blobs(root: Root, blobs: Blobs) -> Scan:
    """Read and check every blob."""
    scan = Scan()
    for blob in root.blobs():
        try:
            row, store = root.read_blob(blob)
            blobs.check(row)
            scan.sound[blob] = row, store
        except FileNotFoundError:  # another process has deleted it
            continue
        except OSError as error:
            scan.damaged[blob] = _finding(error, root.path / blob_name(blob))
    return scan


@contextmanager
def _at(path: Path, system: FileSystem) -> Iterator[tuple[Root, Blobs]]:
    with opening(path):
        root = Root(path, system)
        try:
            with Blobs(path, system, "always") as blobs:
                yield root, blobs
        finally:
            root.close()


def _verify_rows(root: Root, blobs: Blobs, index: Index) -> Inspection:
    sound, findings = [], []
    for key in sorted(index.rows):
        row: Row | None = index.rows.get(key)
        while row is not None:
            try:
                blobs.check(row)
                sound.append(row)
                break
            except FileNotFoundError:
                index.refresh()
                before, row = row, index.rows.get(key)  # another process may have replaced or deleted it
                if row == before:
                    findings.append(Finding(key, str(blobs.path_of(row)), "the file is missing"))
                    break
            except OSError as error:
                findings.append(_finding(error, blobs.path_of(row)))
                break
    return _inspection(sound, [*findings, *_odd_commits(root, index.state), *_orphans(root, index)])


def _odd_commits(root: Root, state: State) -> Iterator[Finding]:
    """Tell of a count of commits that is missing; opening the store for writing makes it anew."""
    if read_count(root, state.store) == (0, b""):
        yield Finding("?", str(root.path / COMMITS), "it is missing")


def _orphans(root: Root, index: Index) -> list[Finding]:
    """Return what a crash has left, unless somebody is writing, who may be about to commit it."""
    descriptor = root.system.open(LOCK, os.O_RDONLY, folder=root.descriptor)
    try:
        if not root.system.lock(descriptor):
            return []
        index.refresh()
        known = {row.name for row in index.rows.values()}
        names = [name for blob in root.blobs() if (name := blob_name(blob)) not in known]
    finally:
        give_lock(root, descriptor)
    return [Finding("?", str(root.path / name), "it belongs to no value; opening the store for writing removes it") for name in names]


def _repair(root: Root, blobs: Blobs) -> Inspection:
    scan = scan_blobs(root, blobs)
    findings: list[Finding] = []
    found = _format(root, scan, findings)
    unfinished = _unfinished(root, found, scan)
    findings += [_ownerless(root, blob) for blob in sorted(unfinished)]
    for blob in sorted(scan.damaged.keys() - unfinished):
        finding = scan.damaged[blob]
        findings.append(Finding(finding.key, finding.file, f"{finding.problem}; moved to {_set_aside(root, blob)}"))
    _drop_odd_count(root, found.store, findings)
    index = prepare(root) if found.version == 1 else _sound_index(root, found, scan, findings)
    try:
        rows = dict(index.rows)
    finally:
        index.close()
    findings += [_ownerless(root, row.blob, row.key) for row, _ in scan.sound.values() if rows.get(row.key) != row]
    sweep(root, rows)
    return _inspection(rows.values(), findings)


def _unfinished(root: Root, found: Format, scan: Scan) -> set[str]:
    """Return the damaged blobs that are known to belong to no value, as a crash leaves them in the middle of a write."""
    if found.version == 1:
        return set()
    try:
        index = open_index(root, found.store, writable=False)
    except CorruptionError:
        return set()
    try:
        return scan.damaged.keys() - {row.blob for row in index.rows.values()}
    finally:
        index.close()


def _ownerless(root: Root, blob: str, key: str = "?") -> Finding:
    return Finding(key, str(root.path / blob_name(blob)), "it belongs to no value; removed")


def _format(root: Root, scan: Scan, findings: list[Finding]) -> Format:
    """Return what FORMAT says, or would say if it were whole: the blobs know whose they are."""
    try:
        found = read_format(root)
    except VersionError:
        raise
    except BackendError as error:
        store = scan.owner()
        if not store:
            raise
        write_format(root, store)
        findings.append(Finding("?", str(root.path / MARKER), f"{error}; written anew for the store that the blobs belong to"))
        return Format(2, store)
    if found is None:
        raise BackendError(f"there is no store in {root.path}")
    return found


def _sound_index(root: Root, found: Format, scan: Scan, findings: list[Finding]) -> Index:
    """Open the index without the rows whose blobs are not sound; one that is damaged itself is made anew first."""
    try:
        index = open_index(root, found.store, writable=True)
    except CorruptionError as error:
        findings.append(Finding(error.key, error.file, f"{error.reason}; made anew from the blobs, newest first"))
        _remake(root, found.store, scan)
        return open_index(root, found.store, writable=True)
    gone = [row for row in index.rows.values() if scan.sound.get(row.blob, (None, ""))[0] != row]
    told = {finding.key for finding in findings}
    reason = "its file is damaged, missing, or of another value; forgotten"
    findings += [Finding(row.key, str(root.path / row.name), reason) for row in gone if row.key not in told]
    if gone:
        index.commit([], gone)
    return index


def _drop_odd_count(root: Root, store: str, findings: list[Finding]) -> None:
    """Remove a damaged count of commits, which opening the store for writing makes anew."""
    try:
        read_count(root, store)
    except CorruptionError as error:
        root.remove(COMMITS)
        findings.append(_finding(error, root.path / COMMITS))


def _remake(root: Root, store: str, scan: Scan) -> None:
    """Write a new index in the place of one that is damaged; cut short, that leaves one that is still damaged."""
    rows = scan.newest(store)
    generation = max((row.generation for row in rows.values()), default=0) + _LEAP
    new_index(root, State(store, generation, read_count(root, store)[0] + 1), rows.values())


def _set_aside(root: Root, blob: str) -> str:
    """Move a damaged blob to where no store looks; return its new name."""
    root.make_folder(DAMAGED)
    name = f"{DAMAGED}/{blob_name(blob).rpartition('/')[2]}"
    root.system.rename(root.descriptor, blob_name(blob), name)
    return name


def _finding(error: OSError, file: Path) -> Finding:
    if isinstance(error, CorruptionError):
        return Finding(error.key, error.file, error.reason)
    return Finding("?", str(file), f"it cannot be read: {error}")


def _inspection(rows: Iterable[Row], findings: Iterable[Finding]) -> Inspection:
    sound = list(rows)
    return Inspection(len(sound), sum(row.nbytes for row in sound), tuple(findings))
