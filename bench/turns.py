"""The order in which contenders take turns."""

from collections.abc import Sequence
from itertools import count, islice
from typing import TypeVar

T = TypeVar("T")


def turned(contenders: Sequence[T], number: int) -> list[T]:
    """Return the contenders in the order of one round: another one first each time, and another one before each.

    What a turn leaves behind (a disk that is still busy with what was deleted, a warm cache) is met by whoever comes next. In as
    many rounds as there are contenders, or twice as many if they are odd in number, each comes right after each other one
    equally often (Williams, Experimental Designs Balanced for the Estimation of Residual Effects of Treatments, 1949).
    """
    size = len(contenders)
    side = -1 if size % 2 and number // size % 2 else 1
    outwards = islice((side * place for step in count() for place in (-step, step + 1)), size)  # 0, 1, -1, 2, -2 ...
    return [contenders[(number + place) % size] for place in outwards]
