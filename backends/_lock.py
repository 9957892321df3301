"""What backends that own a directory share: its lock, its marker, and keys and specs as JSON fields."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, TypeGuard

from tierstore.errors import BackendError, CorruptionError
from tierstore.spec import TensorSpec, dtype_named

TEMPORARY = ".tmp-"
"""Prefix of everything unfinished; what bears it at opening is the remainder of a crash."""


class DirectoryLock:
    """An exclusive flock on `file`, which is created if need be, until `release`.

    The kernel frees it when the process dies, however it dies; and it goes with the object when that is forgotten.
    """

    def __init__(self, file: Path) -> None:
        self._pid = os.getpid()
        self._file = FileIO(file, "ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if not isinstance(error, BlockingIOError):
                raise
            raise BackendError(f"another store has {file.parent} open; close that one first or choose another directory") from None

    @property
    def owned(self) -> bool:
        """False in a forked child, which shares the lock with its parent and must not give it away."""
        return os.getpid() == self._pid

    def release(self) -> None:
        """Give the lock up; call once."""
        if self.owned:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # closing alone would leave it with forked children
        self._file.close()


@contextmanager
def opening(root: Path) -> Iterator[None]:
    """Turn what the operating system refuses while a store opens into a `BackendError` naming `root`."""
    try:
        yield
    except CorruptionError:  # an OSError too, and already clear
        raise
    except OSError as error:
        raise BackendError(f"cannot open a store in {root}: {error}; choose a directory that this user may write to") from error


def prepare_root(root: Path, *, marker: str, ignored: str = "") -> bool:
    """Create `root`, or accept it if it holds `marker` or nothing of another's; return whether the marker is there."""
    if root.exists() and not root.is_dir():
        raise BackendError(f"{root} is a file, and a store needs a directory; choose another path")
    root.mkdir(parents=True, exist_ok=True)
    names = {entry.name for entry in root.iterdir()}
    foreign = sorted(name for name in names if name != ignored and not name.startswith(TEMPORARY))
    if foreign and marker not in names:
        raise BackendError(f"{root} belongs to something else (it holds {foreign[0]!r} and no {marker}); choose an empty or new directory")
    if not os.access(root, os.W_OK | os.X_OK):
        raise BackendError(f"{root} is not writable; choose another directory or change its permissions")
    return marker in names


def check_format(root: Path, found: object, *, name: str, version: int) -> None:
    """Raise `BackendError` unless `found`, which was read from the marker of `root`, says this format and version."""
    if not isinstance(found, dict) or found.get("format") != name:
        raise BackendError(f"{root} belongs to something else than {name}; choose another directory")
    if found.get("version") != version:
        raise BackendError(
            f"{root} has version {found.get('version')!r} of {name}, and this tierstore reads version {version}; "
            f"open it with the tierstore that wrote it"
        )


def read_json(file: Path) -> object:
    """Return what the JSON `file` says, or None if it is not JSON."""
    try:
        return parse_json(file.read_bytes())
    except ValueError:
        return None


def parse_json(text: bytes | str, pairs: Callable[[list[tuple[str, object]]], object] | None = None) -> Any:
    """Return what `text` from anywhere says, objects as `pairs` makes them; raise `ValueError` if it is no JSON, or nested too deep."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def sync_path(path: Path) -> None:
    """Make a file's bytes, or a directory's names, survive a power loss."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def key_fields(key: str, name: str) -> dict[str, str]:
    """Return `key` as a field called `name`, or `name`_hex: strict JSON readers refuse the lone surrogates it may hold."""
    with suppress(UnicodeEncodeError):
        key.encode()
        return {name: key}
    return {f"{name}_hex": key.encode("utf-8", "surrogatepass").hex()}


def key_from(fields: Mapping[str, object], name: str) -> str:
    """Return the key that `key_fields` wrote; raise `ValueError` if there is none."""
    plain, coded = fields.get(name), fields.get(f"{name}_hex")
    if isinstance(plain, str):
        return plain
    if isinstance(coded, str):
        return bytes.fromhex(coded).decode("utf-8", "surrogatepass")
    raise ValueError("it names no key")


def spec_from(dtype: object, shape: object, stride: object) -> TensorSpec:
    """Return the spec that a dtype name and two JSON lists describe; raise `ValueError` if they describe none."""
    found = dtype_named(dtype) if isinstance(dtype, str) else None
    if found is None:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not (_is_sizes(shape) and _is_sizes(stride) and len(shape) == len(stride)):
        raise ValueError("shape and stride do not describe a tensor")
    return TensorSpec(found, tuple(shape), tuple(stride))


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)
