"""A picture of a run: which values were in the fastest tier when, how full each tier was, and when computing waited."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from tierstore.errors import TierStoreError
from tierstore.timeline import Timeline

_WIDTH, _HEIGHT, _DPI = 12, 8, 120
_MIB = 1 << 20


def draw(timeline: Timeline, tiers: Sequence[str], budgets: Sequence[int | None], file: str | os.PathLike[str]) -> None:
    """Draw a timeline of tiers, which have these names and budgets by level, as a PNG.

    Above, one row for each value, in the order in which they first came in: a bar while it was in the fastest tier. Below,
    the bytes in each tier, with its budget as a dashed line, and the stalls. Raises `TierStoreError` without matplotlib.
    """
    figure = _matplotlib().Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    stays = timeline.stays(0)
    origin = min((start for spans in stays.values() for start, _ in spans), default=0.0)
    for row, spans in enumerate(stays.values()):
        above.broken_barh([(start - origin, end - start) for start, end in spans], (row - 0.4, 0.8))
    above.set(ylabel=f"values in {tiers[0]}", title=f"{len(stays)} values that were ever in {tiers[0]}")
    above.invert_yaxis()
    _draw_levels(below, timeline, tiers, budgets, origin)
    figure.savefig(file, format="png")


def _draw_levels(axes: Any, timeline: Timeline, tiers: Sequence[str], budgets: Sequence[int | None], origin: float) -> None:
    moments = [moment - origin for moment, _ in timeline.used]
    for level, (name, budget) in enumerate(zip(tiers, budgets, strict=True)):
        (line,) = axes.step(moments, [used[level] / _MIB for _, used in timeline.used], where="post", label=name)
        if budget is not None:
            axes.axhline(budget / _MIB, linestyle="--", linewidth=0.8, color=line.get_color())
    for _, start, end in timeline.stalls:
        axes.axvspan(start - origin, end - origin, color="red", alpha=0.15, linewidth=0)
    axes.set(xlabel="seconds (red: computing waited)", ylabel="MiB")
    axes.legend(loc="upper right")


def _matplotlib() -> Any:
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise TierStoreError(
            f"a picture needs matplotlib ({error}): pip install 'tierstore[plot]', or give a file that ends in .json"
        ) from error
