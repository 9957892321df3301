"""Tiers that several stores have in common: one backend and one count of bytes below a fast tier for each device.

[Note: one store for each device, over common tiers]
A model on several devices has one store for each of them, `[gpu:0, cpu, disk]`, `[gpu:1, cpu, disk]`, each with its own
lock, engine, links, policy and plan, as if it were alone. What they have in common is below: the backends, and the bytes
that all may use there together. No value is in two stores, so they never wait for each other.

Another way would be one lower store that is the last tier of all the upper ones. Then each value on its way up has to pass
through RAM and must fit there, where a store now reads from the disk straight into a device's memory; a lower planner would
see the requests of several threads and devices in an order that changes, and could not tell what is resident above; and
what one thread leases in both could be waited for in a circle.

RAM is divided, in proportion to what each device has no room for, because who keeps what is each planner's own decision:
the disk then sees the model's bytes less the fast tiers' and RAM's, as with one device. The last tier is not divided:
whoever needs room there takes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from tierstore.backend import Backend
from tierstore.ledger import PartLedger, Pool
from tierstore.spec import TensorSpec
from tierstore.stats import TierStats
from tierstore.tier import Tier


class Common:
    """A backend and a budget that tiers of several stores share. The backend is closed with the last of these tiers."""

    def __init__(self, name: str, backend: Backend, budget: int | None) -> None:
        self.name = name
        self.backend = backend
        self.pool = Pool(budget)
        self._open = 0
        self._lock = threading.Lock()

    def tier(self, part: int | None = None, mine: Callable[[str], bool] | None = None) -> CommonTier:
        """Return the tier of one more store: it may use `part` bytes, by default all that others leave, and finds the keys `mine`."""
        with self._lock:
            self._open += 1
        return CommonTier(self, part, mine)

    def stats(self, entries: int) -> TierStats:
        """Return the bytes that all stores use together, in `entries` entries."""
        return TierStats(self.pool.budget, self.pool.used, self.pool.peak, entries)

    def left(self) -> None:
        """One tier fewer uses the backend."""
        with self._lock:
            self._open -= 1
            last = not self._open
        if last:
            self.backend.close()


class CommonTier(Tier):
    """One store's view of a tier that others use too. Keys must differ between the stores."""

    def __init__(self, common: Common, part: int | None, mine: Callable[[str], bool] | None) -> None:
        super().__init__(common.name, common.backend)
        self.common = common
        self.ledger = PartLedger(common.pool, common.pool.budget if part is None else part)
        self._mine = mine

    def entries(self) -> Iterable[tuple[str, TensorSpec]]:
        return ((key, spec) for key, spec in self.backend.entries() if self._mine is None or self._mine(key))

    def close(self) -> None:
        self.common.left()


def divided(total: int, needs: list[int], sizes: list[int]) -> list[int]:
    """Return the bytes of `total` for each of several stores: in proportion to `needs`, what is left over to `sizes`."""
    needed = sum(needs)
    parts = [need if needed <= total else total * need // needed for need in needs]
    spare, weight = max(total - sum(parts), 0), sum(sizes) or 1
    parts = [part + spare * size // weight for part, size in zip(parts, sizes, strict=True)]
    parts[0] += total - sum(parts)
    return parts
