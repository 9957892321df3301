"""Contenders that take turns: in what order, and how sure one can be of what they show."""

import math
from collections.abc import Sequence
from itertools import count, islice
from typing import TypeVar

T = TypeVar("T")

SURE = 1.645  # standard deviations on either side that leave out a tenth


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


def interval(figures: Sequence[float]) -> str:
    """Say between which of the sorted `figures` the median of all that there could be is, in nine cases of ten.

    How many are below it is a matter of tossing a coin for each (David and Nagaraja, Order Statistics, section 7.1), and fewer
    than five tosses say nothing.
    """
    if len(figures) < 5:
        return "-"
    aside = max(0, math.floor((len(figures) - 1 - SURE * math.sqrt(len(figures))) / 2))
    return f"{figures[aside]:.2f}-{figures[-1 - aside]:.2f}"
