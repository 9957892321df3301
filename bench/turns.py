"""The order in which contenders take turns."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def turned(contenders: Sequence[T], number: int) -> list[T]:
    """Return the contenders in the order of one round: another one first each time."""
    shift = number % len(contenders)
    return [*contenders[shift:], *contenders[:shift]]
