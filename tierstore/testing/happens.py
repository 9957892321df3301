"""Finds accesses to memory that nothing orders, by vector clocks: whether they collided in this run or not.

Agents are streams, each in its own order, and the host: its threads as one, in the order of time, since what one of them
knows has happened on the device has happened for all. A stream's operation comes after whatever the host knew when it put
the operation in.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

Clock = dict[str, int]
"""How much of each agent's doing comes before something."""


class RaceError(AssertionError):
    """Two accesses to the same memory, one of them a write, of which neither is known to come first."""


class Agent:
    """One that acts in an order of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {}

    def learn(self, clock: Clock) -> None:
        """Whatever this agent does from now on comes after all that `clock` stands for."""
        for name, count in clock.items():
            if count > self.clock.get(name, 0):
                self.clock[name] = count

    def act(self) -> int:
        """Count one more doing, and return its number."""
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.clock[self.name]


@dataclass(frozen=True, slots=True)
class Access:
    """One access to the addresses from `start` to `stop`."""

    agent: str
    number: int
    start: int
    stop: int
    writes: bool
    what: str

    def before(self, clock: Clock) -> bool:
        return clock.get(self.agent, 0) >= self.number

    def __str__(self) -> str:
        return f"{self.what} ({'writes' if self.writes else 'reads'} {self.stop - self.start} bytes, {self.agent} #{self.number})"


class Accesses:
    """All accesses that a later one could collide with. `races` says which did. Thread-safe.

    Memory that was freed and handed out again is the same memory: its new user has to come after the old one.
    """

    def __init__(self) -> None:
        self.host = Agent("host")
        self.races: list[str] = []
        self._lock = threading.Lock()
        self._known: list[Access] = []

    def add(self, agent: Agent, start: int, nbytes: int, *, writes: bool, what: str) -> None:
        """Record an access that `agent` makes, or that is put into it, now."""
        if not nbytes:
            return
        with self._lock:
            agent.learn(self.host.clock)
            access = Access(agent.name, agent.act(), start, start + nbytes, writes, what)
            kept = [other for other in self._known if not self._met(access, other, agent.clock)]
            self._known = [*kept, access]

    def _met(self, access: Access, other: Access, clock: Clock) -> bool:
        """Compare with an earlier access; True if that says nothing any more that the new one does not say."""
        if other.stop <= access.start or access.stop <= other.start:
            return False
        before = other.before(clock)
        if not before and (access.writes or other.writes):
            self.races.append(f"nothing orders {other} and {access}")
        covered = access.start <= other.start and other.stop <= access.stop
        return covered and before and (access.writes or (not other.writes and other.agent == access.agent))

    def check(self) -> None:
        """Raise `RaceError` with the first races, if there was any."""
        if self.races:
            raise RaceError(f"{len(self.races)} races: " + "; ".join(self.races[:3]))
