"""Checksums of stored bytes: one xxh3-128 for each piece, so that pieces are checked by the threads that read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import xxhash

from tierstore.errors import CorruptionError

PIECE = 8 << 20  # bytes; part of the disk format, and what one read request takes
SUM = 16  # bytes of one checksum

Verify = Literal["first", "always", "never"]
"""When stored bytes are checked: when they are first read after opening, at every read, or not.

What this process has written itself counts as read for "first": it was not checked that the device took it as it was.
"""


def check_verify(verify: str) -> None:
    """Raise `ValueError` naming the accepted words unless `verify` is one."""
    if verify not in get_args(Verify):
        raise ValueError(f"verify={verify!r} is none of {', '.join(map(repr, get_args(Verify)))}")


def checksum(data: bytes | memoryview) -> bytes:
    """Return the checksum of at most one piece."""
    return xxhash.xxh3_128_digest(data)


def checksums(data: memoryview) -> bytes:
    """Return the checksums of all pieces of `data`, one after the other."""
    return b"".join(checksum(data[start : start + PIECE]) for start in range(0, len(data), PIECE))


def sums_size(nbytes: int) -> int:
    """Return how many bytes the checksums of a value of `nbytes` take."""
    return -(-nbytes // PIECE) * SUM


class Proof:
    """What the bytes of one value must hash to; `check` may be called from several threads for different pieces.

    `key` and `file` are what errors name. `passed` is to be called once all pieces were found right.
    """

    def __init__(self, sums: bytes, key: str, file: str, passed: Callable[[], None]) -> None:
        self._sums = sums
        self._key = key
        self._file = file
        self.passed = passed

    def check(self, start: int, data: memoryview) -> None:
        """Raise `CorruptionError` unless `data` is the piece that begins at `start`."""
        place = start // PIECE * SUM
        if checksum(data) != self._sums[place : place + SUM]:
            raise CorruptionError(self._key, self._file, f"bytes {start} to {start + len(data)} of the value do not match their checksum")
