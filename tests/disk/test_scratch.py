"""Scratch: values of one process in a file without a name, of which nothing is ever left."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.disk.conftest import in_fork
from tests.samples import all_samples, assert_identical
from tierstore.backends._disk.stretches import ScratchFile
from tierstore.backends.disk import DiskBackend
from tierstore.backends.ram import RamBackend
from tierstore.backends.scratch import ScratchBackend
from tierstore.errors import BackendError, ClosedError, CorruptionError
from tierstore.file_system import FileSystem
from tierstore.spec import TensorSpec
from tierstore.testing.interposed import Interposed

MIB = 1 << 20


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[ScratchBackend]:
    with closing(ScratchBackend(tmp_path)) as scratch:
        yield scratch


def space_of(scratch: ScratchBackend) -> int:
    """Return how many bytes of the disk the file takes."""
    return os.fstat(scratch._file.file.fileno()).st_blocks * 512


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype_and_layout_comes_back_and_no_name_is_seen(backend: ScratchBackend, tmp_path: Path) -> None:
    samples = all_samples()
    for name, tensor in samples.items():
        backend.put(name, tensor)
    assert dict(backend.entries()) == {name: TensorSpec.of(tensor) for name, tensor in samples.items()}
    assert list(tmp_path.iterdir()) == []
    for name, tensor in samples.items():
        assert_identical(backend.get(name), tensor)
    values = {name: backend.get(name) for name in samples}
    backend.close()
    for name, tensor in samples.items():
        assert_identical(values[name], tensor)


class Unsyncable(FileSystem):
    def sync(self, descriptor: int) -> None:
        raise AssertionError("a scratch store must not flush")


def test_nothing_is_flushed(tmp_path: Path) -> None:
    with closing(DiskBackend.scratch(tmp_path / "deep", system=Unsyncable())) as scratch:
        scratch.put("key", torch.arange(10))
        assert_identical(scratch.get("key"), torch.arange(10))
    assert list((tmp_path / "deep").iterdir()) == []


def test_what_was_handed_out_stays_as_it_is_whatever_is_stored_later(backend: ScratchBackend) -> None:
    """Maps, open extents and values in place take turns in one file; each keeps its bytes as long as anybody has it."""
    rng, values, maps = random.Random(0), dict[str, torch.Tensor](), list[tuple[torch.Tensor, torch.Tensor]]()
    for number in range(150):
        key = str(rng.randrange(12))
        if key in values and rng.random() < 0.3:
            backend.delete(key)
            del values[key]
        else:
            values[key] = torch.full((rng.choice((1, 5000, 300_000)),), number % 251, dtype=torch.uint8)
            backend.put(key, values[key])
        if key in values and rng.random() < 0.5:
            maps.append((backend.get(key), values[key]))
        if len(maps) > 10:
            maps.pop(rng.randrange(10))
        assert all(torch.equal(found, expected) for found, expected in maps)
        assert all(torch.equal(backend.get(name), expected) for name, expected in values.items())


def test_an_extent_that_is_shared_keeps_its_bytes(backend: ScratchBackend) -> None:
    backend.put("key", torch.full((MIB,), 1, dtype=torch.uint8))
    extent = backend.extent("key")
    assert extent.file is not None
    assert extent.file.share()
    for _ in range(3):
        backend.put("key", torch.full((MIB,), 2, dtype=torch.uint8))
    memory = memoryview(bytearray(MIB))
    extent.file.read(memory, extent.offset)
    assert bytes(memory) == b"\1" * MIB
    ended = extent.file.keep()
    extent.file.close()
    for _ in range(3):
        backend.put("key", torch.full((MIB,), 3, dtype=torch.uint8))
    extent.file.read_cached(memory, extent.offset)
    assert bytes(memory) == b"\1" * MIB
    ended()
    backend.put("other", torch.full((MIB,), 4, dtype=torch.uint8))
    assert backend.extent("other").offset == extent.offset, "the range is used again as soon as nobody has it"
    assert not extent.file.share()


def test_what_is_shown_in_place_stays_as_it_is_too(backend: ScratchBackend) -> None:
    """As the weights are when a model is given back: maps at the model's own addresses, which outlive every store."""
    with closing(RamBackend()) as ram:
        backend.put("key", torch.full((MIB,), 1, dtype=torch.uint8))
        place = backend.extent("key").offset
        memory = ram.reserve(2 * MIB)
        ram.complete(memory, {0: backend.extent("key"), MIB: torch.full((MIB,), 9, dtype=torch.uint8)})
        for number in range(2, 5):
            backend.put("key", torch.full((MIB,), number, dtype=torch.uint8))
            assert backend.extent("key").offset != place
        assert memory.tolist() == [1] * MIB + [9] * MIB
        view = memory[5:9]
        del memory
        backend.put("key", torch.full((MIB,), 5, dtype=torch.uint8))
        assert view.tolist() == [1] * 4
        del view
        offsets = set()
        for number in range(3):
            backend.put("key", torch.full((MIB,), number, dtype=torch.uint8))
            offsets.add(backend.extent("key").offset)
        assert place in offsets


def test_space_comes_back(backend: ScratchBackend) -> None:
    value = torch.ones(16 * MIB, dtype=torch.uint8)
    for number in range(20):
        backend.put(str(number), value)
    held = backend.get("3")
    assert space_of(backend) >= 320 * MIB
    for number in range(20):
        backend.delete(str(number))
    assert space_of(backend) <= (64 + 17) * MIB, "what is kept for the next values, and what is mapped"
    assert torch.equal(held, value)
    del held
    gc.collect()
    for _ in range(100):
        backend.put("key", value)
    assert space_of(backend) <= (64 + 33) * MIB


def test_a_failed_write_takes_nothing(tmp_path: Path) -> None:
    class Full(Interposed):
        full = False

        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            if self.full:
                raise OSError(28, os.strerror(28))
            return super().write(descriptor, data, offset)

    system = Full()
    with closing(ScratchBackend(tmp_path, system=system)) as scratch:
        scratch.put("key", torch.arange(1000))
        system.full = True
        for _ in range(50):
            with pytest.raises(OSError, match="No space left"):
                scratch.put("key", torch.zeros(MIB))
        system.full = False
        assert_identical(scratch.get("key"), torch.arange(1000))
        assert space_of(scratch) <= 65 * MIB


def test_checks_every_read_if_asked(tmp_path: Path) -> None:
    with closing(ScratchBackend(tmp_path, verify="always")) as scratch:
        scratch.put("key", torch.zeros(9 * MIB, dtype=torch.uint8))
        assert torch.equal(scratch.get("key"), torch.zeros(9 * MIB, dtype=torch.uint8))
        damage(scratch._file, scratch.extent("key").offset + 8 * MIB + 5)
        with pytest.raises(CorruptionError, match="bytes 8388608 to 9437184 of the value do not match their checksum") as caught:
            scratch.get("key")
        assert (caught.value.key, caught.value.file) == ("key", f"{tmp_path} (scratch)")


def damage(file: ScratchFile, offset: int) -> None:
    with Path(f"/proc/self/fd/{file.file.fileno()}").open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\xff")


def test_never_takes_a_directory_with_values(root: Path, store: DiskBackend) -> None:
    with pytest.raises(BackendError, match="belongs to another store"):
        DiskBackend.scratch(root)


def test_below_a_file_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match="choose a directory to write to"):
        DiskBackend.scratch(tmp_path / "file")


def test_after_close_and_in_a_forked_child_it_is_refused(backend: ScratchBackend) -> None:
    backend.put("key", torch.arange(3))

    def misuse() -> None:
        with pytest.raises(ClosedError, match="a forked child opens it for itself"):
            backend.get("key")
        backend.close()

    assert in_fork(misuse) == 0
    assert_identical(backend.get("key"), torch.arange(3))
    backend.close()
    backend.close()
    with pytest.raises(ClosedError, match="closed; open it again"):
        backend.get("key")
