"""What reads bytes that anybody may have written, each as a function of such bytes that must end well or with the error it names."""

from __future__ import annotations

import json
import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import torch
import xxhash
from safetensors.torch import save as save_safetensors

from tierstore.backends import _object as remote_object
from tierstore.backends._disk import blob as blob_format
from tierstore.backends._disk.index import COMMITS, INDEX, PARTS, Commits, Index, State, read_commits
from tierstore.backends._disk.layout import MARKER, Format, Root, read_format, write_format
from tierstore.backends._disk.rows import Row
from tierstore.backends._disk.version_1 import decode_head_1
from tierstore.backends._safetensors import read_header
from tierstore.backends._shards import find_tensors
from tierstore.backends._zarr_metadata import attributes_of, described
from tierstore.backends.codec import CompressedBackend
from tierstore.backends.disk import DiskBackend
from tierstore.backends.memory import DeviceBackend
from tierstore.backends.zarr_dir import ZarrBackend
from tierstore.errors import BackendError, CheckpointError, CorruptionError
from tierstore.file_system import FileSystem
from tierstore.spec import TensorSpec

_PER_BYTE, _ALWAYS = 200, 1 << 20  # bytes that parsing may take at most for each byte of its input, and besides

VALUES = {
    "layers.0.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "ünï/.. code": torch.arange(6.0).reshape(2, 3).t(),
    "empty": torch.zeros(0, 3, dtype=torch.int8),
    "scalar": torch.tensor(True),
}
NESTED = b'{"a":' + b"[" * 5000
MANY_DIMENSIONS = b'{"a":{"dtype":"U8","shape":[' + b"1," * 20_000 + b'1],"data_offsets":[0,1]}}'
TWICE = b"{" + b",".join(b'"%d":1' % name for name in [*range(5000), 4999]) + b"}"


class Target(ABC):
    """Bytes go in; `read` returns, or raises one of `errors`. `folder` is the target's own, for files."""

    name: ClassVar[str]
    errors: ClassVar[tuple[type[Exception], ...]]
    share: ClassVar[int] = 1
    """Of all inputs, beside the other targets' shares."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.accepted = 0

    @abstractmethod
    def seeds(self) -> Iterator[bytes]:
        """Yield good inputs, and bad ones that chance would hardly find."""

    @abstractmethod
    def read(self, data: bytes) -> None:
        """Read `data` and check what comes out."""

    def __call__(self, data: bytes) -> None:
        """Raise `AssertionError` if memory is taken that the input's size does not justify, and whatever else `read` must not raise."""
        with _tracing():
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            with suppress(*self.errors):
                self.read(data)
                self.accepted += 1
            most = tracemalloc.get_traced_memory()[1] - before
        assert most <= _ALWAYS + _PER_BYTE * len(data), f"{most} bytes of memory for {len(data)} bytes of input"


@contextmanager
def _tracing() -> Iterator[None]:
    """Trace allocations, unless that is done already: each start leaks about a KiB, so who needs many starts it before."""
    if tracemalloc.is_tracing():
        yield
        return
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


class SafetensorsHeader(Target):
    """A checkpoint's file."""

    name, errors, share = "safetensors", (CorruptionError, CheckpointError), 30

    def seeds(self) -> Iterator[bytes]:
        plain = {name: tensor.contiguous() for name, tensor in VALUES.items()}
        yield save_safetensors(plain, {"format": "pt"})
        yield save_safetensors({"a": torch.zeros(2)})
        for text in (NESTED, MANY_DIMENSIONS, TWICE, b"{}", b'{"__metadata__":{}}'):
            yield len(text).to_bytes(8, "little") + text + b"\0"

    def read(self, data: bytes) -> None:
        file = self.folder / "x.safetensors"
        file.write_bytes(data)
        ends = [8]
        for located in sorted(read_header(file).values(), key=lambda each: (each.offset, each.spec.nbytes)):
            assert located.spec.dense
            if located.spec.nbytes:
                assert ends[-1] <= located.offset, "tensors overlap"
                ends.append(located.offset + located.spec.nbytes)
        assert ends[-1] <= len(data), "a tensor lies outside of its file"


class ShardIndex(Target):
    """`model.safetensors.index.json`, with one shard beside it and a file above that nobody may open."""

    name, errors, share = "shard index", (CorruptionError, CheckpointError), 10

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder / "checkpoint"
        self.folder.mkdir()
        content = save_safetensors({name: tensor.contiguous() for name, tensor in VALUES.items()})
        for file in (self.folder / "s.safetensors", folder / "above.safetensors"):
            file.write_bytes(content)

    def seeds(self) -> Iterator[bytes]:
        for name in ("s.safetensors", "../above.safetensors", str(self.folder.parent / "above.safetensors"), "none", "", "\0"):
            yield json.dumps({"metadata": {}, "weight_map": dict.fromkeys(VALUES, name)}).encode()
        yield NESTED

    def read(self, data: bytes) -> None:
        index = self.folder / "model.safetensors.index.json"
        index.write_bytes(data)
        assert all(located.file.parent == self.folder for located in find_tensors(index).values()), "a file elsewhere"


class BlobHead(Target):
    """What stands before the data of a blob of the disk store, of either version."""

    name, errors, share = "blob", (ValueError,), 20

    def seeds(self) -> Iterator[bytes]:
        for number, (key, tensor) in enumerate(VALUES.items()):
            yield blob_format.encode_head(key, TensorSpec.of(tensor), bytes(16), number, "0" * 32)[8:].rstrip()
        for old in (Path(__file__).parents[1] / "disk" / "golden" / "disk_1").rglob("*.safetensors"):
            content = old.read_bytes()
            yield content[8 : blob_format.head_size(content[:8], len(content))].rstrip()
        yield NESTED

    def read(self, data: bytes) -> None:
        head = _framed(data, blob_format.ALIGNMENT)
        assert blob_format.head_size(head[:8], len(head)) == len(head)
        try:
            decode_head_1(head, "0" * 32)
        except ValueError:
            row, store = blob_format.decode_head(head, "0" * 32)
            assert blob_format.encode_head(row.key, row.spec, row.sums, row.generation, store) == head


class ObjectHead(Target):
    """What stands before the data of an object of the remote store."""

    name, errors, share = "object", (ValueError,), 10

    def seeds(self) -> Iterator[bytes]:
        yield from (stored.head()[8:].rstrip() for stored in _stored_objects())
        yield NESTED

    def read(self, data: bytes) -> None:
        head = _framed(data, 64)
        assert remote_object.head_size(head) == len(head)
        assert remote_object.read_head(head).head() == head


class ObjectIndex(Target):
    """The index of the remote store."""

    name, errors, share = "object index", (ValueError, BackendError), 5

    def seeds(self) -> Iterator[bytes]:
        yield remote_object.write_index(_stored_objects())
        yield NESTED

    def read(self, data: bytes) -> None:
        remote_object.read_index(data)


def _framed(text: bytes, alignment: int) -> bytes:
    """Return a header as it stands in a file: after its length, and with spaces up to where the data begins."""
    total = -(-(8 + len(text)) // alignment) * alignment
    return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)


def _stored_objects() -> list[remote_object.StoredObject]:
    return [remote_object.StoredObject(key, TensorSpec.of(value), 3, "0" * 32) for key, value in VALUES.items()]


class _DiskStore(Target):
    """A closed disk store, of which each input replaces one file.

    A fuzzer sees what is compared, so it learns the right checksum for bytes of its own and forges files. What is accepted has
    to be what would be written, not what was.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        store = DiskBackend(folder / "store")
        with closing(store):
            for key, value in VALUES.items():
                store.put(key, value)
            (folder / "open").mkdir()
            for part in PARTS:
                (folder / "open" / part).write_bytes((folder / "store" / part).read_bytes())
        self.system = FileSystem()
        self.root = Root(folder / "store", self.system)
        found = read_format(self.root)
        assert found is not None
        self.format: Format = found


class FormatFile(_DiskStore):
    """The file that says whose a directory is."""

    name, errors, share = "format", (BackendError,), 5

    def seeds(self) -> Iterator[bytes]:
        yield self.root.read_start(MARKER, 4096)[0]
        yield b'{"format":"tierstore-disk","version":1}'
        yield NESTED

    def read(self, data: bytes) -> None:
        (self.root.path / MARKER).write_bytes(data)
        found = read_format(self.root)
        assert found is not None
        if found.version > 1:
            write_format(self.root, found.store)
            assert (self.root.path / MARKER).read_bytes() == data


class CommitCount(_DiskStore):
    """The file that counts commits beside the index."""

    name, errors, share = "commits", (ValueError,), 4

    def seeds(self) -> Iterator[bytes]:
        yield (self.root.path / COMMITS).read_bytes()
        yield b""

    def read(self, data: bytes) -> None:
        commits, image = read_commits(data, self.format.store)
        if data:
            with closing(Commits(self.system, self.root.descriptor)) as file:
                file.write(State(self.format.store, commits=commits), image=image)
            assert (self.root.path / COMMITS).read_bytes() == data


class IndexDatabase(_DiskStore):
    """The SQLite database of a disk store."""

    name, errors, share = "index", (CorruptionError,), 8
    part = INDEX

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.place = folder / "fuzzed"
        self.place.mkdir()
        self.rows, self.commits = self._open(self.root.path)

    def seeds(self) -> Iterator[bytes]:
        yield (self.root.path / self.part).read_bytes()

    def read(self, data: bytes) -> None:
        for part in PARTS:
            (self.place / part).unlink(missing_ok=True)
        self._write(data)
        rows, commits = self._open(self.place)
        assert commits < self.commits or rows == self.rows, "rows that nobody wrote"

    def _write(self, data: bytes) -> None:
        (self.place / INDEX).write_bytes(data)

    def _open(self, folder: Path) -> tuple[dict[str, Row], int]:
        index = Index(folder, self.system, writable=True)
        with closing(index):
            return dict(index.rows), index.state.commits


class IndexLog(IndexDatabase):
    """SQLite's log beside the database, as a crash leaves it; a log that ends early takes commits back, which `COMMITS` would notice."""

    name, share, part = "index log", 5, PARTS[1]

    def seeds(self) -> Iterator[bytes]:
        yield (self.folder / "open" / self.part).read_bytes()

    def _write(self, data: bytes) -> None:
        (self.place / INDEX).write_bytes((self.folder / "open" / INDEX).read_bytes())
        (self.place / self.part).write_bytes(data)


class ZarrMetadata(Target):
    """The metadata of an array of the zarr store."""

    name, errors, share = "zarr", (CorruptionError,), 5

    def seeds(self) -> Iterator[bytes]:
        with closing(ZarrBackend(self.folder / "zarr")) as store:
            for key, value in VALUES.items():
                store.put(key, value)
        for file in (self.folder / "zarr").rglob("zarr.json"):
            yield file.read_bytes()
        yield json.dumps({"attributes": attributes_of("a", TensorSpec(torch.uint8, (1,), (1,)))}).encode()
        yield NESTED

    def read(self, data: bytes) -> None:
        (self.folder / "zarr.json").write_bytes(data)
        described(self.folder, "?")


class CompressedValue(Target):
    """A value as a compressed tier stores it, with a checksum that is right: what its decompressor is handed."""

    name, errors, share = "compressed", (CorruptionError,), 8
    codec = "lz4"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.value = (torch.randn(3000, generator=torch.Generator().manual_seed(1)) / 50).to(torch.bfloat16)
        self.inner = DeviceBackend("cpu")
        self.backend = CompressedBackend(self.inner, self.codec)
        self.backend.put("a", self.value)
        ((self.place, self.spec),) = self.inner.entries()
        assert self.place.startswith(self.codec)

    def seeds(self) -> Iterator[bytes]:
        yield self.inner.get(self.place).numpy().tobytes()[8:]

    def read(self, data: bytes) -> None:
        payload = _checksum(data) + data
        self.inner.put(self.place, torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        assert self.backend.get("a").shape == self.value.shape


class CompressedPlanes(CompressedValue):
    name, codec = "compressed planes", "zstd"


def _checksum(data: bytes) -> bytes:
    """Return the checksum that a compressed value begins with."""
    return int(xxhash.xxh3_64_intdigest(data)).to_bytes(8, "little")


TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (
        SafetensorsHeader, ShardIndex, BlobHead, ObjectHead, ObjectIndex, FormatFile, CommitCount, IndexDatabase, IndexLog,
        ZarrMetadata, CompressedValue, CompressedPlanes,
    )
}  # fmt: skip


def folder_for(base: Path, target: str) -> Path:
    """Return a new directory for one target, in memory if the system has such a file system."""
    folder = base / target.replace(" ", "-")
    folder.mkdir()
    return folder
