"""What more memory, or less, would buy: the same forecast for other budgets."""

from __future__ import annotations

from collections.abc import Iterator

from tierstore.outlook.forecast import Forecast, Rooms, Smallest, Speeds, forecast
from tierstore.outlook.weights import Weights

_FACTORS = (0.5, 1, 1.5, 2, 3)


def choices(weights: Weights, asked: Forecast, speeds: Speeds, least: Smallest) -> list[Forecast]:
    """Return `asked` and forecasts for other sizes of one tier at a time, the fast one first, each from less to more memory.

    From the least that starts to all that the model takes; budgets that change nothing are left out.
    """
    rooms = asked.rooms
    fast, budget = next(iter(rooms.nbytes.items()))
    total = weights.nbytes
    sizes = {size for size in (least.ahead, *(int(budget * factor) for factor in _FACTORS), total) if least.starts <= size <= total}
    made = [asked if size == budget else forecast(weights, _with(rooms, fast, size), speeds) for size in sorted(sizes | {budget})]
    for name, size in list(rooms.nbytes.items())[1:]:
        lacking = max(total - budget, 0)
        others = {0, *(int(size * factor) for factor in _FACTORS), lacking}
        made += [forecast(weights, _with(rooms, name, other), speeds) for other in sorted(others) if other <= lacking and other != size]
    return list(_differing(made, rooms))


def _with(rooms: Rooms, name: str, nbytes: int) -> Rooms:
    return Rooms({**rooms.nbytes, name: nbytes}, rooms.divided)


def _differing(made: list[Forecast], rooms: Rooms) -> Iterator[Forecast]:
    """Leave out what moves as much as the one before; the budgets asked for stay."""
    before: object = None
    for each in made:
        now = tuple(use.nbytes for use in each.links.values())
        if now != before or each.rooms == rooms:
            yield each
        before = now
