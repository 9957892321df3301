"""Leases on entries: resident, and not evictable until they are given back."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from tierstore.entry import Entry
from tierstore.errors import BudgetError, MissingKeyError, listed
from tierstore.flights import Flight, Flights
from tierstore.planning.policy import Foresight
from tierstore.tier import Tier
from tierstore.transfer.engine import Engine


class Leasing(Flights):
    """Adds leases to `Flights`, under the same lock; every method expects it held.

    `leased_bytes` counts each leased entry once, however many hold a lease on it.
    """

    def __init__(self, tiers: Sequence[Tier], engine: Engine) -> None:
        super().__init__(tiers, engine)
        self.leased_bytes = 0

    def acquire(self, entries: Iterable[Entry], operation: object, *, headroom: int = 0, wait: bool = True, passing: bool = False) -> bool:
        """Make all entries resident and lease them, all or none.

        With `wait` it waits for other threads' leases where that can help and raises `BudgetError` where it cannot;
        without, it answers False instead. `operation` is what errors call it; `headroom`: bytes of the fast tier that must
        stay free of leases; `passing`: the leases will be given back without waiting for anything, so that whoever would
        replace a value waits for that.
        """
        wanted = list(dict.fromkeys(entries))
        started: float | None = None
        while not self._try_acquire(wanted, headroom, passing=passing):
            started = self.engine.now() if started is None else started
            in_the_way = not wait and any(self._flights)  # these end by themselves; leases may not
            if in_the_way or any(entry.busy for entry in wanted):
                self.pause()
            elif not wait:
                return False
            else:
                self._wait_for_room(operation, wanted)
            self.check_open()
        if started is not None:
            self._stalled(operation, started)
        try:
            self.engine.computing()
            self._wait_until_ready(wanted)
            if not self.all_fetching():
                self.pump()
        except BaseException:
            self.release(wanted, passing=passing)
            raise
        return True

    def lease_resident(self, entries: Sequence[Entry], headroom: int) -> bool:
        """Lease entries if that takes no move and leaves `headroom` bytes free of leases: the short way of `acquire`.

        It fetches nothing ahead; call `pump` when the leases are given back.
        """
        fresh = self._fresh_bytes(entries)
        if fresh is None:
            return False
        self.catch_up()
        if not self._leaves(headroom, fresh):
            return False
        self._lease(entries)
        self.counters.hits += len(entries)
        self._together(entries)
        self._tell(entries)
        self.engine.computing()
        self._wait_until_ready(entries)
        return True

    @staticmethod
    def _fresh_bytes(entries: Sequence[Entry]) -> int | None:
        """Return the bytes of those that have no lease yet; None if any of them is not resident, or about to leave."""
        fresh = 0
        for entry in entries:
            if entry.busy or 0 not in entry.tiers:
                return None
            if not entry.leases:
                fresh += entry.nbytes
        return fresh

    def lease_unnoticed(self, entries: Sequence[Entry]) -> bool:
        """Lease entries if that takes no move; the policy is not told, since so small a use is no reason for them to stay."""
        fresh = self._fresh_bytes(entries)
        if fresh is None or not self._leaves(0, fresh):
            return False
        self._lease(entries)
        self.counters.hits += len(entries)
        self.engine.computing()
        self._wait_until_ready(entries)
        return True

    def _try_acquire(self, wanted: list[Entry], headroom: int, *, passing: bool) -> bool:
        if any(entry.busy for entry in wanted):
            return False
        self.check_open()
        for entry in wanted:
            if self.entries.get(entry.key) is not entry or not entry.tiers:
                raise MissingKeyError(f"{entry.key!r} was deleted, or another value put, while this thread waited for it")
        self.catch_up()
        if not self._leaves(headroom, sum([entry.nbytes for entry in wanted if entry.leases == 0])):
            return False
        missing = [entry for entry in wanted if 0 not in entry.tiers]
        self._together(wanted)
        self._lease(wanted, passing=passing)
        if not missing:
            self._tell(wanted)
            self._count(wanted, 0)
            return True
        need = sum(entry.nbytes for entry in missing)
        try:
            ready = self.make_room(0, need)
        except BaseException:
            self.release(wanted, passing=passing)
            raise
        moved = not self._still_missing(missing)  # by another thread, while room was made
        if ready and not moved:
            self._count(wanted, len(missing))
            self._fill(wanted, missing, passing=passing)
            return True
        if ready:
            self.tiers[0].ledger.release(need)
        self.release(wanted, passing=passing)
        return moved and self._try_acquire(wanted, headroom, passing=passing)

    def _wait_until_ready(self, leased: Sequence[Entry]) -> None:
        """Let what this thread computes from now on come after the copies that fill what it leased."""
        for entry in leased:
            if entry.ready is not None:
                entry.ready.wait()
                if entry.ready.passed():
                    entry.ready = None

    def _leaves(self, headroom: int, nbytes: int) -> bool:
        """True if `nbytes` more under leases leave `headroom` bytes; where it is asked for, what is handed out counts as leased."""
        budget = self.tiers[0].ledger.limit
        taken = self.leased_bytes + (self.handed_out if headroom else 0)
        return budget is None or taken + nbytes + headroom <= budget

    def may_hand_out(self, nbytes: int, headroom: int) -> bool:
        """True if `nbytes` more without a lease leave room for what streams, and for two operations of `headroom` bytes."""
        policy, budget = self.tiers[0].policy, self.tiers[0].ledger.limit
        plan = policy.plan if isinstance(policy, Foresight) else None
        ring = plan.ring_bytes[0] if plan is not None and plan.ring_bytes else 0
        return budget is None or self.handed_out + nbytes + max(ring, 2 * headroom) <= budget

    def _still_missing(self, missing: list[Entry]) -> bool:
        return all(0 not in entry.tiers and not entry.busy and self.entries.get(entry.key) is entry for entry in missing)

    def _fill(self, wanted: list[Entry], missing: list[Entry], *, passing: bool) -> None:
        """Copy reserved and leased entries into the fast tier; on failure give back every lease and reservation."""
        started = self.engine.now()
        flights: list[Flight] = []
        todo = list(missing)
        for entry in missing:
            self.mark_busy(entry)
        try:
            while todo:
                entry = todo.pop(0)
                flights.append(self.begin(entry, min(entry.tiers), 0))
            self._tell(wanted)
            self.pump()
            while not all(flight.done for flight in flights):
                self.pause()
            for flight in flights:
                if flight.error is not None:
                    raise flight.error
        except BaseException:
            for entry in todo:
                self.tiers[0].ledger.release(entry.nbytes)
                self.unmark_busy(entry)
            self.release(wanted, passing=passing)
            raise
        self._stalled(missing[0].key, started)

    def _stalled(self, operation: object, since: float) -> None:
        now = self.engine.now()
        self.counters.stall_seconds += now - since
        policy = self.tiers[0].policy
        if isinstance(policy, Foresight):
            policy.waited(now - since)
        self.timeline.stalled(str(operation), since, now)

    def _count(self, wanted: list[Entry], missed: int) -> None:
        self.counters.misses += missed
        self.counters.hits += len(wanted) - missed

    def _together(self, used: Sequence[Entry]) -> None:
        policy = self.tiers[0].policy
        if len(used) > 1 and isinstance(policy, Foresight):
            policy.together([entry.key for entry in used])

    def _tell(self, used: Sequence[Entry]) -> None:
        """Tell the policy of uses, in an order that does not depend on what is missing; all of it is in the tier or on its way.

        What has landed and gone wrong meanwhile is left out.
        """
        keys = [entry.key for entry in used if 0 in entry.tiers or entry.busy]
        if len(keys) > 1:
            self.tiers[0].policy.access_all(keys)
        elif keys:
            self.tiers[0].policy.access(keys[0])

    def _lease(self, entries: Sequence[Entry], *, passing: bool = False) -> None:
        me = threading.get_ident()
        taken = 0
        for entry in entries:
            if entry.leases == 0:
                self.leased_bytes += entry.nbytes
            entry.leases += 1
            entry.passing += passing
            taken += entry.nbytes
        self._held[me] = self._held.get(me, 0) + taken

    def hold(self, entry: Entry) -> None:
        """Lease a resident entry for good, on behalf of no thread."""
        policy = self.tiers[0].policy
        if isinstance(policy, Foresight):
            policy.hold(entry.key)
        if entry.leases == 0:
            self.leased_bytes += entry.nbytes
        entry.leases += 1

    def unhold(self, entry: Entry) -> None:
        """End a `hold`."""
        policy = self.tiers[0].policy
        if isinstance(policy, Foresight):
            policy.unhold(entry.key)
        entry.leases -= 1
        if entry.leases == 0:
            self.leased_bytes -= entry.nbytes
        self.wake()

    def release(self, entries: Iterable[Entry], owner: int | None = None, *, passing: bool = False) -> None:
        """Give back one lease on each entry; `owner` is the thread that took it, by default this one, `passing` as it was taken."""
        thread = threading.get_ident() if owner is None else owner
        given = 0
        for entry in entries:
            entry.leases -= 1
            entry.passing -= passing
            given += entry.nbytes
            if entry.leases == 0:
                self.leased_bytes -= entry.nbytes
        left = self._held.get(thread, 0) - given
        if left > 0:
            self._held[thread] = left
        else:
            self._held.pop(thread, None)
        self.wake()

    def _wait_for_room(self, operation: object, wanted: list[Entry]) -> None:
        """Wait until another thread gives something up; raise `BudgetError` if none will, or if it cannot help."""
        if not self.tiers[0].ledger.fits(sum(entry.nbytes for entry in wanted)):
            raise self._budget_error(operation, wanted)
        self.wait_for_others(lambda: self._budget_error(operation, wanted))

    def _budget_error(self, operation: object, wanted: list[Entry]) -> BudgetError:
        tier = self.tiers[0]
        budget = tier.ledger.limit or 0
        operation = f"{operation} on {listed([repr(entry.key) for entry in wanted], 5)}"
        required = sum(entry.nbytes for entry in wanted)
        if required > budget:
            aside = tier.ledger.aside
            hint = f"{aside} bytes more of its budget are taken by activations: raise the budget of {tier.name!r}" if aside else ""
            return BudgetError(operation, tier=tier.name, required_bytes=required, budget_bytes=budget, hint=hint)
        held = self.leased_bytes - sum(entry.nbytes for entry in wanted if entry.leases)
        hint = f"{held} bytes of it are leased at this moment: raise the budget of {tier.name!r}, or release leases first"
        if held + required <= budget:
            hint = "no tier below has room for what would have to leave: raise a budget below it, or add a disk tier"
        return BudgetError(operation, tier=tier.name, required_bytes=required + held, budget_bytes=budget, hint=hint)
