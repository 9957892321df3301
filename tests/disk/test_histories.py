"""The checkers of histories: against all orders of small histories, one by one, and on the classic mistakes."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.disk.histories import MISSING, Operation, check_register, check_single_writer, check_stale_reader

write, read = Operation.of, Operation.of


def possible(writes: list[Operation], reads: list[Operation]) -> bool:
    """Try every order in which the operations can have taken place."""
    whole = [(operation, True) for operation in writes] + [(operation, False) for operation in reads]
    for order in permutations(whole):
        last = -1.0
        value: int | None = None
        for operation, is_write in order:
            if operation.end < last or (not is_write and value != operation.value):
                break
            last = max(last, operation.start)
            value = operation.value if is_write else value
        else:
            return True
    return False


MOMENTS = st.tuples(st.integers(0, 60), st.integers(1, 40)).map(lambda pair: (float(pair[0]), float(pair[0] + pair[1])))


def unlike(moments: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Make all moments differ, as those of a fine clock do."""
    return [(start + number / 100, end + number / 100 + 0.005) for number, (start, end) in enumerate(moments)]


@settings(max_examples=400, deadline=None)
@given(st.lists(MOMENTS, min_size=1, max_size=3), st.lists(st.tuples(MOMENTS, st.integers(0, 2)), max_size=3))
def test_registers_against_every_order(written: list[tuple[float, float]], seen: list[tuple[tuple[float, float], int]]) -> None:
    moments = unlike([*written, *(moment for moment, _ in seen)])
    writes = [write(1 + number, *moment) for number, moment in enumerate(moments[: len(written)])]
    reads = [read(1 + which % len(written), *moment) for moment, (_, which) in zip(moments[len(written) :], seen, strict=True)]
    assert (check_register(writes, reads) is None) == possible(writes, reads)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.lists(st.tuples(MOMENTS, st.integers(0, 2)), max_size=3), st.integers(0, 2))
def test_single_writers_against_every_order(steps: list[int], seen: list[tuple[tuple[float, float], int]], deleted: int) -> None:
    times = [float(sum(steps[: number + 1])) for number in range(len(steps) // 2 * 2)]
    writes = [
        write(MISSING if number % 3 == deleted else 10 + number, times[2 * number], times[2 * number + 1])
        for number in range(len(times) // 2)
    ]
    moments = unlike([moment for moment, _ in seen])
    reads = [
        read(writes[which % len(writes)].value, start + times[0] + 0.003, end + times[0] + 0.003)
        for (start, end), (_, which) in zip(moments, seen, strict=True)
    ]
    reads = [each for each in reads if each.start > writes[0].end]
    assert (check_single_writer(writes, reads) is None) == possible(writes, reads)


LOST, STALE, FUTURE, TORN_ORDER = (
    ([write(1, 0, 1), write(2, 2, 3)], [read(2, 4, 5), read(1, 6, 7)]),
    ([write(1, 0, 1), write(2, 2, 3)], [read(1, 4, 5)]),
    ([write(1, 0, 1), write(2, 6, 7)], [read(2, 4, 5)]),
    ([write(1, 0, 10), write(2, 0, 10)], [read(1, 11, 12), read(2, 13, 14), read(1, 15, 16)]),
)


@pytest.mark.parametrize("history", [LOST, STALE, FUTURE, TORN_ORDER])
def test_registers_that_forget(history: tuple[list[Operation], list[Operation]]) -> None:
    assert check_register(*history) is not None


@pytest.mark.parametrize("history", [LOST, STALE, FUTURE])
def test_single_writers_that_forget(history: tuple[list[Operation], list[Operation]]) -> None:
    assert check_single_writer(*history) is not None


def test_deleted_and_written_again() -> None:
    writes = [write(1, 0, 1), write(MISSING, 2, 3), write(2, 4, 5), write(MISSING, 6, 7)]
    assert check_single_writer(writes, [read(MISSING, 3.1, 3.2), read(2, 5.1, 5.2), read(MISSING, 7.1, 7.2)]) is None
    assert check_single_writer(writes, [read(2, 4.1, 4.2), read(MISSING, 4.3, 4.4)]) is not None, "it came and went and came"


def test_a_process_that_reads_what_was_flushed() -> None:
    writes = [write(1, 0, 1), write(2, 2, 3), write(3, 4, 5)]
    flushed_at = [Operation(1, 6, 7, 1.5), Operation(2, 8, 9, 3.5)]
    assert check_stale_reader(writes, flushed_at) is None
    assert check_stale_reader(writes, [Operation(1, 6, 7, 3.5)]) is not None, "2 was flushed"
    assert check_stale_reader(writes, [Operation(2, 6, 7, 1.5), Operation(1, 8, 9, 1.5)]) is not None, "backwards"
    assert check_stale_reader(writes, [Operation(3, 2, 3, 0)]) is not None, "from the future"
    assert check_stale_reader(writes, [Operation(9, 2, 3, 0)]) is not None, "nobody wrote that"
