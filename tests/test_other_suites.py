"""Conformance suites that others wrote: zarr's for stores, run over our tiers, and fsspec's for what remote tiers rely on.

Of zarr's suite everything applies but its optional synchronous protocol. Of fsspec's, exclusive puts and opens apply: whole
objects, which appear at once; copying trees of files is nothing that we do.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec import AbstractFileSystem, filesystem
from fsspec.tests.abstract import AbstractFixtures, AbstractOpenTests, AbstractPipeTests
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, cpu
from zarr.storage._utils import _normalize_byte_range_index
from zarr.testing.store import StoreTests

from tests.remote_servers import s3_server
from tierstore import Tier, TieredStore, open_backend
from tierstore.backend import Backend

RAM = 600  # bytes: little enough that the suites' values move


class ZarrOverTiers(Store):
    """Zarr's interface over a `TieredStore`, as somebody might write it: each value a tensor of bytes."""

    supports_writes = supports_deletes = supports_listing = True
    opened: dict[int, TieredStore] = {}  # noqa: RUF012  (what a pickled store finds again in its process)

    def __init__(self, number: int, *, read_only: bool = False) -> None:
        super().__init__(read_only=read_only)
        self.number = number

    @property
    def tiers(self) -> TieredStore:
        return self.opened[self.number]

    def with_read_only(self, read_only: bool = False) -> ZarrOverTiers:
        return type(self)(self.number, read_only=read_only)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrOverTiers) and (self.number, self.read_only) == (other.number, other.read_only)

    def __str__(self) -> str:
        return f"tiers://{self.number}"

    def __repr__(self) -> str:
        return f"ZarrOverTiers({str(self)!r})"

    def __getstate__(self) -> tuple[int, bool]:
        return self.number, self.read_only

    def __setstate__(self, state: tuple[int, bool]) -> None:
        self.__init__(state[0], read_only=state[1])  # type: ignore[misc]

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if not self._is_open:
            await self._open()
        if key not in self.tiers:
            return None
        value = prototype.buffer.from_bytes(self.tiers.get(key).numpy().tobytes())
        start, stop = _normalize_byte_range_index(value, byte_range)
        return value[start:stop]

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return key in self.tiers

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        if not self._is_open:
            await self._open()
        if not isinstance(value, Buffer):
            raise TypeError(f"ZarrOverTiers.set(): `value` must be a Buffer instance. Got an instance of {type(value)} instead.")
        self.tiers.put(key, torch.from_numpy(np.array(value.as_numpy_array()).view(np.uint8)))

    async def delete(self, key: str) -> None:
        self._check_writable()
        if key in self.tiers:
            del self.tiers[key]

    async def list(self) -> AsyncIterator[str]:
        for key in list(self.tiers):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in list(self.tiers):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        below = f"{prefix.rstrip('/')}/" if prefix else ""
        for name in {key.removeprefix(below).partition("/")[0] for key in list(self.tiers) if key.startswith(below)}:
            yield name


def over_disk(directory: Path) -> Backend:
    return open_backend("disk", directory)


def over_zarr(directory: Path) -> Backend:
    return open_backend("zarr", directory)


def over_files(directory: Path) -> Backend:
    return open_backend("remote", f"file://{directory}")


def over_compressed(directory: Path) -> Backend:
    return open_backend("compressed", open_backend("disk", directory), codec="zstd")


def over_compressed_objects(directory: Path) -> Backend:
    return open_backend("compressed", open_backend("remote", f"memory:/{directory}"))


@pytest.mark.filterwarnings("ignore:.*Store.get_sync.*")
class TestZarrsStoreSuite(StoreTests[ZarrOverTiers, cpu.Buffer]):
    store_cls = ZarrOverTiers
    buffer_cls = cpu.Buffer

    @pytest.fixture(params=[over_disk, over_zarr, over_files, over_compressed, over_compressed_objects], ids=lambda make: make.__name__)
    def store_kwargs(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
        make: Callable[[Path], Backend] = request.param
        number = len(ZarrOverTiers.opened)
        tiers = TieredStore([Tier("ram", open_backend("device", "cpu"), RAM), Tier("last", make(tmp_path / "store"))])
        ZarrOverTiers.opened[number] = tiers
        yield {"number": number}
        tiers.close(flush=False)

    async def set(self, store: ZarrOverTiers, key: str, value: Buffer) -> None:
        store.tiers.put(key, torch.from_numpy(np.array(value.as_numpy_array()).view(np.uint8)))

    async def get(self, store: ZarrOverTiers, key: str) -> Buffer:
        return cpu.Buffer.from_bytes(store.tiers.get(key).numpy().tobytes())

    def test_store_repr(self, store: ZarrOverTiers) -> None:
        assert repr(store) == f"ZarrOverTiers('tiers://{store.number}')"

    def test_store_supports_writes(self, store: ZarrOverTiers) -> None:
        assert store.supports_writes

    def test_store_supports_listing(self, store: ZarrOverTiers) -> None:
        assert store.supports_listing


class _WholeObjects(AbstractFixtures):
    """What a writer of whole objects relies on, asked by fsspec's own tests."""

    @pytest.fixture
    def fs_path(self, tmp_path: Path) -> str:
        return str(tmp_path)

    def test_ranges_and_listing(self, fs: AbstractFileSystem, fs_target: str) -> None:
        """What fsspec's suite has no test of."""
        fs.makedirs(fs_target, exist_ok=True)
        fs.pipe_file(f"{fs_target}/one", b"0123456789")
        assert fs.cat_file(f"{fs_target}/one", start=2, end=5) == b"234"
        assert fs.cat_file(f"{fs_target}/one", start=0) == b"0123456789"
        assert fs.size(f"{fs_target}/one") == 10
        assert [path.rpartition("/")[2] for path in fs.ls(fs_target, detail=False)] == ["one"]
        fs.rm_file(f"{fs_target}/one")
        with pytest.raises(FileNotFoundError):
            fs.cat_file(f"{fs_target}/one", start=0)


class TestFsspecsSuiteOnMemory(_WholeObjects, AbstractPipeTests, AbstractOpenTests):
    @pytest.fixture
    def fs(self) -> AbstractFileSystem:
        return filesystem("memory")


class TestFsspecsSuiteOnFiles(_WholeObjects, AbstractPipeTests, AbstractOpenTests):
    @pytest.fixture
    def fs(self) -> AbstractFileSystem:
        return filesystem("file", auto_mkdir=True)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with s3_server("suites") as address:
        yield address


class TestFsspecsSuiteOnS3(_WholeObjects, AbstractPipeTests):
    """Without the exclusive open, which s3fs refuses only when it is closed, and which we never make."""

    places = itertools.count()

    @pytest.fixture
    def fs(self, server: tuple[str, int]) -> AbstractFileSystem:
        url = f"http://{server[0]}:{server[1]}"
        return filesystem("s3", key="testing", secret="testing", endpoint_url=url, skip_instance_cache=True, use_listings_cache=False)

    @pytest.fixture
    def fs_path(self) -> str:
        return f"suites/{next(self.places)}"
