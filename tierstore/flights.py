"""Copies that run in the background: fetches that somebody waits for, and those that a policy wants done ahead of use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

from tierstore.entry import Entry, Ready
from tierstore.errors import TierStoreError
from tierstore.planning.policy import Foresight
from tierstore.residency import Residency
from tierstore.shield import shielded
from tierstore.tier import Tier
from tierstore.transfer.engine import Engine, Transfer

_FEW = 2  # flights into one tier that are started before anybody waits for them, however large
_MUCH = 64 << 20  # bytes in flight into one tier that keep a link busy; beyond `_FEW`, more are not started then


class Flight:
    """A copy on its way into a tier. Once `done`, its value can be used, or `error` says what went wrong."""

    __slots__ = ("arrived", "begun", "done", "entry", "error", "nbytes", "outdated", "source", "started", "target", "version")

    def __init__(self, entry: Entry, source: int, target: int, outdated: int | None, started: float) -> None:
        self.entry = entry
        self.source = source
        self.target = target
        self.version = entry.version
        self.nbytes = entry.nbytes
        self.started = started
        self.outdated = outdated  # bytes of the stale copy that this one replaces
        self.begun = False  # the engine has returned to whoever started it
        self.arrived = False  # done before the copy has ended
        self.done = False
        self.error: BaseException | None = None


class Flights(Residency):
    """Adds background copies to `Residency`, under the same lock; every method expects it held unless it says otherwise."""

    def __init__(self, tiers: Sequence[Tier], engine: Engine) -> None:
        super().__init__(tiers, engine)
        self._flights = [0] * len(self.tiers)  # whose value cannot be used yet
        self._flying = [0] * len(self.tiers)  # bytes
        self._ending = 0  # copies whose value can be used before they have ended
        self._failed: set[str] = set()  # keys not tried ahead of use again: who needs the value meets the error
        self._pumping = False
        above_home = enumerate(self.tiers[: self.home])
        self._foresights = [(level, tier.policy) for level, tier in above_home if isinstance(tier.policy, Foresight)]

    def begin(self, entry: Entry, source: int, target: int) -> Flight:
        """Start to copy an entry that is marked busy into a tier where its bytes are reserved; releases the lock for a moment.

        When it has landed the busy mark is gone, and so is the reservation if it failed.
        """
        tier = self.tiers[target]
        flight = Flight(entry, source, target, tier.stale.pop(entry.key, None), self.engine.now())
        tier.policy.insert(entry.key, entry.nbytes)
        self._flights[target] += 1
        self._flying[target] += entry.nbytes
        self.counters.link_busy(source, target, flight.started)
        ready = entry.ready if source == 0 else None
        transfer = Transfer(entry.key, entry.spec, self.tiers[source].backend, tier.backend, (source, target), ready)
        self.lock.release()
        try:
            with shielded():
                self.engine.start(transfer, partial(self._landed, flight), partial(self._arrived, flight))
        except BaseException as error:
            self._landed(flight, error)
            raise
        finally:
            self.lock.acquire()
        flight.begun = True
        return flight

    def _arrived(self, flight: Flight, ready: Ready) -> None:
        """Take note of a copy whose value can be used after `ready`. Takes the lock itself."""
        with self.lock:
            flight.arrived = True
            self._usable(flight)
            self._ending += 1
            flight.entry.read_below += 1
            self._place(flight)
            flight.entry.ready = ready
            flight.done = True
            self.unmark_busy(flight.entry)
            if flight.begun:  # else whoever started it looks for more
                self.pump()

    def _landed(self, flight: Flight, error: BaseException | None) -> None:
        """Take note of a copy that has ended. Takes the lock itself."""
        with self.lock:
            entry, tier = flight.entry, self.tiers[flight.target]
            self.link_ended(entry.key, (flight.source, flight.target), flight.started, 0 if error else flight.nbytes)
            if flight.arrived:
                self._ending -= 1
                entry.read_below -= 1
                self.wake()
            else:
                self._usable(flight)
                if error is None and flight.version == entry.version:
                    self._place(flight)
                else:
                    tier.policy.remove(entry.key)
                    self._undo(flight, tier, error)
                flight.error, flight.done = error, True
                self.unmark_busy(entry)
            self.pump()

    def _usable(self, flight: Flight) -> None:
        """One flight less that keeps a link busy as far as the host knows: what is ordered on the device needs no more of it."""
        self._flights[flight.target] -= 1
        self._flying[flight.target] -= flight.nbytes

    def _place(self, flight: Flight) -> None:
        """The target holds the value now."""
        entry, tier = flight.entry, self.tiers[flight.target]
        tier.ledger.release(flight.outdated or 0)
        tier.written(entry.key, entry.nbytes)
        self.placed(entry, flight.target)
        if flight.target < flight.source < len(self.tiers) - 1:
            self.tiers[flight.source].policy.access(entry.key)
        self._failed.discard(entry.key)

    def _undo(self, flight: Flight, tier: Tier, error: BaseException | None) -> None:
        """Account for a copy that failed, or of a value that was written to meanwhile."""
        if error is not None:
            if flight.target < flight.source:
                self._failed.add(flight.entry.key)
            tier.ledger.release(flight.entry.nbytes)
            if flight.outdated is not None:
                tier.stale[flight.entry.key] = flight.outdated
        else:
            tier.ledger.release(flight.outdated or 0)
            tier.written(flight.entry.key, flight.entry.nbytes)
            tier.outdate(flight.entry.key, flight.entry.nbytes)

    def fetch(self, entry: Entry) -> Flight | None:
        """Start to bring an entry into the fast tier if it is not there and room can be made."""
        nbytes = entry.nbytes
        if self.moving(entry) or entry.resident or not self.make_room(0, nbytes):
            return None
        gone = self.entries.get(entry.key) is not entry or entry.nbytes != nbytes
        if gone or self.moving(entry) or entry.resident:  # by now
            self.tiers[0].ledger.release(nbytes)
            return None
        self.mark_busy(entry)
        return self.begin(entry, min(entry.tiers), 0)

    def settle(self) -> None:
        """Wait until no entry moves, and nobody is about to move one ahead of use. Takes the lock itself."""
        with self.lock:
            while self._busy or self._ending or self._pumping or any(self._flights):
                self.pause()

    def set_aside(self, level: int, nbytes: int) -> None:
        """Leave bytes of a tier's budget to others than the store; what does not fit any more leaves, as far as it can now."""
        tier = self.tiers[level]
        tier.ledger.aside = nbytes
        if isinstance(tier.policy, Foresight):
            tier.policy.budget(tier.ledger.limit)
        with suppress(OSError, TierStoreError):  # who needs the room meets the error
            self.make_room(level, 0)
        self.wake()

    # -- ahead of use ---------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Start the fetches that policies want ahead of use; may release the lock for moments."""
        self.catch_up()
        if not self._foresights or self._pumping:
            return
        self._pumping = True  # who comes meanwhile need not: this looks again before it ends
        try:
            for level, policy in reversed(self._foresights):
                while self._link_idle(level) and self._fetch_ahead(level, policy):
                    pass
        finally:
            self._pumping = False
            self.wake()

    def all_fetching(self) -> bool:
        """True if something is on its way into each tier that fetches ahead of use: when it lands, there will be a `pump`."""
        return all(self._flights[level] for level, _ in self._foresights)

    def _link_idle(self, level: int) -> bool:
        return not self.closed and not self.busy_link(level)

    def flying_to(self, level: int) -> int:
        """How many copies are on their way into a tier."""
        return self._flights[level]

    def busy_link(self, level: int) -> bool:
        """True while more copies into a tier would not make the link to it carry more."""
        return self._flights[level] >= _FEW and self._flying[level] >= _MUCH

    def _fetch_ahead(self, level: int, policy: Foresight) -> bool:
        key = policy.wanted()
        entry = None if key is None else self.entries.get(key)
        if entry is None or not self._below(entry, level):
            return False
        nbytes = entry.nbytes
        if not self._clear(level, nbytes, policy.spare()):
            return False
        if entry.nbytes != nbytes or not self._below(entry, level):  # by now
            self.tiers[level].ledger.release(nbytes)
            return False
        self.mark_busy(entry)
        self.begin(entry, min(entry.tiers), level)
        return True

    def _below(self, entry: Entry, level: int) -> bool:
        """True if an entry can be fetched into a tier from one below it."""
        gone = self.entries.get(entry.key) is not entry or not entry.tiers
        return not gone and not self.moving(entry) and min(entry.tiers) > level and entry.key not in self._failed

    def _clear(self, level: int, nbytes: int, candidates: Iterator[str]) -> bool:
        """Reserve `nbytes` in a tier, evicting candidates; nothing leaves if all of them would not be enough.

        What only this tier holds is written down first, which happens once: what has a home below is dropped later.
        """
        tier = self.tiers[level]
        excess = tier.ledger.excess(nbytes)
        leaving: list[Entry] = []
        while excess > 0:
            key = next(candidates, None)
            if key is None:
                return False
            entry = self.entries[key]
            if self.evictable(entry, level):
                leaving.append(entry)
                excess -= tier.taken(entry.key, entry.nbytes)
        for entry in leaving:
            if level not in entry.tiers or not self.evictable(entry, level):
                continue
            try:
                if not self.evict(entry, level):
                    return False
            except Exception:  # noqa: BLE001  (this is ahead of use: who truly needs the room meets the error)
                self._failed.add(entry.key)
                return False
        return tier.ledger.reserve(nbytes)
