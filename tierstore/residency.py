"""Moves entries between tiers: makes room, evicts, copies; the core of the store.

[Note: who waits for whom]
An entry that moves is marked busy by one thread, which then waits for nobody until it has unmarked it: making room
inside a move skips what cannot leave at once and goes one tier down instead. A thread that has to wait (for room, or for
a busy entry) holds no claim while it waits, apart from leases it took earlier. So busy marks always end; only leases can
deadlock, and that is found: when every lease holder waits too, the asker gets a BudgetError.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from tierstore.entry import Entry, Handout
from tierstore.errors import BudgetError, ClosedError, MissingKeyError, TierStoreError
from tierstore.shield import shielded
from tierstore.stats import Counters
from tierstore.tier import Tier
from tierstore.timeline import Timeline
from tierstore.transfer.engine import Engine, Transfer


class Residency:
    """Entries, tiers and the one lock over both.

    `lock` is a condition that is notified whenever room, a busy mark or a lease is given up. Methods expect it held
    unless they say otherwise; `copy` releases it around the transfer. `home` is the level of the slowest tier that takes
    values. `handed_out` counts the bytes that readers may use without a lease, and `noted` has the keys that they used
    since `catch_up`; readers append to it without the lock.
    """

    def __init__(self, tiers: Sequence[Tier], engine: Engine) -> None:
        self.tiers = list(tiers)
        self.home = max(level for level, tier in enumerate(tiers) if tier.writable)
        self.engine = engine
        self.lock = threading.Condition(threading.Lock())
        self.entries: dict[str, Entry] = {}
        self.counters = Counters()
        self.timeline = Timeline()
        self.closed = False
        self.handed_out = 0
        self.noted: deque[str] = deque()
        self._held: dict[int, int] = {}  # thread -> bytes it leased; kept by `Leasing`
        self._paused = 0  # threads that wait for something to change
        self._waiting: set[int] = set()
        self._busy = 0

    def entry(self, key: str) -> Entry:
        """Return the entry of `key`; raise `MissingKeyError`, or `ClosedError` once the store is closed.

        Waits for the end of a first write: other processes may see the value already.
        """
        self.check_open()
        while (entry := self.entries.get(key)) is not None and not entry.tiers and entry.busy:
            self.pause()
            self.check_open()
        if entry is None or not entry.tiers:
            raise MissingKeyError(f"no entry is called {key!r}")
        return entry

    def idle_entry(self, key: str) -> Entry:
        """Return the entry of `key` once no thread moves it, or is about to."""
        while self.moving(entry := self.entry(key)):
            self.pause()
        return entry

    @staticmethod
    def moving(entry: Entry) -> bool:
        """True while a thread copies or replaces `entry`, makes room for it under a lease, or is about to take its value as it is."""
        return entry.busy or entry.passing > 0 or (entry.leases > 0 and not entry.resident)

    def check_open(self) -> None:
        if self.closed:
            raise ClosedError("this store is closed; open a new one")

    def close(self) -> bool:
        """Refuse whatever comes, wait until no entry moves and let go of values; False if another thread did so before."""
        if self.closed:
            return False
        self.closed = True
        self.wake()
        while self._busy:
            self.pause()
        for entry in self.entries.values():  # or their memory would be taken for as long as somebody has the closed store
            self._let_go(entry)
        return True

    # -- room ---------------------------------------------------------------------------------------------------

    def make_room(self, level: int, nbytes: int) -> bool:
        """Reserve `nbytes` in a tier, evicting what may leave now; False (and nothing reserved) if that is not enough."""
        if not self.tiers[level].takes(nbytes):
            return False
        stuck: set[str] = set()
        while not self.free_room(level, nbytes):
            victim = self._victim(level, stuck)
            if victim is None:
                return False
            if not self.evict(victim, level):
                stuck.add(victim.key)
        return True

    def free_room(self, level: int, nbytes: int) -> bool:
        """Like `make_room`, at the cost of outdated copies only."""
        tier = self.tiers[level]
        while not tier.ledger.reserve(nbytes):
            if not tier.stale:
                return False
            self.delete_stale(tier, next(iter(tier.stale)))
        return True

    def evict(self, entry: Entry, level: int) -> bool:
        """Take one copy out of a tier: drop it if another one serves, else write it down first.

        One that is served by a distant tier only is written to a tier in between, if one can take it: that is its cache.
        False if nothing can take it, or if somebody still reads what was handed out of it.
        """
        if level == 0 and not self.withdraw(entry):
            return False
        below = min((other for other in entry.tiers if other > level), default=None)
        if below is not None or self._only_upper_needed(entry, level):
            if below is None or not self._cached(entry, level, below):
                self.drop(entry, level)
        elif not self._demote(entry, level, len(self.tiers)):
            return False
        self.counters.evictions += 1
        return True

    def _victim(self, level: int, stuck: set[str]) -> Entry | None:
        for key in self.tiers[level].policy.victims():
            entry = self.entries[key]
            if key not in stuck and self.evictable(entry, level):
                return entry
        return None

    def evictable(self, entry: Entry, level: int) -> bool:
        """A busy entry never leaves; a leased one only gives up copies in slower tiers that another copy backs."""
        if entry.busy or (level > 0 and entry.read_below):
            return False
        return entry.leases == 0 or (level > 0 and any(other > level for other in entry.tiers))

    def _only_upper_needed(self, entry: Entry, level: int) -> bool:
        """In the last tier a copy may go when a faster tier has one too: tiers are exclusive where bytes are short."""
        return level == len(self.tiers) - 1 and any(other < level for other in entry.tiers)

    def _cached(self, entry: Entry, level: int, below: int) -> bool:
        """Move a copy to a tier above the distant one at `below` that backs it; False if it is nearer, or none takes it."""
        if below == level + 1 or not self.tiers[below].distant:
            return False
        try:
            return self._demote(entry, level, below)
        except (OSError, TierStoreError):  # who needs the room here is not concerned by a cache that fails
            return False

    def _demote(self, entry: Entry, level: int, stop: int) -> bool:
        """Move a copy to the first tier below it, and above the one at `stop`, that can take it."""
        self.mark_busy(entry)
        try:
            for lower in range(level + 1, stop):
                if self.make_room(lower, entry.nbytes):
                    self.copy(entry, level, lower)
                    break
            else:
                return False
        finally:
            self.unmark_busy(entry)
        self.drop(entry, level)
        return True

    # -- copies -------------------------------------------------------------------------------------------------

    def copy(self, entry: Entry, source: int, target: int) -> None:
        """Copy a busy entry into a tier where its bytes are reserved; gives the reservation back when it fails."""
        tier, version = self.tiers[target], entry.version
        ready = entry.ready if source == 0 else None
        transfer = Transfer(entry.key, entry.spec, self.tiers[source].backend, tier.backend, (source, target), ready)
        started = self.engine.now()
        self.counters.link_busy(source, target, started)
        carried = 0
        try:
            with self.writing(tier, entry.key, entry.nbytes), shielded():
                self.engine.carry(transfer)
            carried = entry.nbytes
        finally:
            self.link_ended(entry.key, (source, target), started, carried)
        tier.written(entry.key, entry.nbytes)
        if version == entry.version:
            self.added(entry, target)
        else:  # written to meanwhile through a lease
            tier.outdate(entry.key, entry.nbytes)

    def link_ended(self, key: str, route: tuple[int, int], started: float, carried: int) -> None:
        """Count a copy that has ended; `carried` bytes are none if it failed."""
        now = self.engine.now()
        self.counters.link_idle(*route, now, carried)
        self.timeline.copied(key, route, carried, started, now, tuple(tier.ledger.used for tier in self.tiers))

    @contextmanager
    def writing(self, tier: Tier, key: str, nbytes: int) -> Iterator[None]:
        """Release the lock while a value replaces the stale copy in a tier; the `nbytes` reserved are given back on failure.

        Meanwhile the stale copy is out of reach: another thread that makes room would delete the new value with it.
        """
        outdated = tier.stale.pop(key, None)
        self.lock.release()
        try:
            yield
        except BaseException:
            self.lock.acquire()
            tier.ledger.release(nbytes)
            if outdated is not None:
                tier.stale[key] = outdated
            raise
        self.lock.acquire()
        tier.ledger.release(outdated or 0)

    def added(self, entry: Entry, level: int) -> None:
        """Record that a tier, where the bytes are reserved, now holds the newest value of `entry`."""
        self.tiers[level].policy.insert(entry.key, entry.nbytes)
        self.placed(entry, level)

    def placed(self, entry: Entry, level: int) -> None:
        """Like `added`, for a policy that was told before."""
        tier = self.tiers[level]
        entry.tiers.add(level)
        self.timeline.moved(self.engine.now(), entry.key, level, came=True)
        if level == 0 and tier.memory:
            entry.tensor = tier.backend.get(entry.key)
            entry.seen = entry.writes()

    def drop(self, entry: Entry, level: int) -> None:
        """Delete one copy and give its bytes back."""
        self.tiers[level].backend.delete(entry.key)
        self.removed(entry, level)

    def removed(self, entry: Entry, level: int) -> None:
        """Record that a tier no longer holds `entry`."""
        tier = self.tiers[level]
        entry.tiers.discard(level)
        self.timeline.moved(self.engine.now(), entry.key, level, came=False)
        tier.policy.remove(entry.key)
        tier.dropped(entry.key, entry.nbytes)
        if level == 0:
            self._let_go(entry)
        self.wake()

    def invalidate(self, entry: Entry, keep: int) -> None:
        """Outdate every copy but the one in level `keep`: memory is freed, files stay until the new value replaces them.

        Never fails, because the new value is already there: a copy that resists is tried again when room is needed.
        """
        for level in sorted(entry.tiers - {keep}):
            tier = self.tiers[level]
            entry.tiers.discard(level)
            tier.policy.remove(entry.key)
            tier.outdate(entry.key, entry.nbytes)
            if level == 0:
                self._let_go(entry)
            if tier.volatile:
                with suppress(OSError, TierStoreError):
                    self.delete_stale(tier, entry.key)

    def delete_stale(self, tier: Tier, key: str) -> None:
        """Delete an outdated copy and give its bytes back."""
        tier.backend.delete(key)
        tier.drop_stale(key)
        self.wake()

    def outdate(self, entry: Entry) -> None:
        """Make the resident copy of `entry`, which was written in place, the only valid one."""
        entry.version += 1
        if entry.tensor is not None:
            entry.seen = entry.writes()
        self.invalidate(entry, keep=0)

    def refresh(self, entry: Entry) -> None:
        """Take note of writes to the resident value that nobody told of; before a copy of it elsewhere is taken for equal."""
        if entry.tensor is not None and entry.writes() != entry.seen:
            self.outdate(entry)

    # -- reads without a lease ------------------------------------------------------------------------------------

    def hand_out(self, handout: Handout) -> None:
        """Let readers use resident entries without a lease until they are withdrawn; they note the keys each time."""
        for entry in handout.entries:
            entry.handout = handout
            self.handed_out += entry.nbytes

    def withdraw(self, entry: Entry) -> bool:
        """End what `hand_out` began, and take note of writes; False, and nothing is done, while a reader is not done yet."""
        if entry.handout is not None:
            if not entry.handout.withdraw():
                return False
            self._take_back(entry.handout)
        if entry.guard is not None and entry.guard.used():
            return False
        self.refresh(entry)
        return True

    def _let_go(self, entry: Entry) -> None:
        if entry.ready is not None:
            entry.ready.retire()
            entry.ready = None
        if entry.tensor is not None:
            self.engine.parting(entry.tensor)  # as long as it is here nobody can have its memory again
        entry.tensor, entry.shown = None, False
        if entry.handout is not None:
            entry.handout.forget()
            self._take_back(entry.handout)

    def _take_back(self, handout: Handout) -> None:
        for entry in handout.entries:
            entry.handout = None
            self.handed_out -= entry.nbytes

    def catch_up(self) -> None:
        """Tell the policy of uses without a lease, in their order."""
        if self.noted:
            keys = [self.noted.popleft() for _ in range(len(self.noted))]
            keys = [key for key in keys if key in self.entries and self.entries[key].resident]
            self.counters.hits += len(keys)
            self.tiers[0].policy.access_all(keys)

    # -- busy marks, and who waits for whom -----------------------------------------------------------------------------

    def mark_busy(self, entry: Entry) -> None:
        entry.busy = True
        self._busy += 1

    def unmark_busy(self, entry: Entry) -> None:
        entry.busy = False
        self._busy -= 1
        self.wake()

    def wait_until_idle(self, entry: Entry) -> None:
        while entry.busy:
            self.pause()

    def wait_for_others(self, error: Callable[[], BudgetError]) -> None:
        """Wait until another thread gives up room, a busy mark or a lease; raise `error()` if none of them ever will."""
        me = threading.get_ident()
        self._waiting.add(me)
        try:
            if self._busy == 0 and self._held.keys() <= self._waiting:
                raise error()
            self.pause()
        finally:
            self._waiting.discard(me)

    def pause(self) -> None:
        """Release the lock until something may have changed, and take it again."""
        self._paused += 1
        try:
            self.engine.wait(self.lock)
        finally:
            self._paused -= 1

    def wake(self) -> None:
        """Let every waiting thread look again. Until it has, it does not count as waiting in vain."""
        if self._paused:
            self._waiting.clear()
            self.lock.notify_all()
