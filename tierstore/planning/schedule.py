"""What the lanes of one store share: the order of accesses as far as it can be foreseen, and the plan made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from tierstore.planning.cycle import Cycle
from tierstore.planning.plan import Cost, Plan, plan
from tierstore.planning.policy import PolicyFactory
from tierstore.planning.predictor import Predictor
from tierstore.planning.shadow import Shadowed

_ENOUGH = 32  # expected accesses in a row after which a repetition is believed; fewer if all of it is shorter
_ENOUGH_OF_FORETOLD = 8
_FEWEST = 4
_BETTER = 0.98  # a new plan replaces one that moves at least this much less
_REFINEMENTS = 2  # repetitions after which a plan is compared with one that knows more of how long is computed where
_WORTH = 0.03  # of the time of computing that a plan with another spread must save
_GROWTH = 1.25  # by which a duration may grow from one time to the next: what disturbs a program makes it slower, never faster

FROM_FILES = Cost(2 << 20, 16 << 20)  # threads read a disk for a CPU that computes: see the note in `transfer.reader`
TO_DEVICE = Cost(512 << 10, 64 << 20)  # 10 us at 50 GB/s; while the device computes, the host runs ahead


class Follower(Protocol):
    """What a schedule tells the policy of each tier."""

    nbytes: int | None

    def has(self, key: str) -> bool: ...
    def passed(self, key: str, *, expected: bool) -> None: ...
    def passed_all(self, keys: list[str]) -> None: ...
    def left_above(self, key: str) -> None: ...
    def sort_out(self) -> None: ...
    def unplan(self, key: str) -> None: ...
    def trimmed(self, cut: int) -> None: ...


class Schedule:
    """Sees every access of a store, predicts the next ones, and makes the plan that its lanes follow.

    `online` makes the policy for whatever no plan speaks of.
    """

    def __init__(self, cost: Cost = FROM_FILES, online: PolicyFactory = Shadowed) -> None:
        self.online = online
        self.predictor = Predictor()
        self.predictor.on_trim = self._trimmed
        self.predictor.on_erratic = self._unplan
        self.lanes: list[Follower] = []
        self._upper: list[Follower] = []  # all but the slowest, into which nothing is fetched
        self.sizes: dict[str, int] = {}
        self.together: dict[str, str] = {}  # what was used at once with other keys: the first of them
        self.plan: Plan | None = None
        self.durations: dict[str, float] = {}  # seconds of computing between the last use of each key and the next use of any
        self.now: Callable[[], float] = lambda: 0.0
        self.waited = 0.0
        self._last: tuple[str, float] | None = None  # which key was used, and when
        self.cost = cost
        self._considered: int | None = None  # the period for which a plan was made last
        self._guessed = False  # the plan at hand was made of what was foretold
        self._settling = 0  # uses until a repetition is over in which the tier was still full of what stayed by another plan
        self._squeezed = 0  # bytes that should have stayed and had to leave, in this repetition
        self._extra = 0  # bytes left free for them since
        self._until_check = 0
        self._refinements = 0  # still to come

    def add(self, lane: Follower) -> int:
        """Let the policy of the next tier, fastest first, follow; return its level."""
        self._upper = list(self.lanes)
        self.lanes.append(lane)
        return len(self._upper)

    def foretell(self, sizes: Mapping[str, int]) -> None:
        """Expect uses in this order, unless there were others already that repeat."""
        if self.predictor.pointer is None and self.plan is None:
            self.sizes.update(sizes)
            self.predictor.foretell(list(sizes))

    def seen(self, key: str) -> None:
        """Record a use."""
        self._time(key)
        expected = self.predictor.see(key)
        if not expected:
            self._considered = None
        self._check_guess()
        for lane in self._upper:
            lane.passed(key, expected=expected)
        if expected:
            self._went_on(1)

    def seen_all(self, keys: list[str]) -> None:
        """Record several uses: faster where they were expected. When each of them was is not known."""
        self._last = None
        if self.predictor.erratic:
            keys = [key for key in keys if key not in self.predictor.erratic]
        start = 0
        while start < len(keys):
            some = keys[start : start + (self.predictor.period or 1)]
            if self.predictor.see_expected(some):
                self._check_guess()
                for lane in self._upper:
                    lane.passed_all(some)
                self._went_on(len(some))
            else:
                for key in some:
                    self.seen(key)
            start += len(some)

    def _check_guess(self) -> None:
        """Give up a plan made of what was foretold when that was wrong, or has happened."""
        if self._guessed and not self.predictor.foretold:
            self._considered = None
            self._adopt(None)

    def _time(self, key: str) -> None:
        """Measure what was computed with the key before."""
        moment = self.now()
        if self._last is not None:
            last, since = self._last
            seconds = max(0.0, moment - since - self.waited)
            before = self.durations.get(last)
            self.durations[last] = seconds if not before else min(seconds, _GROWTH * before)
        self._last, self.waited = (key, moment), 0.0

    def _seconds(self, cycle: list[str]) -> list[float] | None:
        """Return how long is computed after each access; None, which takes bytes for it, while little is known."""
        known = [key for key in cycle if key in self.durations]
        total = sum(self.durations[key] for key in known)
        if 2 * len(known) < len(cycle) or not total:
            return None
        rate = total / max(1, sum(self.sizes[key] for key in known))
        return [self.durations.get(key, rate * self.sizes[key]) for key in cycle]

    def _went_on(self, count: int) -> None:
        """As many uses were expected: look whether it is time for another plan."""
        self._until_check -= count
        self._settling -= count
        period = self.predictor.period
        if period is None:
            return
        if period != self._considered or (self._until_check <= 0 and self._squeezed):
            self._consider(period)
        elif self._until_check <= 0 < self._refinements:
            self._refine(period)

    def rest(self, key: str) -> int | None:
        """Return the level in which the plan keeps `key`; None if it says nothing."""
        return self.plan.rest.get(key) if self.plan is not None and key not in self.predictor.erratic else None

    def above(self, level: int, key: str) -> bool:
        """True if `key` is in a faster tier than that of this level: the lane there comes too late for it, and is to go on."""
        return any(lane.has(key) for lane in self.lanes[:level])

    def left(self, level: int, key: str) -> None:
        """`key` is not in the tier of this level any more."""
        for lane in self._upper[level + 1 :]:
            lane.left_above(key)

    def budget_changed(self) -> None:
        """Plan anew at the next expected access."""
        self._considered = None
        self._extra = 0
        if self.plan is not None:
            self._adopt(None)

    def squeezed(self, nbytes: int, *, by_plan: bool) -> None:
        """Entries of `nbytes` that the plan keeps had to leave: for others of the plan, which leaves too little room if it has settled."""
        if by_plan and self._settling <= 0:
            self._squeezed += nbytes

    def _consider(self, period: int) -> None:
        """Make a plan for the repetition at hand, and follow it if it moves less than the present one does."""
        enough = _ENOUGH_OF_FORETOLD if self.predictor.guessing else _ENOUGH
        if self.predictor.matched < _FEWEST or not self.predictor.sure(enough):
            return
        squeezed = bool(self._squeezed)
        self._considered, self._until_check = period, period
        self._extra, self._squeezed = self._extra + self._squeezed, 0
        cycle = [key for key in self.predictor.cycle() if key in self.sizes]
        budgets = self._budgets(cycle)
        if budgets is None:
            return
        new = self._plan(cycle, budgets)
        if squeezed or self._improves(new, cycle):
            self._adopt(new)
            self._guessed = self.predictor.guessing
            self._refinements = _REFINEMENTS

    def _refine(self, period: int) -> None:
        """Spread the plan at hand anew if its durations were measured in a time that was not like those since."""
        self._until_check = period
        self._refinements -= 1
        cycle = [key for key in self.predictor.cycle() if key in self.sizes]
        budgets, durations = self._budgets(cycle), self._seconds(cycle)
        if self.plan is None or budgets is None or durations is None:
            return
        new = self._plan(cycle, budgets)
        timed = Cycle(cycle, durations, self.sizes, self.together)
        now, then = (timed.late({key for key in cycle if each.rest.get(key) == 0}, each.ring_bytes[0]) for each in (self.plan, new))
        if now - then > _WORTH * sum(durations) and new.link_bytes[0] <= self._moved(cycle):
            self._adopt(new)

    def _budgets(self, cycle: list[str]) -> list[int | None] | None:
        """Return the budgets to plan with, None if an entry alone exceeds the first."""
        budgets = [lane.nbytes for lane in self.lanes[:-1]] + [None]
        first = budgets[0]
        if first is not None:
            largest = max((self.sizes[key] for key in cycle), default=0)
            if largest > first:
                return None
            budgets[0] = max(first - self._extra, largest)
        return budgets

    def would_move(self, level: int, budget: int) -> int | None:
        """Return the bytes that the repetition at hand would bring into a tier that had another budget."""
        if self.plan is None:
            return None
        cycle = [key for key in self.predictor.cycle() if key in self.sizes] or [key for order in self.plan.order[:1] for key in order]
        budgets = self._budgets(cycle)
        if not cycle or budgets is None:
            return None
        budgets[level] = max(budget, max(self.sizes[key] for key in cycle))
        return self._plan(cycle, budgets).link_bytes[level]

    def _plan(self, cycle: list[str], budgets: list[int | None]) -> Plan:
        return plan(cycle, self.sizes, budgets, self._seconds(cycle), cost=self.cost, together=self.together)

    def _improves(self, new: Plan, cycle: list[str]) -> bool:
        """True if `new` moves clearly less than the plan at hand, or knows keys that it does not, for no more."""
        if self.plan is None:
            return True
        now = self._moved(cycle)
        unknown = any(key not in self.plan.rest for key in cycle)
        return new.link_bytes[0] < _BETTER * now or (unknown and new.link_bytes[0] <= now)

    def _moved(self, cycle: list[str]) -> int:
        """Return the bytes that come into the fastest tier in one repetition by the plan at hand."""
        rest = {} if self.plan is None else self.plan.rest
        return sum(self.sizes[key] for key in cycle if rest.get(key) != 0)

    def _adopt(self, new: Plan | None) -> None:
        self.plan, self._guessed = new, False
        self._settling, self._squeezed = self.predictor.period or 0, 0
        for lane in self.lanes:
            lane.sort_out()

    def _unplan(self, key: str) -> None:
        for lane in self.lanes:
            lane.unplan(key)

    def _trimmed(self, cut: int) -> None:
        for lane in self.lanes:
            lane.trimmed(cut)
