"""The policy "auto": obeys an online policy until accesses repeat, then keeps what a plan keeps and fetches ahead.

One `Schedule` sees every access and has the plan; each tier but the last has a `Lane`, its policy, that follows it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from tierstore.planning.plan import Plan
from tierstore.planning.policy import Foresight
from tierstore.planning.schedule import Schedule

_SOME = 8  # expected accesses in a row after which it is worth fetching ahead


class Lane(Foresight):
    """The policy of one tier under a `Schedule`.

    Present keys are of four kinds. Those that the plan keeps here leave last. Those in `_window`, which runs from the next
    access to as far as was looked ahead, are on their way to being used. Those `_spent` were used, or only pass through, and
    leave first. Those that no plan speaks of, because there is none or because their use depends on data, are left to an
    online policy, which sees no others.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.nbytes: int | None = None
        self._schedule = schedule
        self._level = schedule.add(self)
        self._online = schedule.online()
        self._unplanned: set[str] = set()  # what the online policy has
        self._held: set[str] = set()
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
        self._held.discard(key)
        self._spent.pop(key, None)
        if key in self._ahead and key not in self._served:
            self._look_back(key)
        if self._level == 0 and self._schedule.rest(key) == 0:
            self._squeezed_out += self._schedule.sizes[key]
        self._schedule.left(self._level, key)

    def budget(self, nbytes: int | None) -> None:
        self.nbytes = nbytes
        self._schedule.budget_changed()

    def timed(self, now: Callable[[], float]) -> None:
        self._schedule.now = now

    def waited(self, seconds: float) -> None:
        if self._level == 0:
            self._schedule.waited += seconds

    @property
    def plan(self) -> Plan | None:
        return self._schedule.plan

    def would_move(self, budget: int) -> int | None:
        return self._schedule.would_move(self._level, budget)

    def foretell(self, sizes: Mapping[str, int]) -> None:
        self._schedule.foretell(sizes)

    def together(self, keys: Sequence[str]) -> None:
        self._schedule.together.update(dict.fromkeys(keys, keys[0]))

    def hold(self, key: str) -> None:
        self._held.add(key)
        if key in self._unplanned:
            self._unplanned.discard(key)
            self._online.remove(key)

    def unhold(self, key: str) -> None:
        self._held.discard(key)
        if self._schedule.rest(key) is None:
            self.unplan(key)

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
        room = schedule.plan.ring_bytes[self._level] - streaming + self._missing_bytes(schedule.plan)
        for key in self._online.victims():
            if room <= 0:  # the rest of the tier is not for the plan
                return
            if key not in self._ahead:
                room -= sizes[key]
                yield key

    def _missing_bytes(self, plan: Plan) -> int:
        """Return the bytes that are kept here by plan and are not here: of a model, say, that others before it left no room for."""
        sizes = self._schedule.sizes
        return sum(sizes[key] for key, level in plan.rest.items() if level == self._level and key not in self._present)

    def wanted(self) -> str | None:
        schedule = self._schedule
        predictor = schedule.predictor
        if schedule.plan is None or self._frontier is None or not predictor.sure(_SOME):
            return None
        history, erratic = predictor.history, predictor.erratic
        while self._frontier + 1 < len(history):
            key = history[self._frontier + 1]
            if key not in self._present and key not in erratic and self._passes(key) and not schedule.above(self._level, key):
                return key
            self._frontier += 1
            if key not in erratic:
                self._window.append((key, self._frontier))
                self._ahead[key] = self._ahead.get(key, 0) + 1
                self._spent.pop(key, None)
        return None

    def has(self, key: str) -> bool:
        """True if `key` is in this tier, or on its way into it."""
        return key in self._present

    # -- what the schedule tells ------------------------------------------------------------------------------------

    def passed(self, key: str, *, expected: bool) -> None:
        """A use was seen; the window moves on, or starts anew where it was not expected."""
        predictor = self._schedule.predictor
        self._served.discard(key)
        if not expected:
            self._forget_window()
        elif not predictor.aside:
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

    def left_above(self, key: str) -> None:
        """A faster tier no longer has `key`: what was passed over because it was there has to be looked at again."""
        if key in self._ahead and key not in self._present and key not in self._served:
            self._look_back(key)

    def sort_out(self) -> None:
        """Another plan holds: sort every key anew."""
        present, sizes = list(self._present), self._schedule.sizes
        self._spent.clear()
        self._forget_window()
        self._online = self._schedule.online()
        self._unplanned = {key for key in present if key not in self._held and self._schedule.rest(key) is None}
        for key in present:
            if key in self._unplanned:
                self._online.insert(key, sizes[key])
            self._sort(key)

    def unplan(self, key: str) -> None:
        """No plan speaks of `key` any more: its use depends on data."""
        self._spent.pop(key, None)
        if key in self._present and key not in self._unplanned and key not in self._held:
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

    def _passes(self, key: str) -> bool:
        """True if this tier is to have `key` for its next use. What no plan speaks of has a place in the fastest one only."""
        rest = self._schedule.rest(key)
        return self._level == 0 if rest is None else rest >= self._level

    def _streams(self, key: str) -> bool:
        rest = self._schedule.rest(key)
        return rest is not None and rest != self._level
