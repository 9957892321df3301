"""Checksums of stored bytes: one xxh3-128 for each piece, so that pieces are checked by the threads that read them.

[Note: reading a part]
Whoever needs some rows of a large value, or a part of it, has the pieces in which they lie checked first, unless they have
been: that reads 8 MiB for a row once, and every later read of that piece is as large as the row. So nothing is handed out
unchecked that a read of the whole value would have checked.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import xxhash

from tierstore.errors import CorruptionError
from tierstore.open_file import Readable

PIECE = 8 << 20  # bytes; part of the disk format, and what one read request takes
SUM = 16  # bytes of one checksum

_FLAGS = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)

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
    """What the `nbytes` of one value must hash to, and which of its pieces have been found right; for several threads.

    `key` and `file` are what errors name. `passed` is called when the last piece was found right.
    """

    def __init__(self, sums: bytes, nbytes: int, key: str, file: str, passed: Callable[[], None]) -> None:
        self._sums = sums
        self._nbytes = nbytes
        self._key = key
        self._file = file
        self._passed = passed
        self._unchecked = set(range(0, nbytes, PIECE))

    def check(self, start: int, data: memoryview) -> None:
        """Raise `CorruptionError` unless `data` is the piece that begins at `start`."""
        place = start // PIECE * SUM
        if checksum(data) != self._sums[place : place + SUM]:
            raise CorruptionError(self._key, self._file, f"bytes {start} to {start + len(data)} of the value do not match their checksum")
        self._unchecked.discard(start)
        if not self._unchecked:
            self._passed()

    def prove(self, file: Readable, offset: int, parts: Iterable[tuple[int, int]] | None = None) -> None:
        """Read and check those pieces that have not been, of a value that begins at `offset` in `file`.

        `parts`: where in the value the bytes lie that are needed, and how many; all of it if not given.
        """
        wanted = [(0, self._nbytes)] if parts is None else parts
        starts = {piece for start, count in wanted for piece in range(start - start % PIECE, start + count, PIECE)}
        pieces = sorted(starts & self._unchecked)
        if not pieces:
            return
        slab = memoryview(mmap.mmap(-1, min(self._nbytes, PIECE), flags=_FLAGS))
        for start in pieces:
            piece = slab[: min(PIECE, self._nbytes - start)]
            file.read(piece, offset + start)
            self.check(start, piece)
