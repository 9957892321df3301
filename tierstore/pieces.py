"""How large the pieces are in which a divided value comes and goes.

[Note: few pieces, small rings]
Each transfer costs 0.7 ms of the processor besides its bytes, as much as reading 2 MiB, and takes that from the computing
where all cores compute. So pieces should be large; but a ring has room for the next one, which then cannot stay. It has
room for an eighth of a tier anyway, since a link needs as much to be busy (`planning.plan`; a test ties the two): smaller
ones would save nothing.
"""

from __future__ import annotations

from tierstore.backend import DivisibleBackend

_LARGEST = 32 << 20  # bytes; beyond, a transfer's fixed cost is below a tenth
_SHARE = 8  # a piece is at most one of so many parts of the fast tier


def piece_bytes(backend: DivisibleBackend, budget: int | None) -> int:
    """Return how large the pieces of values are in a fast tier of `budget` bytes (None: no limit, and then nothing is divided)."""
    return backend.piece_bytes * parts_per_piece(backend.piece_bytes, budget)


def parts_per_piece(part_bytes: int, budget: int | None) -> int:
    """Return how many parts of the fewest bytes that are sensible make a piece."""
    return max(1, min(_LARGEST, (budget or 0) // _SHARE) // part_bytes)
