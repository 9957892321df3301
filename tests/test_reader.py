"""The reader: right bytes from the cache and around it, whatever the alignment; errors reported once; nothing left behind."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.samples import all_samples, assert_identical
from tierstore import open_file
from tierstore.backend import FileExtent
from tierstore.backends._arena import Arena
from tierstore.backends.disk import DiskBackend
from tierstore.backends.memory import DeviceBackend
from tierstore.errors import ClosedError, CorruptionError
from tierstore.spec import TensorSpec, raw_bytes
from tierstore.transfer.reader import Reader

PAGE = 4096
MIB = 1 << 20

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


@pytest.fixture(autouse=True)
def no_leaked_descriptors() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.fixture
def arena() -> Arena:
    return Arena()


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write(path: Path, content: torch.Tensor, *, cached: bool = False) -> Path:
    """Write a file, and take it out of the page cache unless `cached`."""
    with path.open("wb") as stream:
        stream.write(content.numpy().data)
        os.fsync(stream.fileno())
        if not cached:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def cached_pages(path: Path) -> int:
    """Count the pages of a file in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        there = np.zeros(-(-len(pages) // PAGE), np.uint8)
        whole = np.frombuffer(pages, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(whole.ctypes.data), ctypes.c_size_t(len(whole)), ctypes.c_void_p(there.ctypes.data)) == 0
        del whole
        return int((there & 1).sum())


def cache_start(path: Path, nbytes: int) -> None:
    """Bring the first bytes of a file into the page cache, and no more."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(descriptor, nbytes, 0)
    os.close(descriptor)


@dataclass
class Results:
    """Collects what `done` is called with, by name, and by which threads."""

    errors: dict[str, BaseException | None] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    threads: set[str] = field(default_factory=set)
    order: list[str] = field(default_factory=list)
    _ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def done(self, name: str) -> Callable[[BaseException | None], None]:
        def note(error: BaseException | None) -> None:
            self.errors[name] = error
            self.calls[name] += 1
            self.order.append(name)
            self.threads.add(threading.current_thread().name)
            self._ended.release()

        return note

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self._ended.acquire(timeout=60)


def fetch(extent: FileExtent, out: torch.Tensor, **options: int) -> BaseException | None:
    """Read one extent with a reader of its own; return the error it reports."""
    reader, results = Reader(**options), Results()
    reader.submit(extent, out, results.done("it"))
    reader.close()
    assert results.calls == {"it": 1}
    return results.errors["it"]


class Spy:
    """Stands in for `os.preadv`: counts bytes by way, and can make calls fail or return little."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cached = self.direct = self.buffered = 0
        self.most = 1 << 60
        self.fail: Callable[[bool, int], int] = lambda direct, offset: 0
        self._preadv = os.preadv
        self._lock = threading.Lock()
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        if number := self.fail(direct, offset):
            raise OSError(number, os.strerror(number))
        count = self._preadv(descriptor, [buffers[0][: self.most]], offset, flags)
        with self._lock:
            self.cached += count if flags else 0
            self.direct += count if direct else 0
            self.buffered += 0 if direct or flags else count
        return count


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def needs_direct(path: Path) -> None:
    """Skip where direct I/O or an uncached file cannot be had, as on tmpfs."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system has no direct I/O")
    if cached_pages(path):
        pytest.skip("the file system keeps its files in memory")


# -- bytes ------------------------------------------------------------------------------------------------------------

OFFSETS = (0, 1, PAGE - 1, PAGE, 5000, 3 * PAGE)
LENGTHS = (0, 1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE, 100_003)


@pytest.mark.parametrize("shift", [0, 1, 904])  # 904: address and offset 5000 are at the same place in a page
@pytest.mark.parametrize("cached", [True, False])
def test_every_alignment_gives_the_right_bytes_and_touches_no_other(tmp_path: Path, arena: Arena, cached: bool, shift: int) -> None:
    content = random_bytes(120_000)
    path = write(tmp_path / "file", content, cached=cached)
    reader, results = Reader(request_bytes=4 * PAGE), Results()
    outs = {}
    for offset, length in product(OFFSETS, LENGTHS):
        outs[offset, length] = whole = arena.allocate(shift + length + PAGE).fill_(0xAA)
        reader.submit(FileExtent(str(path), offset, length), whole[shift : shift + length], results.done(f"{offset} {length}"))
    reader.close()
    assert set(results.errors.values()) == {None}
    assert set(results.calls.values()) == {1}
    for (offset, length), whole in outs.items():
        assert torch.equal(whole[shift : shift + length], content[offset : offset + length]), (offset, length)
        assert bool((whole[:shift] == 0xAA).all())
        assert bool((whole[shift + length :] == 0xAA).all())


def test_what_is_cached_comes_from_the_cache(tmp_path: Path, arena: Arena, spy: Spy) -> None:
    content = random_bytes(5 * MIB + 100)
    path = write(tmp_path / "file", content, cached=True)
    out = arena.allocate(5 * MIB + 100)
    assert fetch(FileExtent(str(path), 0, 5 * MIB + 100), out, request_bytes=2 * MIB) is None
    assert torch.equal(out, content)
    assert (spy.cached, spy.direct, spy.buffered) == (5 * MIB + 100, 0, 0)


def test_what_is_not_cached_is_read_directly_and_leaves_nothing_in_the_cache(tmp_path: Path, arena: Arena, spy: Spy) -> None:
    content = random_bytes(5 * MIB + 100)
    path = write(tmp_path / "file", content)
    needs_direct(path)
    out = arena.allocate(4 * MIB + 100)
    for _ in range(3):  # what the first pass asked the cache for must not be there in the next one
        assert fetch(FileExtent(str(path), MIB, 4 * MIB + 100), out.zero_(), request_bytes=MIB) is None
        assert torch.equal(out, content[MIB:])
    assert spy.cached <= 9 * PAGE  # a quick device may answer a question before it is refused
    assert spy.cached + spy.direct + spy.buffered == 3 * (4 * MIB + 100)
    assert spy.buffered <= 300
    assert cached_pages(path) == 0


def test_a_page_left_in_the_cache_does_not_draw_the_rest_in(tmp_path: Path, arena: Arena, spy: Spy) -> None:
    content = random_bytes(4 * MIB)
    path = write(tmp_path / "file", content)
    needs_direct(path)
    cache_start(path, PAGE)
    assert cached_pages(path) == 1
    out = arena.allocate(4 * MIB)
    assert fetch(FileExtent(str(path), 0, 4 * MIB), out) is None
    assert torch.equal(out, content)
    assert spy.direct >= 4 * MIB - 2 * PAGE
    assert cached_pages(path) == 0


def test_a_partly_cached_file_is_read_both_ways(tmp_path: Path, arena: Arena, spy: Spy) -> None:
    content = random_bytes(4 * MIB)
    path = write(tmp_path / "file", content)
    needs_direct(path)
    cache_start(path, MIB + 5 * PAGE)
    out = arena.allocate(4 * MIB)
    assert fetch(FileExtent(str(path), 0, 4 * MIB), out) is None
    assert torch.equal(out, content)
    assert spy.cached >= MIB
    assert spy.cached + spy.direct == 4 * MIB


def test_unaligned_memory_is_read_through_the_cache_and_leaves_nothing_there(tmp_path: Path, arena: Arena, spy: Spy) -> None:
    content = random_bytes(MIB)
    path = write(tmp_path / "file", content)
    needs_direct(path)
    out = arena.allocate(MIB + 8)[8:]
    assert fetch(FileExtent(str(path), 0, MIB), out, request_bytes=MIB // 4) is None
    assert torch.equal(out, content)
    assert spy.direct == 0
    assert cached_pages(path) == 0


@pytest.mark.parametrize(("offset", "length", "shift"), [(5000, 9000, 0), (5000, 9000, 904), (PAGE, 5 * PAGE + 9, 0), (5000, 10, 0)])
def test_parts_of_pages_leave_nothing_in_the_cache(tmp_path: Path, arena: Arena, offset: int, length: int, shift: int) -> None:
    content = random_bytes(20 * PAGE)
    path = write(tmp_path / "file", content)
    needs_direct(path)
    out = arena.allocate(shift + length)[shift:]
    assert fetch(FileExtent(str(path), offset, length), out) is None
    assert torch.equal(out, content[offset : offset + length])
    assert cached_pages(path) == 0


def test_every_value_of_a_disk_store_arrives_in_memory_of_the_fast_tier(tmp_path: Path) -> None:
    slow, fast, reader, results = DiskBackend(tmp_path / "store"), DeviceBackend(), Reader(), Results()
    samples = all_samples() | {f"large {number}": torch.randn(700 + number, 1000) for number in range(3)}
    for key, tensor in samples.items():
        slow.put(key, tensor)
        fast.adopt(key, fast.allocate(key, TensorSpec.of(tensor)))
        reader.submit(slow.extent(key), raw_bytes(fast.get(key)), results.done(key))
    reader.close()
    assert results.errors == dict.fromkeys(samples)
    for key, tensor in samples.items():
        assert_identical(fast.get(key), tensor)
    slow.close()


def test_many_extents_of_several_threads(tmp_path: Path, arena: Arena) -> None:
    contents = [random_bytes(30_000 + 4096 * number, number) for number in range(8)]
    paths = [write(tmp_path / str(number), content, cached=number % 2 == 0) for number, content in enumerate(contents)]
    reader, results = Reader(threads=3, request_bytes=2 * PAGE), Results()
    outs: dict[str, torch.Tensor] = {}

    def work(me: int) -> None:
        for turn in range(40):
            which = (me + turn) % 8
            name = f"{which} {me} {turn}"
            outs[name] = arena.allocate(len(contents[which]))
            reader.submit(FileExtent(str(paths[which]), 0, len(contents[which])), outs[name], results.done(name))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.close()
    assert results.errors == dict.fromkeys(outs)
    assert results.calls == dict.fromkeys(outs, 1)
    assert all(torch.equal(out, contents[int(name.split()[0])]) for name, out in outs.items())
    assert results.threads <= {"tierstore-read-0", "tierstore-read-1", "tierstore-read-2"}


# -- systems that give less -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 1000, PAGE, PAGE + 1])
@pytest.mark.parametrize("cached", [True, False])
def test_short_reads_are_continued(tmp_path: Path, arena: Arena, spy: Spy, cached: bool, most: int) -> None:
    content = random_bytes(3 * PAGE + 77)
    path = write(tmp_path / "file", content, cached=cached)
    spy.most = most
    out = arena.allocate(len(content))
    assert fetch(FileExtent(str(path), 0, len(content)), out) is None
    assert torch.equal(out, content)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("lacking", ["_NOWAIT", "_DIRECT"])
def test_a_system_without_the_shortcuts_reads_too(
    tmp_path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch, lacking: str, cached: bool
) -> None:
    content = random_bytes(5 * PAGE + 77)
    path = write(tmp_path / "file", content, cached=cached)
    monkeypatch.setattr(open_file, lacking, None)
    out = arena.allocate(len(content))
    assert fetch(FileExtent(str(path), 0, len(content)), out) is None
    assert torch.equal(out, content)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_refused_direct_reads_are_buffered(tmp_path: Path, arena: Arena, spy: Spy, number: int) -> None:
    content = random_bytes(16 * PAGE)
    path = write(tmp_path / "file", content)
    spy.fail = lambda direct, offset: number if direct else 0
    out = arena.allocate(len(content))
    assert fetch(FileExtent(str(path), 0, len(content)), out, request_bytes=PAGE) is None
    assert torch.equal(out, content)
    assert spy.direct == 0


def test_refused_direct_opening_is_buffered(tmp_path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random_bytes(16 * PAGE)
    path = write(tmp_path / "file", content)
    really_open = os.open

    def refusing(name: str, flags: int, *rest: int, **options: int | None) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(name, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refusing)
    out = arena.allocate(len(content))
    assert fetch(FileExtent(str(path), 0, len(content)), out, request_bytes=PAGE) is None
    assert torch.equal(out, content)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 8])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("missing", [1, PAGE, 3 * PAGE + 5, 100_000, 200_000])
def test_a_file_that_ends_early_is_an_error_that_names_it(tmp_path: Path, arena: Arena, cached: bool, missing: int, shift: int) -> None:
    path = write(tmp_path / "file", random_bytes(100_000), cached=cached)
    out = arena.allocate(shift + 100_000)[shift:]
    error = fetch(FileExtent(str(path), missing, 100_000), out, request_bytes=8 * PAGE)
    assert isinstance(error, CorruptionError)
    assert str(path) in str(error)


def test_a_file_that_is_gone_is_reported_and_others_are_read(tmp_path: Path, arena: Arena) -> None:
    content = random_bytes(50_000)
    path = write(tmp_path / "file", content)
    reader, results = Reader(), Results()
    outs = {name: arena.allocate(50_000) for name in ("before", "gone", "after")}
    for name, out in outs.items():
        reader.submit(FileExtent(str(path if name != "gone" else tmp_path / "gone"), 0, 50_000), out, results.done(name))
    reader.close()
    assert results.calls == dict.fromkeys(outs, 1)
    assert isinstance(results.errors["gone"], FileNotFoundError)
    assert str(tmp_path / "gone") in str(results.errors["gone"])
    assert all(name.startswith("tierstore-read-") for name in results.threads)
    assert torch.equal(outs["before"], content)
    assert torch.equal(outs["after"], content)


def test_a_file_deleted_or_replaced_after_submit_is_read_as_it_was(tmp_path: Path, arena: Arena) -> None:
    reader, results, gate = Reader(threads=1), Results(), threading.Event()
    blocker = write(tmp_path / "blocker", random_bytes(1))
    reader.submit(FileExtent(str(blocker), 0, 1), arena.allocate(1), lambda error: bool(gate.wait(60)))
    contents = {name: random_bytes(300_000, seed) for seed, name in enumerate(("deleted", "replaced"))}
    outs = {name: arena.allocate(300_000) for name in contents}
    for name, content in contents.items():
        reader.submit(FileExtent(str(write(tmp_path / name, content)), 0, 300_000), outs[name], results.done(name))
    (tmp_path / "deleted").unlink()
    write(tmp_path / "new", random_bytes(300_000, 9)).replace(tmp_path / "replaced")
    gate.set()
    reader.close()
    assert results.errors == dict.fromkeys(contents)
    assert all(torch.equal(outs[name], content) for name, content in contents.items())


def test_the_first_error_wins_and_the_rest_is_not_read(tmp_path: Path, arena: Arena, spy: Spy) -> None:
    path = write(tmp_path / "file", random_bytes(32 * PAGE))
    tried = []

    def fail(direct: bool, offset: int) -> int:
        tried.append(offset)
        return errno.EIO if offset >= 4 * PAGE else 0

    spy.fail = fail
    error = fetch(FileExtent(str(path), 0, 32 * PAGE), arena.allocate(32 * PAGE), threads=1, request_bytes=PAGE)
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO
    assert max(tried) == 4 * PAGE


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(9, dtype=torch.uint8),
        torch.empty(10, dtype=torch.int8),
        torch.empty(20, dtype=torch.uint8)[::2],
        torch.empty(10, dtype=torch.uint8, device="meta"),
    ],
)
def test_memory_that_does_not_fit_is_refused_at_once(tmp_path: Path, out: torch.Tensor) -> None:
    reader, results = Reader(), Results()
    with pytest.raises(ValueError, match="10 bytes"):
        reader.submit(FileExtent(str(write(tmp_path / "file", random_bytes(10))), 0, 10), out, results.done("it"))
    reader.close()
    assert not results.calls


@pytest.mark.parametrize("options", [{"threads": 0}, {"request_bytes": 0}])
def test_a_reader_needs_threads_and_bytes(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Reader(**options)


# -- order, ends and references ---------------------------------------------------------------------------------------


def test_threads_start_at_the_first_extent_and_serve_in_order(tmp_path: Path, arena: Arena) -> None:
    path = write(tmp_path / "file", random_bytes(20 * PAGE))
    reader, results = Reader(threads=1, request_bytes=PAGE), Results()
    assert not any(thread.name.startswith("tierstore-read") for thread in threading.enumerate())
    names = [str(number) for number in range(20)]
    for name in names:
        nbytes = PAGE * (20 - int(name))
        reader.submit(FileExtent(str(path), 0, nbytes), arena.allocate(nbytes), results.done(name))
    reader.close()
    assert results.order == names


class Device:
    """A `Readable` that says how many reads of it are under way; with `together`, a read ends when so many are."""

    def __init__(self, *, direct: bool, together: int = 1, broken: int | None = None) -> None:
        self.direct = direct
        self.most = 0
        self.order: list[int] = []
        self._broken = broken
        self._now = 0
        self._lock = threading.Lock()
        self._meeting = threading.Barrier(together)

    def share(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def read(self, memory: memoryview, offset: int) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            self.order.append(offset)
        self._meeting.wait(60)
        time.sleep(0.002)  # a read beside this one would be seen
        memory[:1] = bytes([offset % 251])
        with self._lock:
            self._now -= 1
        if offset == self._broken:
            raise OSError(errno.EIO, "broken")

    def read_cached(self, memory: memoryview, offset: int) -> None:
        raise NotImplementedError

    def fileno(self) -> int:
        raise NotImplementedError

    def keep(self) -> Callable[[], None]:
        raise NotImplementedError


class Held:
    """A `Device` whose reads begin only after an event."""

    def __init__(self, device: Device, event: threading.Event) -> None:
        self.direct, self.share, self.close = device.direct, device.share, device.close
        self.read_cached, self.fileno, self.keep = device.read_cached, device.fileno, device.keep
        self._device = device
        self._event = event

    def read(self, memory: memoryview, offset: int) -> None:
        assert self._event.wait(60)
        self._device.read(memory, offset)


def read_all(device: Device, nbytes: int, count: int) -> dict[str, BaseException | None]:
    """Read `count` extents of `nbytes` that are begun one right after the other; return how each ended."""
    reader, results = Reader(request_bytes=1 << 20), Results()
    outs = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(count)]
    for number, out in enumerate(outs):
        reader.begin(lambda number=number, out=out: (FileExtent("", number, nbytes, device), out), results.done(str(number)))  # type: ignore[misc]
    reader.close()
    assert results.calls == {str(number): 1 for number in range(count)}
    assert [int(out[0]) for out in outs] == list(range(count))
    return results.errors


def test_large_direct_reads_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side they would all arrive as late as the last one; one that fails lets the next one go on."""
    monkeypatch.setattr("tierstore.transfer.reader._LARGE", 1 << 10)
    device = Device(direct=True, broken=3)
    errors = read_all(device, 1 << 10, 12)
    assert device.most == 1
    assert [name for name, error in errors.items() if error is not None] == ["3"]


def test_a_device_goes_on_while_the_last_value_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is told of a value may take long, and has the next one read meanwhile."""
    monkeypatch.setattr("tierstore.transfer.reader._LARGE", 1 << 10)
    device, prepared, told, second = Device(direct=True), threading.Event(), threading.Event(), threading.Event()
    outs = [torch.zeros(1 << 10, dtype=torch.uint8) for _ in range(2)]
    reader = Reader(threads=2)

    def first() -> tuple[FileExtent, torch.Tensor]:
        return FileExtent("", 0, 1 << 10, Held(device, prepared)), outs[0]

    def next_one() -> tuple[FileExtent, torch.Tensor]:
        prepared.set()
        return FileExtent("", 1, 1 << 10, Held(device, told)), outs[1]

    def first_done(error: BaseException | None) -> None:
        told.set()  # which the second read waits for
        meanwhile.append(second.wait(10))

    meanwhile = list[bool]()
    reader.begin(first, first_done)
    reader.begin(next_one, lambda error: second.set())
    assert second.wait(60)
    reader.close()
    assert meanwhile == [True]
    assert [int(out[0]) for out in outs] == [0, 1]


def test_values_are_read_in_the_order_in_which_they_were_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them is prepared first, among those that wait for the device."""
    monkeypatch.setattr("tierstore.transfer.reader._LARGE", 1 << 10)
    device, results = Device(direct=True), Results()
    waiting, all_wait = threading.Barrier(3), threading.Event()
    reader = Reader(threads=4)

    def prepare(number: int) -> tuple[FileExtent, torch.Tensor]:
        if number:
            waiting.wait(60)  # so that all of the others are prepared at once, in any order
        file = Held(device, all_wait) if number == 0 else device
        return FileExtent("", number, 1 << 10, file), torch.zeros(1 << 10, dtype=torch.uint8)

    for number in range(4):
        reader.begin(lambda number=number: prepare(number), results.done(str(number)))  # type: ignore[misc]
    deadline = time.monotonic() + 60
    while len(reader._line._waiting) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    all_wait.set()
    reader.close()
    assert device.order == [0, 1, 2, 3]
    assert set(results.errors.values()) == {None}


@pytest.mark.parametrize("device", [Device(direct=False, together=4), Device(direct=True, together=4)], ids=["cached", "small"])
def test_other_reads_come_at_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from the page cache is copied by several threads; small requests alone leave a device idle."""
    monkeypatch.setattr("tierstore.transfer.reader._LARGE", (1 << 10) + device.direct)
    read_all(device, 1 << 10, 12)
    assert device.most == 4


def test_large_direct_reads_are_one_request(tmp_path: Path, arena: Arena, spy: Spy) -> None:
    content = random_bytes(6 << 20)
    path = write(tmp_path / "file", content)
    needs_direct(path)
    file, out = open_file.OpenFile(str(path)), arena.allocate(6 << 20)
    reader, results, requests = Reader(request_bytes=1 << 20), Results(), list[int]()
    for _ in range(2):
        spy.fail = lambda direct, offset: requests.append(offset) or 0 if direct else 0  # type: ignore[func-returns-value]
        requests.clear()
        reader.begin(lambda: (FileExtent(str(path), 0, 6 << 20, file), out.zero_()), results.done("it"))
        results.wait()
        assert torch.equal(out, content)
        assert results.errors["it"] is None
    assert requests == [0], "the first time nobody knew yet whether the file is read directly"
    reader.close()
    file.close()


def test_close_waits_for_what_is_queued_and_refuses_what_comes(tmp_path: Path, arena: Arena) -> None:
    content = random_bytes(10 * PAGE)
    path = write(tmp_path / "file", content)
    reader, results, gate = Reader(threads=2, request_bytes=PAGE), Results(), threading.Event()
    for _ in range(2):
        reader.submit(FileExtent(str(path), 0, 1), arena.allocate(1), lambda error: bool(gate.wait(60)))
    outs = {str(number): arena.allocate(10 * PAGE) for number in range(12)}
    for name, out in outs.items():
        reader.submit(FileExtent(str(path), 0, 10 * PAGE), out, results.done(name))
    closer = threading.Thread(target=reader.close)
    closer.start()
    while not reader._closed:
        time.sleep(0.001)
    assert not results.calls
    with pytest.raises(ClosedError):
        reader.submit(FileExtent(str(path), 0, 1), arena.allocate(1), results.done("late"))
    gate.set()
    closer.join(60)
    assert results.calls == dict.fromkeys(outs, 1)
    assert all(torch.equal(out, content) for out in outs.values())
    reader.close()
    assert not any(thread.name.startswith("tierstore-read") for thread in threading.enumerate())


def test_a_reader_that_read_nothing_closes() -> None:
    Reader().close()


@pytest.mark.parametrize("short", [False, True])
def test_memory_is_kept_until_it_is_read_and_no_longer(tmp_path: Path, arena: Arena, short: bool) -> None:
    """An idle thread that remembered its last request, or an error its frames, would hold memory of the fast tier."""
    content = random_bytes(10 * PAGE)
    path = write(tmp_path / "file", content[: 5 * PAGE] if short else content)
    reader, results, gate = Reader(), Results(), threading.Event()
    out = arena.allocate(10 * PAGE)
    storage = StorageWeakRef(out.untyped_storage())
    alive = []

    def done(error: BaseException | None) -> None:
        gate.wait(60)
        alive.append(not storage.expired())
        results.done("it")(error)

    gc.disable()
    reader.submit(FileExtent(str(path), 0, 10 * PAGE), out, done)
    del out
    gate.set()
    results.wait()
    deadline = time.monotonic() + 60
    while not storage.expired() and time.monotonic() < deadline:
        time.sleep(0.001)
    gc.enable()
    assert alive == [False], "whoever is told may evict the value, and must get its memory back"
    assert storage.expired()
    assert isinstance(results.errors["it"], CorruptionError) is short
    reader.close()
