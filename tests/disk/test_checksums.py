"""When stored bytes are checked: by maps, by reads of whole values, and by reads of some of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import nn

from tierstore import FileExtent, Tiered, TieredStore, tiered
from tierstore.backends._arena import PAGE, Arena
from tierstore.backends.disk import DiskBackend
from tierstore.backends.ram import RamBackend
from tierstore.checksum import PIECE
from tierstore.errors import CorruptionError
from tierstore.testing.interposed import Interposed
from tierstore.transfer.reader import Reader

MIB = 1 << 20


class Counting(Interposed):
    """Counts what is read, and calls by name."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.calls: dict[str, int] = {}

    def around(self, name: str, act):  # type: ignore[no-untyped-def]
        self.calls[name] = self.calls.get(name, 0) + 1
        return super().around(name, act)

    def read(self, descriptor: int, memory: memoryview, offset: int, flags: int = 0) -> int:
        count = super().read(descriptor, memory, offset, flags)
        self.bytes_read += count
        return count


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


def fetch(reader: Reader, backend: DiskBackend, key: str) -> torch.Tensor:
    """Read a value as a transfer does, into memory that lies as the file does; raise what it raises."""
    return fetched(reader, backend.extent(key))


def fetched(reader: Reader, extent: FileExtent) -> torch.Tensor:
    ended, errors = Event(), list[BaseException | None]()
    out = Arena().allocate(extent.nbytes, extent.offset % PAGE)

    def done(error: BaseException | None) -> None:
        errors.append(error)
        ended.set()

    reader.submit(extent, out, done)
    assert ended.wait(60)
    if errors[0] is not None:
        raise errors[0]
    return out


def flip(file: Path, offset: int) -> None:
    """Flip a bit so that the file's time does not tell."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        (byte,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte ^ 4]))


VALUE = torch.arange(PIECE + 3 * MIB).to(torch.uint8)  # one piece and a part of one


@pytest.fixture
def stored(root: Path) -> Path:
    """The directory of a closed store with one value."""
    with closing(DiskBackend(root)) as store:
        store.put("key", VALUE)
    return root


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, len(VALUE) - 1])
def test_first_finds_damage_however_the_value_is_read_first(stored: Path, reader: Reader, place: int) -> None:
    with closing(DiskBackend(stored)) as store:
        flip(store.file_of("key"), store.extent("key").offset + place)
        for _ in range(2):  # what was found damaged once never counts as checked
            with pytest.raises(CorruptionError, match="do not match their checksum") as caught:
                fetch(reader, store, "key")
            assert (caught.value.key, caught.value.file) == ("key", str(store.file_of("key")))
            with pytest.raises(CorruptionError, match="do not match their checksum"):
                store.get("key")
        assert [finding.key for finding in DiskBackend.verify(stored).findings] == ["key"]


def test_parts_of_a_value_are_checked_each_by_itself(stored: Path, reader: Reader) -> None:
    """As files are read into slabs on their way to a device."""
    with closing(DiskBackend(stored)) as store:
        flip(store.file_of("key"), store.extent("key").offset + PIECE + 9)
        extent = store.extent("key")
        assert torch.equal(fetched(reader, extent.part(0, PIECE)), VALUE[:PIECE])
        with pytest.raises(CorruptionError, match=f"bytes {PIECE} to {len(VALUE)} of the value do not match"):
            fetched(reader, extent.part(PIECE, 3 * MIB))
        flip(store.file_of("key"), store.extent("key").offset + PIECE + 9)
        assert torch.equal(fetched(reader, store.extent("key").part(PIECE, 3 * MIB)), VALUE[PIECE:])


def test_first_costs_once_and_always_every_time(stored: Path, reader: Reader) -> None:
    for verify, again in (("first", False), ("always", True), ("never", False)):
        with closing(DiskBackend(stored, verify=verify)) as store:
            assert torch.equal(fetch(reader, store, "key"), VALUE)
            assert (store.extent("key").proof is not None) == again
            assert torch.equal(store.get("key"), VALUE)


def test_never_hands_out_what_is_there(stored: Path) -> None:
    with closing(DiskBackend(stored, verify="never")) as store:
        flip(store.file_of("key"), store.extent("key").offset + 5)
        assert store.get("key")[5] == VALUE[5] ^ 4


def test_other_words_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="verify='often' is none of 'first', 'always', 'never'"):
        DiskBackend(root, verify="often")  # type: ignore[arg-type]


def test_a_value_that_was_read_once_is_found_with_one_question(stored: Path, reader: Reader) -> None:
    """No file is opened, no header and no row of the index read again: only the file's status is asked for."""
    system = Counting()
    with closing(DiskBackend(stored, system=system)) as store:
        fetch(reader, store, "key")
        system.calls.clear()
        system.bytes_read = 0
        for _ in range(3):
            store.extent("key")
        assert system.calls == {"status": 3}
        fetch(reader, store, "key")
        assert system.bytes_read == len(VALUE)
        assert system.calls.keys() <= {"status", "read", "advise"}


def test_a_part_is_checked_with_its_piece_and_once(stored: Path) -> None:
    system = Counting()
    with closing(DiskBackend(stored, system=system)) as store:
        flip(store.file_of("key"), store.extent("key").offset + PIECE + 9)
        extent = store.extent("key")
        assert extent.file is not None
        assert extent.proof is not None
        system.bytes_read = 0
        for _ in range(3):
            extent = store.extent("key")
            assert extent.proof is not None
            extent.prove(store._blobs._files._files[Path(extent.path)], [(100, 50)])
        assert system.bytes_read == PIECE
        with pytest.raises(CorruptionError, match=f"bytes {PIECE} to"):
            extent.prove(store._blobs._files._files[Path(extent.path)], [(PIECE - 1, 2)])


# --- rows of a model's table ----------------------------------------------------------------------------------------


ROWS = torch.tensor([[0, 1023, 1024], [8191, 0, 2048]])


def table_on_disk(root: Path, verify: str, system: Counting) -> tuple[Tiered, nn.Embedding, DiskBackend]:
    """Return a session in which a table of 16 MiB lies in a durable store that was opened anew, and what it is below."""
    torch.manual_seed(0)
    table, other = nn.Embedding(8192, 512), nn.Linear(2048, 2048)
    store = DiskBackend(root, verify=verify, system=system)  # type: ignore[arg-type]
    session = tiered([other, table], cpu=17 * MIB, disk=store, device="cpu")
    store._blobs._proved.clear()  # as if another process had written it
    return session, table, store


def blob_at(store: DiskBackend, needle: torch.Tensor) -> tuple[Path, int]:
    """Return in which file, and where, these bytes lie."""
    for key, _ in store.entries():
        place = store.file_of(key).read_bytes().find(needle.numpy().tobytes())
        if place >= 0:
            return store.file_of(key), place
    raise AssertionError("no file has them")


@pytest.mark.parametrize("divided", [True, False])
@torch.no_grad()
def test_rows_are_checked_before_they_are_used(root: Path, monkeypatch: pytest.MonkeyPatch, divided: bool) -> None:
    if not divided:
        monkeypatch.setattr(RamBackend, "divides", lambda self, nbytes: False)
    torch.manual_seed(0)
    expected = nn.Embedding(8192, 512).weight.detach().clone()
    system = Counting()
    session, table, store = table_on_disk(root, "first", system)
    with session:
        system.bytes_read = 0
        for _ in range(3):
            assert torch.equal(table(ROWS), expected[ROWS])
        assert system.bytes_read < 16 * MIB + 16 * 4096 + 3 * 5 * 2048, "each piece at most once, and then the rows alone"
        store._blobs._proved.clear()
        store._blobs._proofs.clear()
        file, place = blob_at(store, expected[1024])
        flip(file, place)
        with pytest.raises(CorruptionError, match="do not match their checksum") as caught:
            table(ROWS)
        assert caught.value.file == str(file)
        flip(file, place)
        assert torch.equal(table(ROWS), expected[ROWS])
    assert torch.equal(table.weight, expected)


def test_values_shown_in_place_are_checked_before_and_not_when_a_page_is_touched(stored: Path) -> None:
    with closing(DiskBackend(stored)) as store, closing(RamBackend()) as ram:
        flip(store.file_of("key"), store.extent("key").offset + PIECE)
        memory = ram.reserve(len(VALUE))
        with pytest.raises(CorruptionError, match="do not match their checksum"):
            ram.complete(memory, {0: store.extent("key")})
        flip(store.file_of("key"), store.extent("key").offset + PIECE)
        ram.complete(memory, {0: store.extent("key")})
        assert torch.equal(memory, VALUE)


# --- a store that lasts ---------------------------------------------------------------------------------------------


def test_a_store_is_opened_again_with_what_was_in_memory(tmp_path: Path) -> None:
    with TieredStore.open(tmp_path / "store", cpu="4MiB") as store:
        for number in range(6):
            store.put(str(number), torch.full((MIB,), number, dtype=torch.uint8))
    with TieredStore.open(tmp_path / "store", verify="always") as store:
        assert sorted(store) == [str(number) for number in range(6)]
        for number in range(6):
            assert (store.get(str(number)) == number).all()
        del store["3"]
    with TieredStore.open(tmp_path / "store", cpu="2MiB") as store:
        assert "3" not in store
        assert len(store) == 5
