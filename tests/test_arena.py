"""Recycled memory: intervals against a naive model, and that nothing referenced is ever handed out again."""

from __future__ import annotations

import gc
import mmap
import re
import threading
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.samples import all_samples, assert_identical
from tierstore.backends import _arena
from tierstore.backends._arena import Arena
from tierstore.backends._intervals import Intervals
from tierstore.backends.memory import DeviceBackend, PinnedBackend
from tierstore.spec import TensorSpec

MIB = 1 << 20
GRAIN = 4


class IntervalsAgainstCells(RuleBasedStateMachine):
    """Every address is one cell: live, warm or cold. `backed` are the cells with memory behind them."""

    @initialize(grain=st.sampled_from([1, GRAIN]))
    def start(self, grain: int) -> None:
        self.grain = grain
        self.intervals = Intervals(grain)
        self.cells: dict[int, str] = {}
        self.taken: dict[int, int] = {}
        self.backed: set[int] = set()
        self.peak = 0
        self.next_region = 0

    @rule(size=st.integers(1, 12))
    def add(self, size: int) -> None:
        start, stop = self.next_region, self.next_region + size * GRAIN
        self.next_region = stop + GRAIN
        self.intervals.add(start, stop)
        self.cells |= dict.fromkeys(range(start, stop), "cold")

    @rule(nbytes=st.integers(1, 20))
    def take(self, nbytes: int) -> None:
        places = [at for at in self.cells if all(self.cells.get(cell, "live") != "live" for cell in range(at, at + nbytes))]
        start = self.intervals.take(nbytes)
        if not places:
            assert start is None
            return
        assert start in places
        assert self.cold_cells(start, nbytes) == min(self.cold_cells(at, nbytes) for at in places)
        for cell in range(start, start + nbytes):
            self.cells[cell] = "live"
            self.backed |= {cell // self.grain * self.grain + i for i in range(self.grain)}
        self.taken[start] = nbytes
        self.peak = max(self.peak, sum(self.taken.values()))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(sorted(self.taken)))
        self.intervals.give(start)
        self.cells |= dict.fromkeys(range(start, start + self.taken.pop(start)), "warm")

    @rule(forget_peak=st.booleans())
    def cool(self, forget_peak: bool) -> None:
        if forget_peak:
            self.intervals.peak = self.peak = self.intervals.live
        warm_before = {cell for cell, state in self.cells.items() if state == "warm"}
        for start, stop in self.intervals.cool():
            for cell in range(start, stop):
                assert self.cells[cell] in ("warm", "cold"), "memory that is in use was given back"
                self.cells[cell] = "cold"
                self.backed.discard(cell)
        left = {cell for cell, state in self.cells.items() if state == "warm"}
        assert self.intervals.live + len(left) <= self.peak
        assert len(warm_before - left) < max(1, sum(self.taken.values()) + len(warm_before) - self.peak + self.grain), "too much"

    @precondition(lambda self: self.cells)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from([cell for cell in sorted(self.cells) if cell - 1 not in self.cells]))
        stop = next(cell for cell in range(start, self.next_region) if cell not in self.cells)
        busy = "live" in {self.cells[cell] for cell in range(start, stop)}
        assert self.intervals.remove(start, stop) is not busy
        if not busy:
            for cell in range(start, stop):
                del self.cells[cell]

    @invariant()
    def same_cells_and_complete_coalescing(self) -> None:
        free = self.intervals.free
        states = {cell: "warm" if piece.warm else "cold" for piece in free for cell in range(piece.start, piece.stop)}
        assert states == {cell: state for cell, state in self.cells.items() if state != "live"}
        assert sum(piece.size for piece in free) == len(states), "free pieces overlap"
        for left, right in pairwise(free):
            assert left.stop < right.start or (left.stop == right.start and left.warm != right.warm)

    @invariant()
    def exact_accounting(self) -> None:
        assert self.intervals.live == sum(self.taken.values())
        assert self.intervals.warm == sum(state == "warm" for state in self.cells.values())
        assert self.intervals.peak == self.peak

    @invariant()
    def cold_cells_are_backed_only_beside_others(self) -> None:
        hidden = {cell for cell in self.backed if self.cells.get(cell) == "cold"}
        for cell in hidden:
            grain = range(cell // self.grain * self.grain, (cell // self.grain + 1) * self.grain)
            assert {self.cells[other] for other in grain} & {"live", "warm"}, "cold memory that nobody will give back"

    def cold_cells(self, start: int, nbytes: int) -> int:
        return sum(self.cells[cell] == "cold" for cell in range(start, start + nbytes))


TestIntervals = IntervalsAgainstCells.TestCase
TestIntervals.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_one_fixed_region_refuses_what_does_not_fit() -> None:
    region = Intervals()
    region.add(0, 100)
    first, second = region.take(60), region.take(40)
    assert {first, second} == {0, 60}
    assert region.take(1) is None
    region.give(0)
    assert region.take(61) is None
    assert region.take(60) == 0


def test_a_range_ends_where_warm_bytes_end_if_that_saves_cold_ones() -> None:
    region = Intervals()
    region.add(0, 14)
    assert (region.take(10), region.take(4)) == (0, 10)
    region.give(0)
    region.peak = region.live
    assert region.cool() == [(0, 10)]
    region.give(10)
    assert region.take(8) == 6


# -- memory -----------------------------------------------------------------------------------------------------------


def regions(arena: Arena) -> list[_arena.Region]:
    return arena._regions


def resident(arena: Arena) -> int:
    """Return the bytes of real memory behind the arena's addresses."""
    total = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(text, 16) for text in found.groups())
            inside = any(low < region.stop and region.start < high for region in regions(arena))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def filled(arena: Arena, nbytes: int, value: int = 1) -> torch.Tensor:
    return arena.allocate(nbytes).fill_(value)


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, MIB + 1, 5 * MIB])
def test_a_tensor_has_a_storage_of_its_own_that_is_aligned(nbytes: int) -> None:
    tensor = filled(Arena(), nbytes)
    assert (tensor.dtype, tensor.shape, tensor.storage_offset()) == (torch.uint8, (nbytes,), 0)
    assert tensor.untyped_storage().nbytes() == nbytes
    assert tensor.data_ptr() % 4096 == 0


def test_memory_is_used_again_once_nobody_refers_to_it() -> None:
    arena = Arena()
    tensor = filled(arena, 3 * MIB)
    place = tensor.data_ptr()
    del tensor
    again = arena.allocate(3 * MIB)
    assert again.data_ptr() == place
    assert resident(arena) >= 3 * MIB  # without a write: the memory was never given back


KEEPERS: dict[str, Callable[[torch.Tensor], object]] = {
    "tensor": lambda tensor: tensor,
    "slice": lambda tensor: tensor[MIB : MIB + 1],
    "other dtype": lambda tensor: tensor.view(torch.float32)[7:9],
    "storage": lambda tensor: tensor.untyped_storage(),
    "numpy": lambda tensor: tensor.numpy()[5:],
    "numpy, detached": lambda tensor: memoryview(tensor.numpy()[5:]),
    "dlpack": lambda tensor: torch.from_dlpack(tensor),
    "autograd": lambda tensor: tensor.view(torch.float32).requires_grad_().mul(2).grad_fn,
}


@pytest.mark.parametrize("name", KEEPERS)
def test_memory_is_not_used_again_while_anything_refers_to_it(name: str) -> None:
    arena = Arena()
    tensor = filled(arena, 2 * MIB)
    place, kept = tensor.data_ptr(), KEEPERS[name](tensor)
    del tensor
    others = [filled(arena, MIB, 0) for _ in range(6)]
    assert not any(place <= other.data_ptr() < place + 2 * MIB for other in others)
    arena.trim()
    assert kept is not None
    del kept
    gc.collect()
    assert arena.allocate(2 * MIB).data_ptr() == place


def test_a_kept_tensor_keeps_its_bytes_through_everything() -> None:
    arena = Arena()
    kept = [filled(arena, MIB + 4096 * number, number) for number in range(20)]
    views = [tensor[-4096:] for tensor in kept[::2]]
    del kept
    for size in range(1, 40):
        filled(arena, size * 100_000, 0xFF)
        if size % 8 == 0:
            arena.trim()
    del arena
    gc.collect()
    assert [int(view.min()) for view in views] == [int(view.max()) for view in views] == list(range(0, 20, 2))


def test_real_memory_stays_below_the_most_that_was_ever_live() -> None:
    arena = Arena()
    live = {number: filled(arena, MIB * (1 + number % 5)) for number in range(12)}
    most = sum(tensor.nbytes for tensor in live.values())
    sizes = iter([7, 3, 11, 1, 5, 2, 9, 4, 13, 6] * 6)
    for number, size in enumerate(sizes):
        while live and sum(tensor.nbytes for tensor in live.values()) + size * MIB + number * 4096 > most:
            live.pop(list(live)[number % len(live)])
        live[100 + number] = filled(arena, size * MIB + number * 4096)
        assert arena.held_bytes <= most
        # a huge page that is touched in part counts as a whole
        assert resident(arena) <= most + 2 * 2 * MIB * (len(live) + 1)
        assert resident(arena) >= sum(tensor.nbytes for tensor in live.values())


def test_what_is_cooled_really_goes_back() -> None:
    arena = Arena()
    several = [filled(arena, 8 * MIB) for _ in range(4)]
    keep = several[1], several[3]
    del several
    large = filled(arena, 16 * MIB)  # fits into neither gap of 8 MiB: both must go first
    assert arena.held_bytes == 32 * MIB
    assert resident(arena) <= 32 * MIB + 2 * MIB
    assert all(bool((tensor == 1).all()) for tensor in (*keep, large))


def test_trim_gives_everything_free_back_and_forgets_the_peak() -> None:
    arena = Arena()
    kept, gone = filled(arena, 4 * MIB), filled(arena, 20 * MIB)
    del gone
    arena.trim()
    assert arena.held_bytes == 4 * MIB
    assert resident(arena) == 4 * MIB
    filled(arena, 6 * MIB)
    assert arena.held_bytes == 10 * MIB
    del kept
    arena.trim()
    assert (arena.held_bytes, regions(arena)) == (0, [])


def test_many_regions_are_one_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arena, "_STEP", 4 * MIB)
    arena = Arena()
    tensors = [filled(arena, 3 * MIB, number) for number in range(9)]
    assert len(regions(arena)) > 2
    assert [int(tensor.min()) for tensor in tensors] == [int(tensor.max()) for tensor in tensors] == list(range(9))
    del tensors[1:]
    arena.trim()
    assert len(regions(arena)) == 1


def test_a_system_that_grants_less_gives_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mmap.mmap

    def stingy(fileno: int, length: int, flags: int) -> mmap.mmap:
        if length > 8 * MIB:
            raise OSError(12, "Cannot allocate memory")
        return real(fileno, length, flags=flags)

    arena = Arena()
    with mock.patch.object(_arena.mmap, "mmap", stingy):
        assert filled(arena, 3 * MIB).nbytes == 3 * MIB
        with pytest.raises(MemoryError, match=str(9 * MIB)):
            arena.allocate(9 * MIB)
    assert filled(arena, 9 * MIB).nbytes == 9 * MIB


def test_a_system_without_madvise_gets_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arena, "_DISCARD", None)
    assert filled(Arena(), 3 * MIB).sum() == 3 * MIB


def test_memory_that_outlives_the_arena_goes_back_piece_by_piece() -> None:
    arena = Arena()
    first, second = filled(arena, 4 * MIB), filled(arena, 8 * MIB)
    alive, region = Arena(), regions(arena)[0]
    regions(alive).append(region)  # to count its memory
    gone = weakref.ref(arena)
    del arena
    gc.collect()
    assert gone() is None
    del second
    assert resident(alive) == 4 * MIB
    assert bool((first == 1).all())


def test_threads_never_share_memory() -> None:
    arena = Arena()
    wrong = []

    def work(me: int) -> None:
        kept: list[torch.Tensor] = []
        for turn in range(60):
            kept.append(filled(arena, 4096 * (1 + (turn * 7 + me) % 40), me))
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
    assert arena.held_bytes == 0


def test_a_storage_may_die_while_the_arena_is_locked() -> None:
    arena = Arena()
    tensor = filled(arena, MIB)
    with arena._lock:
        del tensor  # would wait for ever if its end took the lock
    arena.trim()
    assert arena.held_bytes == 0


# -- backends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [DeviceBackend, PinnedBackend])
def test_a_backend_allocates_every_dtype_and_layout(make: Callable[[], DeviceBackend]) -> None:
    backend = make()
    with torch.inference_mode():
        allocated = {name: backend.allocate(name, TensorSpec.of(tensor)) for name, tensor in all_samples().items()}
    for name, tensor in all_samples().items():
        assert TensorSpec.of(allocated[name]) == TensorSpec.of(tensor)
        assert not allocated[name].is_inference()
        backend.put(name, tensor)
        assert_identical(backend.get(name), tensor)


def test_large_values_are_recycled_and_small_ones_are_not_rounded_up() -> None:
    backend = DeviceBackend()
    value = torch.arange(MIB // 4, dtype=torch.float32)
    backend.put("key", value)
    place = backend.get("key").data_ptr()
    backend.put("small", value[:-1])
    assert backend._arena.held_bytes == MIB
    backend.delete("key")
    backend.put("other", value)
    assert backend.get("other").data_ptr() == place
    assert_identical(backend.get("other"), value)
    assert_identical(backend.get("small"), value[:-1])


def test_a_value_held_by_a_caller_survives_its_backend() -> None:
    backend = DeviceBackend()
    backend.put("key", torch.full((MIB,), 7))
    kept = backend.get("key")
    backend.delete("key")
    backend.trim()
    for number in range(3):
        backend.put("other", torch.full((MIB,), number))
    backend.close()
    assert bool((kept == 7).all())


def test_trim_of_a_backend_keeps_its_values() -> None:
    backend = DeviceBackend()
    backend.put("gone", torch.zeros(5 * MIB, dtype=torch.uint8))
    backend.put("key", torch.ones(5 * MIB, dtype=torch.uint8))
    backend.delete("gone")
    backend.trim()
    assert backend._arena.held_bytes == 5 * MIB
    assert bool((backend.get("key") == 1).all())
