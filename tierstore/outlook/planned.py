"""Plans for a checkpoint: what a shell command shows, or a script asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tierstore.errors import CheckpointError
from tierstore.maintenance import describe
from tierstore.outlook.choices import choices
from tierstore.outlook.forecast import Forecast, Rooms, Smallest, Speeds, check_start, forecast, smallest_rooms
from tierstore.outlook.reading import read_weights
from tierstore.outlook.speeds import Told, find_speeds
from tierstore.outlook.weights import Weights
from tierstore.sizes import format_size


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a model would do: `forecast` under the budgets asked for, `choices` under others; `notes` are for a reader."""

    weights: Weights
    forecast: Forecast
    smallest: Smallest
    speeds: Speeds
    choices: tuple[Forecast, ...]
    notes: tuple[str, ...]


def plan_checkpoint(checkpoint: Path, rooms: Rooms, told: Told | None = None, dtype: torch.dtype | None = None) -> Outlook:
    """Plan for the model of a local checkpoint, reading headers and the config only; what `told` lacks is measured.

    Raises `BudgetError` for a fast tier that is too small for a session to start, `CheckpointError` or `CorruptionError`
    for a checkpoint that cannot be used, and `BackendError` for a device or folder that was told of and cannot be used.
    """
    files = _files(checkpoint)
    weights = read_weights(checkpoint, dtype)
    if not weights.by_name:
        raise CheckpointError(f"{checkpoint} holds no tensors, so there is nothing to plan")
    check_start(weights, rooms)  # before anything is measured
    speeds, unknown = find_speeds(rooms, told or Told(), files, weights.largest().spec.dtype)
    made, least = forecast(weights, rooms, speeds), smallest_rooms(weights, divided=rooms.divided)
    notes = (*weights.notes, *unknown, *_doubts(made, least))
    return Outlook(weights, made, least, speeds, tuple(choices(weights, made, speeds, least)), notes)


def _files(checkpoint: Path) -> list[Path]:
    """Return the files of a local checkpoint, largest first."""
    if ":/" in str(checkpoint):  # pathlib leaves one slash of a URL
        raise CheckpointError(f"{checkpoint} is elsewhere, and a plan reads nothing but local headers; fetch it, and give the directory")
    contents = describe(checkpoint)
    if contents.kind != "checkpoint":
        raise CheckpointError(f"{checkpoint} is a {contents.kind}, not a checkpoint; `tierstore inspect` shows what is in it")
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return [folder / name for name in sorted(contents.files, key=lambda name: -contents.files[name])]


def _doubts(made: Forecast, least: Smallest) -> Iterator[str]:
    """Say where a budget lets a session start, but not surely run, or not fetch ahead."""
    fast, budget = next(iter(made.rooms.nbytes.items()))
    if budget < least.runs:
        yield (
            f"{fast} has room for the largest weight, but not for all that {least.module!r} owns ({format_size(least.runs)}): "
            "an operation that uses all of it at once would raise BudgetError"
        )
    elif budget < least.ahead and any(use.nbytes for use in made.links.values()):
        yield f"{fast} has no room for the next weight beside the one in use: computing waits for each; see the smallest budgets"
