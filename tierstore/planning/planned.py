"""The policy "auto": obeys an online policy until accesses repeat, then keeps what a plan keeps and fetches ahead.

One `Schedule` sees every access and has the plan; each tier but the last has a `Lane`, its policy, that follows it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from tierstore.planning.plan import Plan, plan
from tierstore.planning.policy import Foresight, PolicyFactory
from tierstore.planning.predictor import Predictor
from tierstore.planning.shadow import Shadowed

_ENOUGH = 32  # expected accesses in a row after which a repetition is believed; fewer if all of it is shorter
_FEWEST = 4
_SOME = 8  # the same for fetching ahead
_BETTER = 0.98  # a new plan replaces one that moves at least this much less
_FIXED_BYTES = 128 << 10  # what a transfer costs on top of its bytes: about 50 microseconds at 2.5 GB/s


class Schedule:
    """What the lanes of one store share: the predicted order of accesses, sizes, budgets, and the plan made of them."""

    def __init__(self, fixed_bytes: int = _FIXED_BYTES, online: PolicyFactory = Shadowed) -> None:
        self._online = online
        self.predictor = Predictor()
        self.predictor.on_trim = self._trimmed
        self.predictor.on_erratic = self._unplan
        self.lanes: list[Lane] = []
        self._upper: list[Lane] = []  # all but the slowest, into which nothing is fetched
        self.sizes: dict[str, int] = {}
        self.plan: Plan | None = None
        self._fixed_bytes = fixed_bytes
        self._considered: int | None = None  # the period for which a plan was made last
        self._squeezed = 0  # bytes that should have stayed and had to leave, in this repetition
        self._extra = 0  # bytes left free for them since
        self._until_check = 0

    def lane(self) -> Lane:
        """Return the policy of the next tier, fastest first."""
        lane = Lane(self, len(self.lanes), self._online)
        self._upper = list(self.lanes)
        self.lanes.append(lane)
        return lane

    def seen(self, key: str) -> None:
        """Record a use."""
        expected = self.predictor.see(key)
        if not expected:
            self._considered = None
        for lane in self._upper:
            lane.passed(key, expected=expected)
        if expected:
            self._went_on(1)

    def seen_all(self, keys: list[str]) -> None:
        """Record several uses: faster where they were expected."""
        if self.predictor.erratic:
            keys = [key for key in keys if key not in self.predictor.erratic]
        start = 0
        while start < len(keys):
            some = keys[start : start + (self.predictor.period or 1)]
            if self.predictor.see_expected(some):
                for lane in self._upper:
                    lane.passed_all(some)
                self._went_on(len(some))
            else:
                for key in some:
                    self.seen(key)
            start += len(some)

    def _went_on(self, count: int) -> None:
        """As many uses were expected: look whether it is time for another plan."""
        self._until_check -= count
        period = self.predictor.period
        if period is not None and (period != self._considered or (self._until_check <= 0 and self._squeezed)):
            self._consider(period)

    def rest(self, key: str) -> int | None:
        """Return the level in which the plan keeps `key`; None if it says nothing."""
        return self.plan.rest.get(key) if self.plan is not None and key not in self.predictor.erratic else None

    def budget_changed(self) -> None:
        """Plan anew at the next expected access."""
        self._considered = None
        self._extra = 0
        if self.plan is not None:
            self._adopt(None)

    def squeezed(self, nbytes: int, *, by_plan: bool) -> None:
        """Entries of `nbytes` that the plan keeps had to leave: for others of the plan, it left too little room for them."""
        if by_plan:
            self._squeezed += nbytes

    def _consider(self, period: int) -> None:
        """Make a plan for the repetition at hand, and follow it if it moves less than the present one does."""
        if self.predictor.matched < _FEWEST or not self.predictor.sure(_ENOUGH):
            return
        squeezed = bool(self._squeezed)
        self._considered, self._until_check = period, period
        self._extra, self._squeezed = self._extra + self._squeezed, 0
        cycle = [key for key in self.predictor.cycle() if key in self.sizes]
        budgets = self._budgets(cycle)
        if budgets is None:
            return
        new = plan(cycle, self.sizes, budgets, fixed_bytes=self._fixed_bytes)
        if squeezed or self._improves(new, cycle):
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
        return plan(cycle, self.sizes, budgets, fixed_bytes=self._fixed_bytes).link_bytes[level]

    def _improves(self, new: Plan, cycle: list[str]) -> bool:
        """True if `new` moves clearly less than the plan at hand, or knows keys that it does not, for no more."""
        if self.plan is None:
            return True
        now = sum(self.sizes[key] for key in cycle if self.plan.rest.get(key) != 0)
        unknown = any(key not in self.plan.rest for key in cycle)
        return new.link_bytes[0] < _BETTER * now or (unknown and new.link_bytes[0] <= now)

    def _adopt(self, new: Plan | None) -> None:
        self.plan = new
        for lane in self.lanes:
            lane.sort_out()

    def _unplan(self, key: str) -> None:
        for lane in self.lanes:
            lane.unplan(key)

    def _trimmed(self, cut: int) -> None:
        for lane in self.lanes:
            lane.trimmed(cut)


class Lane(Foresight):
    """The policy of one tier under a `Schedule`.

    Present keys are of four kinds. Those that the plan keeps here leave last. Those in `_window`, which runs from the next
    access to as far as was looked ahead, are on their way to being used. Those `_spent` were used, or only pass through, and
    leave first. Those that no plan speaks of, because there is none or because their use depends on data, are left to an
    online policy, which sees no others.
    """

    def __init__(self, schedule: Schedule, level: int, make_online: PolicyFactory) -> None:
        self.nbytes: int | None = None
        self._schedule = schedule
        self._level = level
        self._make_online = make_online
        self._online = make_online()
        self._unplanned: set[str] = set()  # what the online policy has
        self._present: OrderedDict[str, None] = OrderedDict()  # by last use
        self._spent: OrderedDict[str, None] = OrderedDict()
        self._window: deque[tuple[str, int]] = deque()  # keys, each with its position in the history
        self._ahead: dict[str, int] = {}  # how often each key is in the window
        self._squeezed_out = 0  # bytes of kept entries that left since the last one entered
        self._served: set[str] = set()  # in the window and already copied to the tier above
        self._frontier: int | None = None  # position in the history up to which the window reaches

    # -- events ---------------------------------------------------------------------------------------------------

    def insert(self, key: str, nbytes: int) -> None:
        self._schedule.sizes[key] = nbytes
        self._present[key] = None
        planned = self._schedule.rest(key) is not None
        self._schedule.squeezed(self._squeezed_out, by_plan=planned)
        self._squeezed_out = 0
        if not planned:
            self._unplanned.add(key)
            self._online.insert(key, nbytes)
        self._sort(key)

    def access(self, key: str) -> None:
        self._present.move_to_end(key)
        if key in self._unplanned:
            self._online.access(key)
        if self._level == 0:
            self._schedule.seen(key)
        elif key in self._ahead and self._streams(key):
            self._served.add(key)
            self._spent[key] = None

    def access_all(self, keys: list[str]) -> None:
        if self._level:
            super().access_all(keys)
            return
        for key in keys:
            self._present.move_to_end(key)
            if key in self._unplanned:
                self._online.access(key)
        self._schedule.seen_all(keys)

    def remove(self, key: str) -> None:
        if key in self._unplanned:
            self._unplanned.discard(key)
            self._online.remove(key)
        del self._present[key]
        self._spent.pop(key, None)
        if key in self._ahead and key not in self._served:
            self._look_back(key)
        if self._level == 0 and self._schedule.rest(key) == 0:
            self._squeezed_out += self._schedule.sizes[key]

    def budget(self, nbytes: int | None) -> None:
        self.nbytes = nbytes
        self._schedule.budget_changed()

    @property
    def plan(self) -> Plan | None:
        return self._schedule.plan

    def would_move(self, budget: int) -> int | None:
        return self._schedule.would_move(self._level, budget)

    # -- answers --------------------------------------------------------------------------------------------------

    def victims(self) -> Iterator[str]:
        yield from reversed(self._spent)
        yield from (key for key in self._online.victims() if key not in self._ahead)
        ahead = dict.fromkeys(key for key, _ in reversed(self._window) if key in self._present and key not in self._spent)
        passing = [key for key in ahead if key in self._unplanned or self._streams(key)]
        yield from passing
        kept = [key for key in self._present if key not in self._spent and key not in self._unplanned and key not in passing]
        yield from reversed(kept)

    def spare(self) -> Iterator[str]:
        yield from reversed(self._spent)
        schedule = self._schedule
        if schedule.plan is None or not self._unplanned:
            return
        sizes = schedule.sizes
        streaming = sum(sizes[key] for key in self._ahead if key in self._present and self._streams(key))
        for key in self._online.victims():
            if streaming >= schedule.plan.ring_bytes[self._level]:  # the rest of the tier is not for streaming
                return
            if key not in self._ahead:
                streaming += sizes[key]
                yield key

    def wanted(self) -> str | None:
        schedule = self._schedule
        predictor = schedule.predictor
        if schedule.plan is None or self._frontier is None or not predictor.sure(_SOME):
            return None
        history, erratic = predictor.history, predictor.erratic
        while self._frontier + 1 < len(history):
            key = history[self._frontier + 1]
            rest = schedule.rest(key)
            if key not in erratic and rest is not None and rest >= self._level and key not in self._present:
                return key
            self._frontier += 1
            if key not in erratic:
                self._window.append((key, self._frontier))
                self._ahead[key] = self._ahead.get(key, 0) + 1
                self._spent.pop(key, None)
        return None

    # -- what the schedule tells ------------------------------------------------------------------------------------

    def passed(self, key: str, *, expected: bool) -> None:
        """A use was seen; the window moves on, or starts anew where it was not expected."""
        predictor = self._schedule.predictor
        self._served.discard(key)
        if not expected:
            self._forget_window()
        elif key not in predictor.erratic:
            if self._window:
                self._leave_window()
            else:
                self._frontier = predictor.pointer
        if key in self._present:
            self._sort(key)

    def passed_all(self, keys: list[str]) -> None:
        """Uses were seen, all of them expected: a loop over keys that mostly stay, which must cost little."""
        plan = self._schedule.plan
        self._served.difference_update(keys)
        for _ in keys:
            if not self._window:
                self._frontier = self._schedule.predictor.pointer
                break
            self._leave_window()
        if plan is not None:
            for key in keys:
                if plan.rest.get(key) != self._level and key in self._present:
                    self._sort(key)

    def sort_out(self) -> None:
        """Another plan holds: sort every key anew."""
        present, sizes = list(self._present), self._schedule.sizes
        self._spent.clear()
        self._forget_window()
        self._online = self._make_online()
        self._unplanned = {key for key in present if self._schedule.rest(key) is None}
        for key in present:
            if key in self._unplanned:
                self._online.insert(key, sizes[key])
            self._sort(key)

    def unplan(self, key: str) -> None:
        """No plan speaks of `key` any more: its use depends on data."""
        self._spent.pop(key, None)
        if key in self._present and key not in self._unplanned:
            self._unplanned.add(key)
            self._online.insert(key, self._schedule.sizes[key])

    def trimmed(self, cut: int) -> None:
        """The history lost its first `cut` positions."""
        self._forget_window()
        self._frontier = None if self._frontier is None or self._frontier < cut else self._frontier - cut

    def _leave_window(self) -> None:
        window, erratic = self._window, self._schedule.predictor.erratic
        while window:
            key = window.popleft()[0]
            self._uncount(key)
            if key not in erratic:
                return

    def _look_back(self, missing: str) -> None:
        """A key had to leave before its use: look ahead again from there."""
        while missing in self._ahead:
            key, self._frontier = self._window.pop()
            self._uncount(key)
            if key in self._present:
                self._sort(key)
        assert self._frontier is not None
        self._frontier -= 1

    def _uncount(self, key: str) -> None:
        count = self._ahead.pop(key) - 1
        if count:
            self._ahead[key] = count

    def _forget_window(self) -> None:
        waiting = list(self._ahead)
        self._window.clear()
        self._served.clear()
        self._ahead.clear()
        self._frontier = self._schedule.predictor.pointer
        for key in waiting:
            if key in self._present:
                self._sort(key)

    def _sort(self, key: str) -> None:
        """Put a present key among the spent ones, last, if it only passes through here and is not about to be used."""
        if key not in self._ahead and self._streams(key):
            self._spent[key] = None
            self._spent.move_to_end(key)

    def _streams(self, key: str) -> bool:
        rest = self._schedule.rest(key)
        return rest is not None and rest != self._level
