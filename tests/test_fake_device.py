"""The fake device itself: late copies, eager reuse, and that each missing order between two accesses is reported, and no other."""

from __future__ import annotations

import random

import pytest
import torch

from tierstore.testing.fake_device import FakeDevice, FakeStream
from tierstore.testing.fake_memory import POISON
from tierstore.testing.happens import Accesses, RaceError


@pytest.fixture
def fake() -> FakeDevice:
    return FakeDevice(punctual=True)  # nothing happens by itself


def filled(fake: FakeDevice, nbytes: int, byte: int) -> torch.Tensor:
    tensor = fake.allocate_page_locked(nbytes).fill_(byte)
    fake.touch(tensor, "source", writes=True)
    return tensor


def copy_on(fake: FakeDevice, stream: FakeStream, target: torch.Tensor, source: torch.Tensor) -> None:
    with fake.on(stream):
        fake.copy(target, source)


# -- what happens when --------------------------------------------------------------------------------------------------


def test_a_copy_happens_when_somebody_waits_for_it(fake: FakeDevice) -> None:
    stream, memory, source = fake.new_stream(), fake.allocate(8), filled(fake, 8, 7)
    copy_on(fake, stream, memory, source)
    event = stream.record()
    assert bool((memory == POISON).all())
    assert not event.passed()
    fake.default.wait(event)
    assert bool((memory == 7).all())
    fake.now = 1.0
    assert event.passed()


def test_a_copy_happens_when_the_host_waits_for_it(fake: FakeDevice) -> None:
    stream, memory, source = fake.new_stream(), fake.allocate(8), filled(fake, 8, 7)
    copy_on(fake, stream, memory, source)
    stream.record().synchronize()
    assert bool((memory == 7).all())


def test_copies_of_several_streams_happen_in_the_order_that_they_wait_in(fake: FakeDevice) -> None:
    first, second = fake.new_stream(), fake.new_stream()
    memory, back = fake.allocate(8), fake.allocate_page_locked(8)
    copy_on(fake, first, memory, filled(fake, 8, 7))
    second.wait(first.record())
    copy_on(fake, second, back, memory)
    second.record().synchronize()
    assert bool((back == 7).all())
    fake.accesses.check()


@pytest.mark.parametrize("seed", range(20))
def test_copies_happen_at_random_moments_after_what_they_wait_for(seed: int) -> None:
    fake = FakeDevice(seed)
    streams = [fake.new_stream() for _ in range(3)]
    memories = [fake.allocate(8) for _ in range(3)]
    sources = [filled(fake, 8, byte) for byte in (1, 2, 3)]
    for stream, memory, source in zip(streams, memories, sources, strict=True):
        copy_on(fake, stream, memory, source)
    streams[0].wait(streams[1].record())
    copy_on(fake, streams[0], memories[0], memories[1])
    for _ in range(200):
        fake.drift()
    assert [int(memory[0]) for memory in memories] == [2, 2, 3]


def test_memory_is_used_again_at_once_by_its_owner_only(fake: FakeDevice) -> None:
    first, second = fake.allocate(100), fake.allocate(100)
    places = first.data_ptr(), second.data_ptr()
    side = fake.side_stream("side")
    del first, second
    with fake.on(side):
        assert fake.allocate(100).data_ptr() not in places
    third = fake.allocate(100)
    assert third.data_ptr() == places[1]  # what came back last
    assert bool((third == POISON).all())
    assert fake.memory.allocated == 100


def test_a_pageable_source_is_read_before_the_copy_returns(fake: FakeDevice) -> None:
    stream, memory, source = fake.new_stream(), fake.allocate(8), torch.full((8,), 7, dtype=torch.uint8)
    copy_on(fake, stream, memory, source)
    source.zero_()
    fake.default.wait(stream.record())
    assert bool((memory == 7).all())


def test_memory_is_short(fake: FakeDevice) -> None:
    fake.memory.capacity = 100
    kept = fake.allocate(60)
    with pytest.raises(torch.OutOfMemoryError):
        fake.allocate(41)
    del kept
    fake.allocate(41)


def test_time_is_that_of_the_streams(fake: FakeDevice) -> None:
    fake.bandwidth = 4.0
    stream, source = fake.new_stream(), filled(fake, 8, 7)
    before = fake.default.record_timer()
    fake.default.compute(1.0)
    copy_on(fake, stream, fake.allocate(8), source)
    fake.default.wait(stream.record())
    after = fake.default.record_timer()
    assert after.seconds_since(before) == 2.0
    fake.default.compute(1.0)
    assert fake.default.record_timer().seconds_since(before) == 3.0


# -- orders -----------------------------------------------------------------------------------------------------------


def test_a_read_needs_the_mark_behind_the_copy(fake: FakeDevice) -> None:
    stream, memory = fake.new_stream(), fake.allocate(8)
    too_early = stream.record()
    copy_on(fake, stream, memory, filled(fake, 8, 7))
    fake.default.wait(too_early)
    fake.use(memory, "a read")
    with pytest.raises(RaceError, match=r"target of a copy .*copies 0.* and a read"):
        fake.accesses.check()


def test_the_mark_must_be_on_the_stream_of_the_copy(fake: FakeDevice) -> None:
    stream, memory = fake.new_stream(), fake.allocate(8)
    copy_on(fake, stream, memory, filled(fake, 8, 7))
    fake.default.wait(fake.new_stream().record())
    fake.use(memory, "a read")
    with pytest.raises(RaceError):
        fake.accesses.check()


def test_orders_are_passed_on(fake: FakeDevice) -> None:
    stream, memory, side = fake.new_stream(), fake.allocate(8), fake.side_stream("side")
    copy_on(fake, stream, memory, filled(fake, 8, 7))
    side.wait(stream.record())
    fake.default.wait(side.record())
    fake.use(memory, "a read")
    fake.accesses.check()


def test_what_the_host_has_waited_for_is_before_all_that_comes(fake: FakeDevice) -> None:
    stream, memory = fake.new_stream(), fake.allocate(8)
    copy_on(fake, stream, memory, filled(fake, 8, 7))
    stream.record().synchronize()
    fake.use(memory, "a read")
    with fake.on(fake.side_stream("side")):
        fake.use(memory, "another")
    fake.accesses.check()


def test_reads_need_no_order_and_a_write_needs_all(fake: FakeDevice) -> None:
    memory, side, stream = fake.allocate(8), fake.side_stream("side"), fake.new_stream()
    fake.use(memory, "one read")
    with fake.on(side):
        fake.use(memory, "another")
    fake.accesses.check()
    stream.wait(fake.default.record())
    copy_on(fake, stream, memory, filled(fake, 8, 7))
    with pytest.raises(RaceError, match=r"another .*side.* and target of a copy"):
        fake.accesses.check()


def test_memory_that_is_used_again_is_the_same_memory(fake: FakeDevice) -> None:
    stream, memory = fake.new_stream(), fake.allocate(8)
    fake.use(memory, "the old value")
    del memory
    copy_on(fake, stream, fake.allocate(8), filled(fake, 8, 7))
    with pytest.raises(RaceError, match="the old value"):
        fake.accesses.check()


def test_the_host_may_not_change_what_a_copy_still_reads(fake: FakeDevice) -> None:
    stream, source = fake.new_stream(), filled(fake, 8, 7)
    copy_on(fake, stream, fake.allocate(8), source)
    fake.touch(source, "a new value", writes=True)
    with pytest.raises(RaceError, match=r"source of a copy .* and a new value"):
        fake.accesses.check()


def test_the_host_never_touches_memory_of_the_device(fake: FakeDevice) -> None:
    fake.touch(fake.allocate(8), "a look")
    with pytest.raises(RaceError, match="the host touches"):
        fake.accesses.check()


def test_parts_of_memory_are_apart(fake: FakeDevice) -> None:
    stream, memory = fake.new_stream(), fake.allocate(16)
    copy_on(fake, stream, memory[:8], filled(fake, 8, 7))
    fake.use(memory[8:], "the other half")
    fake.accesses.check()
    fake.use(memory[7:9], "a bit of both")
    with pytest.raises(RaceError, match="a bit of both"):
        fake.accesses.check()


@pytest.mark.parametrize("seed", range(30))
def test_forgetting_what_says_nothing_new_changes_no_answer(seed: int) -> None:
    """Against a record of everything: the same runs are racy."""
    rng = random.Random(seed)
    fake, all_kept = FakeDevice(seed), FakeDevice(seed)
    all_kept.accesses._met = _met_and_kept.__get__(all_kept.accesses)  # type: ignore[method-assign]
    script = [(rng.randrange(3), rng.randrange(6), rng.randrange(1, 5), rng.random() < 0.4, rng.randrange(3)) for _ in range(12)]
    outcomes = []
    for device in (fake, all_kept):
        streams = [device.side_stream(name) for name in "abc"]
        memory = device.allocate(16)
        for who, start, size, writes, other in script:
            with device.on(streams[who]):
                device.use(memory[start : start + size], "step", writes=writes)
            streams[other].wait(streams[who].record())
        outcomes.append(bool(device.accesses.races))
    assert outcomes[0] == outcomes[1]


def _met_and_kept(self: object, access: object, other: object, clock: object) -> bool:
    Accesses._met(self, access, other, clock)  # type: ignore[arg-type]
    return False
