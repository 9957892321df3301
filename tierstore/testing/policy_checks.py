"""What holds for every eviction policy."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count

from tierstore.planning.policy import Foresight, Policy
from tierstore.testing.rules import require, rule


def check_policy(make_policy: Callable[[], Policy], *, events: int = 2000, seed: int = 0) -> None:
    """Raise `ConformanceError` for the first rule of `Policy` that breaks under `events` random events."""
    policy, other, present = make_policy(), make_policy(), set[str]()
    _compare_victims(policy, present, "fresh")
    other.insert("of another tier", 1)
    _compare_victims(policy, present, "independence")
    rng = random.Random(seed)
    for _ in range(events):
        event = rng.choice(("insert", "insert", "access", "access", "remove", "insert again"))
        key = f"key {rng.randrange(24)}"
        if event in ("access", "remove", "insert again") and present:
            key = rng.choice(sorted(present))
        elif event != "insert" or key in present:
            continue
        _tell(policy, event, key, rng.randrange(1000), present)
        _compare_victims(policy, present, event)
    _compare_victims(other, {"of another tier"}, "independence")
    for key in sorted(present):
        _tell(policy, "remove", key, 0, present)
    _compare_victims(policy, set(), "remove")
    _check_together(make_policy())
    if isinstance(policy, Foresight):
        _check_foresight(make_policy)


def _check_together(policy: Policy) -> None:
    """Uses that are told together are uses like any other."""
    present = {f"key {number}" for number in range(6)}
    for key in sorted(present):
        policy.insert(key, 10)
    with rule("access all"):
        policy.access_all(["key 3", "key 1", "key 3"])
        policy.access_all([])
    _compare_victims(policy, present, "access all")


def _check_foresight(make_policy: Callable[[], Policy]) -> None:
    """Let a cycle of keys pass through a tier that holds half of them, and ask all the while what is wanted and what is spare."""
    policy, present = make_policy(), dict[str, None]()
    assert isinstance(policy, Foresight)
    policy.budget(40)
    seconds = count()
    with rule("told"):
        policy.timed(lambda: float(next(seconds)))
    for turn in range(120):
        key = f"key {turn % 8}"
        with rule("told"):
            policy.together([key, f"key {(turn + 1) % 8}"])
            policy.waited(0.25)
        if key not in present:
            while len(present) >= 4:
                victim = next(policy.victims())
                policy.remove(victim)
                del present[victim]
            policy.insert(key, 10)
            present[key] = None
        policy.access(key)
        with rule("wanted"):
            wanted = policy.wanted()
        require(wanted is None or wanted not in present, "wanted", f"wanted() asks for {wanted!r}, which is in the tier")
        with rule("spare"):
            spare = list(policy.spare())
        require(set(spare) <= present.keys(), "spare", f"spare() yields {sorted(set(spare) - present.keys())}, not in the tier")
        require(len(set(spare)) == len(spare), "spare", f"spare() yields a key twice: {spare}")


def _tell(policy: Policy, event: str, key: str, nbytes: int, present: set[str]) -> None:
    """Report one event to the policy and to the model."""
    with rule(event, f"{event} of {key!r}"):
        if event.startswith("insert"):
            policy.insert(key, nbytes)
            present.add(key)
        elif event == "access":
            policy.access(key)
        else:
            policy.remove(key)
            present.discard(key)


def _compare_victims(policy: Policy, present: set[str], name: str) -> None:
    with rule(name, "victims()"):
        first = list(policy.victims())
    require(isinstance(policy.victims(), Iterator), "iterator", "victims() must return an iterator")
    twice = [key for key, count in Counter(first).items() if count > 1]
    require(not twice, name, f"victims() yields {twice} twice")
    require(set(first) == present, name, f"victims() and the tier differ in {sorted(set(first) ^ present)}")
    next(policy.victims(), None)  # looking at one victim is no event
    require(list(policy.victims()) == first, "stable order", "victims() changed its order without an event")
