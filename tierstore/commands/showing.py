"""What commands share: tables and lines for a person, JSON for a program, and arguments that several take."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tierstore.errors import SizeError
from tierstore.sizes import parse_size
from tierstore.spec import dtype_named

DTYPES = ("float32", "float16", "bfloat16", "float64")


class _Results(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the program what it means that nobody reads on; rich would end it with code 1."""
        raise BrokenPipeError


def results() -> Console:
    """Return what prints to stdout; as wide as tables are where nobody looks on."""
    console = _Results(highlight=False, soft_wrap=True)
    return console if console.is_terminal else _Results(highlight=False, soft_wrap=True, width=140)


def remarks() -> Console:
    """Return what prints to stderr."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)  # as it is now: libraries are silenced later


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout; names may be any str, also one that is no valid UTF-8."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    """Return a table whose first `left` columns are aligned to the left."""
    made = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(cell.replace("[", r"\[") for cell in row))
    return made


def size(text: str) -> int:
    """Parse an argument that is a size, or a rate in bytes per second."""
    try:
        return parse_size(text.removesuffix("/s"))
    except SizeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def rate(text: str) -> int:
    """Parse an argument that is bytes per second."""
    found = size(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no speed; give bytes per second, such as 3GB or 500MiB")
    return found


def count(text: str) -> int:
    """Parse an argument that is a number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def dtype(text: str) -> torch.dtype:
    """Parse an argument that is a dtype of weights."""
    name = text.removeprefix("torch.")
    found = dtype_named(name) if name in DTYPES else None
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a dtype that weights can be cast to; give one of {', '.join(DTYPES)}")
    return found
