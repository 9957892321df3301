"""Byte sizes as people write them."""

from __future__ import annotations

import re

from tierstore.errors import SizeError

Size = int | str

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_FORMS = 'an int of bytes, or a string such as "8GiB", "500MB", "1.5 GiB", "4096"'


def parse_size(size: Size) -> int:
    """Return `size` in bytes; raise `SizeError` (a `ValueError`) naming the accepted forms."""
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise SizeError(f"{size!r} is not a size; give {_FORMS}")
    if isinstance(size, int):
        if size < 0:
            raise SizeError(f"a size cannot be negative, got {size}; give {_FORMS}")
        return size
    match = _PATTERN.fullmatch(size)
    if match is None or match[2].lower() not in _UNITS:
        raise SizeError(f"{size!r} is not a size; give {_FORMS}")
    return round(float(match[1]) * _UNITS[match[2].lower()]) if "." in match[1] else int(match[1]) * _UNITS[match[2].lower()]


def format_size(nbytes: int) -> str:
    """Return `nbytes` with a binary unit and four significant digits at most, such as `1.5 GiB`."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
