"""What a remote tier needs of an fsspec file system: whole objects that appear at once, ranges of them, and a listing.

[Note: appearing at once]
Object stores (S3, Google's, Azure's) show an object when its upload is complete, in one part or in many, so there it is
written under its own name. A dict in memory does so as well. Any other file system shows a file while it is written: there
it is written under a name that no reader looks for, and renamed.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from tierstore.backends._retry import IncompleteError, Retries
from tierstore.errors import BackendError, RemoteError
from tierstore.registry import backend_names

_MULTIPART = frozenset(("s3", "s3a", "gs", "gcs"))
_WHOLE = frozenset(("memory", "abfs", "abfss", "az"))
_PACKAGES = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}  # the extra that brings each protocol
_S3 = ("s3", "s3a")
_ONE_TRY = {"retries": {"total_max_attempts": 1}}  # for botocore, below our own retries
_TEMPORARY = ".partial-"
_SMALLEST_PART, _PART_GRAIN = 5 << 20, 256 << 10  # bytes; what S3, and what Google's store asks of a part


class Bucket:
    """Objects below `url`, each request tried as often as `retries` says. Safe to call from several threads."""

    def __init__(self, url: str, options: Mapping[str, Any], retries: Retries, part_bytes: int) -> None:
        self.url = url.rstrip("/")
        self.protocol = url.partition("://")[0]
        self.retries = retries
        self._fs, root = _open_file_system(url, self.protocol, options)
        self._root = root.rstrip("/")
        self._writer = _writer_for(self.protocol, part_bytes)

    def read(self, name: str, start: int, stop: int, until: float) -> bytes:
        """Return the bytes from `start` to `stop` of an object, all of them; raise `FileNotFoundError` if there is none."""

        def request() -> bytes:
            data: bytes = self._fs.cat_file(self._path(name), start=start, end=stop)
            if len(data) < stop - start:
                raise IncompleteError(f"{len(data)} bytes came instead of {stop - start}")
            return data

        data = self.retries.call(request, f"reading bytes {start} to {stop} of {self.url}/{name}", until) if stop > start else b""
        if len(data) > stop - start:
            raise RemoteError(f"reading {self.url}/{name}", 1, "the server sends whole files instead of the ranges it is asked for")
        return data

    def read_whole(self, name: str, until: float) -> bytes:
        """Return an object; raise `FileNotFoundError` if there is none."""

        def request() -> bytes:
            data: bytes = self._fs.cat_file(self._path(name), start=0)  # with a start s3fs does not ask for the size first
            return data

        return self.retries.call(request, f"reading {self.url}/{name}", until)

    def size(self, name: str, until: float) -> int:
        """Return the bytes of an object; raise `FileNotFoundError` if there is none."""
        size: int = self.retries.call(lambda: self._fs.size(self._path(name)), f"asking for {self.url}/{name}", until)
        return size

    def write(self, name: str, parts: Sequence[bytes | memoryview], until: float) -> None:
        """Put an object, or replace it: at no moment is there a part of it."""
        try:
            self.retries.call(lambda: self._writer.write(self._fs, self._path(name), parts), f"writing {self.url}/{name}", until)
        except FileNotFoundError as error:
            raise RemoteError(f"writing {self.url}/{name}", 1, f"{error}; the bucket has to exist") from error

    def remove(self, name: str, until: float) -> None:
        """Delete an object; one that is not there (as after an attempt whose answer was lost) is deleted."""
        with suppress(FileNotFoundError):
            self.retries.call(lambda: self._fs.rm_file(self._path(name)), f"deleting {self.url}/{name}", until)

    def remove_all(self, until: float) -> None:
        """Delete everything below the url."""
        with suppress(FileNotFoundError):
            self.retries.call(lambda: self._fs.rm(self._root, recursive=True), f"deleting {self.url}", until)

    def names(self, folder: str, until: float) -> list[str]:
        """Return the names of the objects in `folder`, unfinished ones aside."""

        def request() -> list[str]:
            self._fs.invalidate_cache()
            return list(self._fs.ls(self._path(folder), detail=False))

        try:
            paths = self.retries.call(request, f"listing {self.url}/{folder}", until)
        except FileNotFoundError:
            return []
        return sorted(name for path in paths if not (name := path.rstrip("/").rpartition("/")[2]).startswith(_TEMPORARY))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class _Writer(ABC):
    """A way to write an object so that it appears at once."""

    @abstractmethod
    def write(self, fs: AbstractFileSystem, path: str, parts: Sequence[bytes | memoryview]) -> None: ...


class _WholeWriter(_Writer):
    """For stores whose put of an object is one step."""

    def write(self, fs: AbstractFileSystem, path: str, parts: Sequence[bytes | memoryview]) -> None:
        fs.pipe_file(path, b"".join(parts))


@dataclass(frozen=True, slots=True)
class _PartsWriter(_Writer):
    """The same, for stores that take an object in parts of `part_bytes` and show it when it is committed."""

    part_bytes: int

    def write(self, fs: AbstractFileSystem, path: str, parts: Sequence[bytes | memoryview]) -> None:
        if sum(map(len, parts)) <= self.part_bytes:
            fs.pipe_file(path, b"".join(parts))
            return
        file = fs.open(path, "wb", block_size=self.part_bytes, autocommit=False)
        try:
            for part in parts:
                for start in range(0, len(part), self.part_bytes):
                    file.write(part[start : start + self.part_bytes])
            file.close()  # sends the last part; leaving a `with` would do the same after an error, and commit what there is
            file.commit()
        except BaseException:
            file.closed = True
            with suppress(OSError):
                file.discard()
            raise


class _RenamingWriter(_Writer):
    """For file systems that show a file while it is written."""

    def write(self, fs: AbstractFileSystem, path: str, parts: Sequence[bytes | memoryview]) -> None:
        folder, _, name = path.rpartition("/")
        fs.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/{_TEMPORARY}{secrets.token_hex(8)}-{name[-40:]}"
        try:
            with fs.open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
            fs.mv(temporary, path)
        except BaseException:
            with suppress(OSError):
                fs.rm_file(temporary)
            raise


def _writer_for(protocol: str, part_bytes: int) -> _Writer:
    if protocol in _MULTIPART:
        return _PartsWriter(-(-max(part_bytes, _SMALLEST_PART) // _PART_GRAIN) * _PART_GRAIN)
    return _WholeWriter() if protocol in _WHOLE else _RenamingWriter()


def _open_file_system(url: str, protocol: str, options: Mapping[str, Any]) -> tuple[AbstractFileSystem, str]:
    """Return the file system of `url`, an instance of its own, and the path in it."""
    own = dict(options)
    if protocol in _S3:
        own["config_kwargs"] = _ONE_TRY | dict(own.get("config_kwargs") or {})
    try:
        fs, root = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **own)
    except ImportError as error:
        extra = _PACKAGES.get(protocol)
        way_out = f"pip install 'tierstore[{extra}]'" if extra else "install it"
        raise BackendError(f"{protocol}:// needs a package that is not installed ({error}); {way_out}") from error
    except ValueError as error:
        names = ", ".join(backend_names())
        raise BackendError(f"{url!r} cannot be opened: {error}; beside what fsspec knows, these are installed: {names}") from error
    if protocol in _S3:
        fs.retries = 1  # s3fs's own, which would multiply ours
    return fs, root
