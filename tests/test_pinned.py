"""Page-locked memory without an accelerator: what is locked is exact, bounded, used again, and unlocked before it is gone."""

from __future__ import annotations

import gc
import random
import threading
import warnings
from pathlib import Path

import pytest
import torch

from tests.samples import all_samples, assert_identical
from tests.test_arena import KEEPERS
from tierstore.backends._arena import HUGE, PAGE
from tierstore.backends._pinned import Locking, PageLockError, PinnedArena
from tierstore.backends.memory import PinnedBackend

MIB = 1 << 20
STEP = 8 * MIB


class Driver:
    """Locks nothing, but knows what would be locked; refuses to lock more than `most` bytes together."""

    def __init__(self, most: int = 1 << 40) -> None:
        self.locked: dict[int, int] = {}
        self.most = most
        self.calls = 0
        self._lock = threading.Lock()

    def lock(self, address: int, nbytes: int) -> int:
        with self._lock:
            self.calls += 1
            if sum(self.locked.values()) + nbytes > self.most:
                return 2
            assert not any(address < other + size and other < address + nbytes for other, size in self.locked.items()), "locked twice"
            self.locked[address] = nbytes
            return 0

    def unlock(self, address: int) -> None:
        with self._lock:
            nbytes = self.locked.pop(address)
        assert mapped(address, nbytes), "memory was given back while it was locked"

    @property
    def bytes(self) -> int:
        return sum(self.locked.values())

    def covers(self, tensor: torch.Tensor) -> bool:
        start = tensor.data_ptr()
        return any(address <= start and start + tensor.nbytes <= address + size for address, size in self.locked.items())


def mapped(address: int, nbytes: int) -> bool:
    """True if the process has memory mapped at all of a range."""
    ranges = [[int(text, 16) for text in line.split()[0].split("-")] for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(low <= address and address + nbytes <= high for low, high in ranges)


@pytest.fixture
def driver() -> Driver:
    return Driver()


def arena_of(driver: Driver, step: int = STEP) -> PinnedArena:
    return PinnedArena(Locking(driver.lock, driver.unlock), step)


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, PAGE + 1, MIB - 1, 5 * MIB, 9 * MIB + 1])
def test_a_tensor_has_locked_memory_of_its_own(driver: Driver, nbytes: int) -> None:
    arena = arena_of(driver)
    tensor = arena.allocate(nbytes).fill_(1)
    assert (tensor.dtype, tensor.shape, tensor.storage_offset()) == (torch.uint8, (nbytes,), 0)
    assert tensor.untyped_storage().nbytes() == nbytes
    if nbytes:
        assert tensor.data_ptr() % PAGE == 0
        assert driver.covers(tensor)


def test_a_large_value_takes_what_it_needs_and_no_power_of_two(driver: Driver) -> None:
    arena = arena_of(driver)
    values = [arena.allocate(33 * MIB) for _ in range(4)]
    assert arena.held_bytes == driver.bytes == 4 * (33 * MIB + -33 * MIB % HUGE)
    assert len(values) == 4


def test_many_values_share_a_region(driver: Driver) -> None:
    arena = arena_of(driver)
    values = [arena.allocate(MIB // 2) for _ in range(16)]
    assert driver.bytes == STEP
    assert driver.calls == 1
    assert all(map(driver.covers, values))


def test_memory_is_used_again_without_locking(driver: Driver) -> None:
    arena = arena_of(driver)
    place = arena.allocate(3 * MIB).data_ptr()
    for _ in range(20):
        assert arena.allocate(3 * MIB).data_ptr() == place
    assert driver.calls == 1


@pytest.mark.parametrize("name", KEEPERS)
def test_memory_is_not_used_again_while_anything_refers_to_it(driver: Driver, name: str) -> None:
    arena = arena_of(driver)
    tensor = arena.allocate(2 * MIB).fill_(1)
    place, kept = tensor.data_ptr(), KEEPERS[name](tensor)
    del tensor
    arena.trim()
    others = [arena.allocate(MIB) for _ in range(12)]
    assert not any(place <= other.data_ptr() < place + 2 * MIB for other in others)
    del others
    arena.trim()
    assert any(address <= place < address + nbytes for address, nbytes in driver.locked.items())
    assert kept is not None
    del kept
    gc.collect()
    arena.trim()
    assert driver.bytes == 0


def test_free_memory_is_one_step_at_most_apart_from_gaps(driver: Driver) -> None:
    arena = arena_of(driver)
    rng = random.Random(0)
    live: list[torch.Tensor] = []
    for _ in range(600):
        if live and (rng.random() < 0.5 or len(live) > 30):
            live.pop(rng.randrange(len(live)))
        else:
            live.append(arena.allocate(rng.choice([PAGE, 100_000, MIB, 3 * MIB, 11 * MIB])))
            used = {address: any(address <= t.data_ptr() < address + size for t in live) for address, size in driver.locked.items()}
            empty = sum(size for address, size in driver.locked.items() if not used[address])
            assert empty <= STEP
            assert all(map(driver.covers, live))
            assert driver.bytes == arena.held_bytes
    live.clear()
    arena.trim()
    assert driver.bytes == arena.held_bytes == 0


def test_values_of_one_size_leave_no_gaps(driver: Driver) -> None:
    """What streaming does: live bytes and one step, to the byte."""
    arena = arena_of(driver)
    live: list[torch.Tensor] = []
    for count in (40, 10, 60, 0, 25):
        while len(live) > count:
            live.pop(0)
        while len(live) < count:
            live.append(arena.allocate(2 * MIB))
            assert arena.held_bytes <= len(live) * 2 * MIB + STEP
    arena.trim()
    assert arena.held_bytes <= len(live) * 2 * MIB + STEP


def test_a_driver_that_locks_less_gives_what_is_needed() -> None:
    driver = Driver(most=5 * MIB)
    arena = arena_of(driver)
    first = arena.allocate(3 * MIB)
    assert driver.bytes == 4 * MIB  # whole huge pages
    with pytest.raises(PageLockError, match="page-locked"):
        arena.allocate(3 * MIB)
    assert driver.bytes == 4 * MIB
    del first
    assert driver.covers(arena.allocate(4 * MIB))


def test_tensors_outlive_the_arena_and_take_their_region_with_them(driver: Driver) -> None:
    arena = arena_of(driver)
    first, second = arena.allocate(MIB).fill_(1), arena.allocate(MIB).fill_(2)
    del arena
    gc.collect()
    assert bool((first == 1).all())
    assert bool((second == 2).all())
    assert driver.bytes == STEP
    del first
    assert driver.bytes == STEP
    del second
    gc.collect()
    assert driver.bytes == 0


def test_threads_never_share_memory(driver: Driver) -> None:
    arena = arena_of(driver, 2 * MIB)
    wrong = []

    def work(me: int) -> None:
        kept: list[torch.Tensor] = []
        for turn in range(60):
            kept.append(arena.allocate(PAGE * (1 + (turn * 7 + me) % 40)).fill_(me))
            if len(kept) > 5:
                tensor = kept.pop(turn % 5)
                wrong.extend([tensor] if not bool((tensor == me).all()) else [])
            if turn % 20 == me:
                arena.trim()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    arena.trim()
    assert driver.bytes == 0


def test_every_value_of_a_pinned_backend_is_locked(driver: Driver) -> None:
    backend = PinnedBackend(Locking(driver.lock, driver.unlock))
    for name, tensor in all_samples().items():
        backend.put(name, tensor)
        assert_identical(backend.get(name), tensor)
        assert not tensor.numel() or driver.covers(backend.get(name))
    for name in all_samples():
        backend.delete(name)
    backend.trim()
    assert driver.bytes == 0
    backend.put("last", torch.ones(MIB))
    kept = backend.get("last")
    backend.close()
    assert bool((kept == 1).all())
    del kept
    gc.collect()
    assert driver.bytes == 0


def test_memory_that_cannot_be_locked_is_ordinary_and_said_so_once() -> None:
    driver = Driver(most=300 * MIB)
    backend = PinnedBackend(Locking(driver.lock, driver.unlock))
    backend.put("locked", torch.ones(MIB))
    driver.most = 0
    large = torch.full((300 * MIB,), 3, dtype=torch.uint8)
    with pytest.warns(UserWarning, match=r"cannot be page-locked.*half the speed"):
        backend.put("plain", large)
    assert torch.equal(backend.get("plain"), large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.put("more", torch.full((2 * MIB,), 5))
        backend.trim()
    assert bool((backend.get("more") == 5).all())
    assert bool((backend.get("locked") == 1).all())
    assert driver.covers(backend.get("locked"))
    backend.close()


def test_without_an_accelerator_nothing_is_locked() -> None:
    backend = PinnedBackend()
    backend.put("key", torch.ones(MIB))
    assert backend._pinned is None
    backend.close()
