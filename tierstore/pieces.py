"""How large the pieces are in which a divided value comes and goes.

[Note: few pieces, small rings]
Each transfer costs 0.7 ms of the processor besides its bytes, as much as reading 2 MiB, and takes that from the computing
where all cores compute. So pieces should be large; but a ring has room for the one in use and the next one, which then
cannot stay. It has room for 16 MiB to be on their way anyway, or an eighth of a tier (`planning`; a test ties them): smaller
ones would save nothing. Where less than half of the values can stay, most pieces of a value stream with it, and then larger
ones mean fewer transfers of the same bytes.
"""

from __future__ import annotations

from tierstore.backend import DivisibleBackend

_LARGEST = 16 << 20  # bytes; twice as many where most of a value streams
_SHARE = 8  # a piece is at most one of so many parts of the fast tier


def piece_bytes(backend: DivisibleBackend, budget: int | None, total: int) -> int:
    """Return how large the pieces of values are, which have `total` bytes, in a fast tier of `budget` bytes.

    Without a budget nothing is divided.
    """
    return backend.piece_bytes * parts_per_piece(backend.piece_bytes, budget, total)


def parts_per_piece(part_bytes: int, budget: int | None, total: int) -> int:
    """Return how many parts of the fewest bytes that are sensible make a piece."""
    budget = budget or 0
    largest = _LARGEST if 2 * budget >= total else 2 * _LARGEST
    return max(1, min(largest, budget // _SHARE) // part_bytes)
