"""Puts new values into the tiers, and outdates the old copies only when the new one is complete."""

from __future__ import annotations

import torch

from tierstore.backend import SizingBackend
from tierstore.entry import Entry
from tierstore.errors import BudgetError, TierStoreError
from tierstore.flights import Flight
from tierstore.leasing import Leasing
from tierstore.spec import TensorSpec, raw_bytes, storable
from tierstore.tier import Tier

_AT_ONCE = 8  # values that `flush` writes; each waits for the device more than once


class Moves(Leasing):
    """Everything that can happen to entries: moves, leases and, here, writes. What a `TieredStore` is built on."""

    def put(self, key: str, tensor: torch.Tensor, *, evict: bool, fastest: int = 0) -> None:
        """Store a copy of `tensor` in the fastest tier that can take it (`evict`), or that has free room, from level `fastest` on.

        Takes the lock itself.
        """
        if not isinstance(key, str):
            raise TierStoreError(f"a key is a str, got {type(key).__name__}")
        tensor = storable(tensor)
        spec = TensorSpec.of(tensor)
        with self.lock:
            entry, level = self._claim(key, spec, evict=evict, fastest=fastest)
            try:
                if level is None:
                    self._write_in_place(entry, tensor)
                else:
                    self._write(entry, level, tensor, spec)
            finally:
                self._unclaim(entry)

    def write_down(self, entry: Entry, level: int) -> bool:
        """Copy the newest value of an entry to a slower tier with free room, and keep the other copies; False if there is none."""
        self.wait_until_idle(entry)
        if level in entry.tiers or level < min(entry.tiers) or not self.tiers[level].ledger.reserve(entry.nbytes):
            return level in entry.tiers
        self.mark_busy(entry)
        try:
            self.copy(entry, min(entry.tiers), level)
        finally:
            self.unmark_busy(entry)
        return level in entry.tiers

    def _claim(self, key: str, spec: TensorSpec, *, evict: bool, fastest: int) -> tuple[Entry, int | None]:
        """Mark the entry of `key` busy and reserve room for a new value: its level, or None to write over the old one."""
        while True:
            self.check_open()
            entry = self.entries.get(key)
            if entry is None:
                entry = self.entries[key] = Entry(key, spec)
            elif self.moving(entry):
                self.pause()
                continue
            if entry.leases and entry.spec != spec:
                raise TierStoreError(f"{key!r} is leased as {entry.spec}; a value of another shape or dtype can be put after the lease")
            self.mark_busy(entry)
            try:
                level = None if entry.leases else self._reserve(spec.nbytes, evict=evict, fastest=fastest)
            except BaseException:
                self._unclaim(entry)
                raise
            if level is not None or entry.leases or (entry.resident and entry.spec == spec):
                return entry, level
            self._unclaim(entry)
            if not any(tier.takes(spec.nbytes) for tier in self.tiers):
                raise self.no_room(f"putting {key!r}", spec.nbytes)
            self.wait_for_others(lambda: self.no_room(f"putting {key!r}", spec.nbytes))

    def _unclaim(self, entry: Entry) -> None:
        self.unmark_busy(entry)
        if not entry.tiers:  # a new key whose first write failed
            del self.entries[entry.key]

    def _reserve(self, nbytes: int, *, evict: bool, fastest: int) -> int | None:
        levels = range(fastest, len(self.tiers))
        if not evict:
            for level in levels:
                if self.tiers[level].writable and self.tiers[level].ledger.reserve(nbytes):
                    return level
        return next((level for level in levels if self.make_room(level, nbytes)), None)

    def _write(self, entry: Entry, level: int, tensor: torch.Tensor, spec: TensorSpec) -> None:
        """Write a value where its bytes are reserved; outdate the older copies only when it is complete."""
        tier = self.tiers[level]
        with self.writing(tier, entry.key, spec.nbytes):
            ready = self.engine.put(tier.backend, level, entry.key, tensor)
        self.invalidate(entry, keep=level)
        if level in entry.tiers:
            self.removed(entry, level)
        entry.describe(spec)
        entry.version += 1
        tier.written(entry.key, spec.nbytes)
        self.added(entry, level)
        entry.ready = ready

    def _write_in_place(self, entry: Entry, tensor: torch.Tensor) -> None:
        """Overwrite a resident value of the same spec, which its lease holders see change."""
        target, tier = entry.tensor, self.tiers[0]
        self.engine.computing()
        self._wait_until_ready((entry,))
        growth = entry.nbytes - tier.taken(entry.key, entry.nbytes)
        if growth and not self.make_room(0, growth):  # a value that compresses well may be followed by one that does not
            raise self.no_room(f"putting {entry.key!r}", entry.nbytes, 0)
        self.lock.release()
        try:
            if target is None:
                tier.backend.put(entry.key, tensor)
            else:
                with torch.no_grad():
                    raw_bytes(target).copy_(raw_bytes(tensor))
        except BaseException:
            self.lock.acquire()
            tier.ledger.release(growth)
            raise
        self.lock.acquire()
        tier.written(entry.key, entry.nbytes)
        self.outdate(entry)

    def flush(self) -> None:
        """Copy what no tier from `home` on holds into that tier; expects the lock held, and releases it around each copy.

        Raises `BudgetError` before anything moves where it is clear that not all will fit.
        """
        home = self.tiers[self.home]
        self._check_fits_all(home)
        flights: list[Flight] = []
        try:
            for entry in sorted(self.entries.values(), key=lambda entry: entry.nbytes, reverse=True):  # what ends last ends soon
                flight = self._flush_entry(entry)
                flights += [flight] if flight is not None else []
        finally:
            while not all(flight.done for flight in flights):
                self.pause()
        for flight in flights:
            if flight.error is not None:
                raise flight.error
        for tier in self.tiers[: self.home]:  # or an older version in a persistent one would be found first
            for key in list(tier.stale):
                self.delete_stale(tier, key)

    def _flush_entry(self, entry: Entry) -> Flight | None:
        """Start to copy an entry home, if it is not there, as soon as few enough are on their way and there is room."""
        while True:
            while self._busy_flushing():
                self.pause()
            self.wait_until_idle(entry)
            self.refresh(entry)
            if self.entries.get(entry.key) is not entry or max(entry.tiers) >= self.home:
                return None
            flight = self._begin_if_room(entry)
            if flight is not None:
                return flight
            if not self.flying_to(self.home):  # whose bytes may turn out to be fewer than what was reserved for them
                raise self.no_room(f"flushing {entry.key!r}", entry.nbytes, self.home)
            self.pause()

    def _busy_flushing(self) -> bool:
        """True while no more should be on its way home; what is encoded first takes memory beside the value."""
        if isinstance(self.tiers[self.home].backend, SizingBackend):
            return self.busy_link(self.home)
        return self.flying_to(self.home) >= _AT_ONCE

    def _begin_if_room(self, entry: Entry) -> Flight | None:
        """Start to copy an entry home if there is room; for which nothing leaves that may have been flushed a moment ago.

        That could happen where only the writing shows whether all will fit, and while others are on their way, each of which has
        room for an older copy too until it has ended.
        """
        only_free = isinstance(self.tiers[self.home].backend, SizingBackend) or self.flying_to(self.home) > 0
        self.mark_busy(entry)
        roomy = False
        try:
            roomy = self.free_room(self.home, entry.nbytes) if only_free else self.make_room(self.home, entry.nbytes)
        finally:
            if not roomy:
                self.unmark_busy(entry)
        return self.begin(entry, min(entry.tiers), self.home) if roomy else None

    def _check_fits_all(self, home: Tier) -> None:
        """Raise unless `home` may be able to hold every value at once; what its backend makes of those to come is not known."""
        total = 0
        for entry in self.entries.values():
            if self.home in entry.tiers:
                total += home.taken(entry.key, entry.nbytes)
            elif max(entry.tiers, default=0) < self.home and not isinstance(home.backend, SizingBackend):
                total += entry.nbytes
        if not home.ledger.fits(total):
            raise BudgetError(
                "flushing", tier=home.name, required_bytes=total, budget_bytes=home.ledger.budget or 0,
                hint=f"raise the budget of {home.name!r}, delete values, or close(flush=False) to lose them",
            )  # fmt: skip

    def no_room(self, operation: str, nbytes: int, level: int | None = None) -> BudgetError:
        """Return the error for a value that no tier, or not the one at `level`, can take."""
        tiers = self.tiers
        takers = (tier for tier in tiers if tier.writable)
        tier = tiers[level] if level is not None else max(takers, key=lambda t: (t.ledger.budget is None, t.ledger.budget or 0))
        return BudgetError(
            operation, tier=tier.name, required_bytes=nbytes, budget_bytes=tier.ledger.budget or 0,
            hint="raise a budget, add a slower tier, or delete the older value first",
        )  # fmt: skip
