"""What a run takes of the fast tier's memory beside its weights: measured now and then, and left free.

[Note: a budget for both]
On an accelerator a budget is for all that the session puts there: weights, and the activations and caches of the run.
Nobody tells how large those will be, so they are measured: what is allocated now, less what was before the session and
what the ledger says of weights. The store's part shrinks as soon as they take more, in steps, since each change makes
another plan. It grows again only when less was enough for many measurements in a row: activations come and go in every
pass, and weights that left for them would come and go with them.

A measurement sees what lies there between two operations. What one operation takes while it runs shows only when memory
runs out: then room is made for that, and stays for as long.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from contextlib import suppress

from tierstore.entry import Entry
from tierstore.errors import TierStoreError
from tierstore.sizes import format_size
from tierstore.writing import Moves

_EVERY = 16  # operations or calls of modules for one measurement, which takes tens of microseconds
_STEPS = 32  # the store's part of a budget changes by one of so many parts
_PATIENCE = 256  # measurements by which less must have been enough before the store gets more
_SHARE = 4  # one of so many parts of what can leave does so when memory runs out


class Pressure:
    """Divides the budget of the fastest tier among the store and the run around it.

    `allocated` tells the bytes that are allocated on the device, None where nobody counts them; `release_cached` gives back
    what its allocator keeps, and `floor` says what the store needs at least, so that any operation can run. Takes the
    store's lock itself.
    """

    def __init__(
        self, moves: Moves, allocated: Callable[[], int] | None, release_cached: Callable[[], None], floor: Callable[[], int]
    ) -> None:
        self._moves = moves
        self._allocated = allocated
        self._release_cached = release_cached
        self._floor = floor
        self._ledger = moves.tiers[0].ledger
        self._others = 0  # bytes that were allocated before, and are not the run's
        self._ticks = 0
        self._looks = 0  # since the store's part was last considered to grow
        self._highest = 0  # bytes of the run, since then
        self._warned = False

    def begin(self) -> None:
        """Take what is allocated now, apart from weights, as nothing to do with the run."""
        self._others = self._beside_weights()

    def tick(self) -> None:
        """An operation, or the call of a module, has used weights: measure, now and then."""
        self._ticks += 1
        if self._ticks >= _EVERY:
            self.look()

    def look(self) -> None:
        """Measure, and divide the budget anew if that shows something new."""
        self._ticks = 0
        with self._moves.lock:
            taken = max(self._beside_weights() - self._others, 0)
            self._highest = max(self._highest, taken)
            self._looks += 1
            settled = self._looks >= _PATIENCE
            self._divide(may_grow=settled)
            self._check(taken)
            if settled:
                self._looks, self._highest = 0, taken

    def _beside_weights(self) -> int:
        return 0 if self._allocated is None else self._allocated() - self._ledger.used

    def relieve(self, nbytes: int, keep: Collection[Entry]) -> None:
        """Memory ran out: let at least `nbytes` of weights leave, all of them if they are fewer, and others take their place.

        `keep`: what is needed itself.
        """
        with self._moves.lock:
            before = self._ledger.used
            self._evict(nbytes, keep)
            if self._ledger.budget is None:
                self._ledger.budget = before  # evidently no more than that fits
            self._highest = max(self._highest, self._ledger.budget - self._ledger.used)
            self._looks = 0
            self._divide(may_grow=False)
        self._release_cached()

    def _evict(self, nbytes: int, keep: Collection[Entry]) -> None:
        moves, ledger = self._moves, self._ledger
        kept = {entry.key for entry in keep}
        leaving = [moves.entries[key] for key in moves.tiers[0].policy.victims() if key not in kept]
        leaving = [entry for entry in leaving if moves.evictable(entry, 0)]
        goal = ledger.used - max(nbytes, sum(entry.nbytes for entry in leaving) // _SHARE)
        for entry in leaving:
            if ledger.used <= goal:
                return
            if entry.resident and moves.evictable(entry, 0):  # the lock is released while others are written down
                with suppress(OSError, TierStoreError):
                    moves.evict(entry, 0)

    def _divide(self, *, may_grow: bool) -> None:
        budget = self._ledger.budget
        if budget is None:
            return
        step = max(budget // _STEPS, 1)
        wished = -(-self._highest // step) * step
        wished = min(wished, max(budget - self._floor(), 0))
        if wished > self._ledger.aside or (may_grow and wished < self._ledger.aside):
            self._moves.set_aside(0, wished)
        elif self._ledger.excess(0) > 0:  # what was in use when the limit fell
            with suppress(OSError, TierStoreError):
                self._moves.make_room(0, 0)

    def _check(self, taken: int) -> None:
        """Say once that the budget is exceeded: what one operation needs is not refused for the sake of activations."""
        budget = self._ledger.budget
        if budget is not None and taken > self._ledger.aside and not self._warned:
            self._warned = True
            warnings.warn(
                f"activations take {format_size(taken)} beside the weights that operations need, more than the budget of "
                f"{format_size(budget)} for {self._moves.tiers[0].name!r} leaves: it is exceeded; raise it, or compute with smaller inputs",
                stacklevel=2,
            )
