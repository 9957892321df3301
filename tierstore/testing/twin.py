"""A tiered store and a plain dict that get the same operations, with the checks that both agree after each one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tierstore.errors import BudgetError, MissingKeyError, TierStoreError
from tierstore.lease import Lease, LeasedTensors
from tierstore.spec import TensorSpec, typed_view
from tierstore.store import TieredStore
from tierstore.testing.faults import Call, Faults, InjectedError, Moment, wrap
from tierstore.testing.values import bits, overwrite, random_bytes
from tierstore.tier import Tier

MakeTiers = Callable[[Path], Sequence[Tier]]
"""Returns the tiers of a store; called again on the same directory to reopen it."""

MakeStore = Callable[[Sequence[Tier], str], TieredStore]
"""Returns a store over tiers, with a policy by name."""


@dataclass
class Held:
    """A lease that is not over yet."""

    lease: Lease
    keys: tuple[str, ...]
    tensors: LeasedTensors


class Twin:
    """Operations on a store, each followed by the same on a dict of (spec, bits).

    An operation may end as it should, with `BudgetError` where room can be short, or with an injected failure; whenever it
    raises, the dict stays as it was, and the next check finds out whether the store did too.
    """

    def __init__(self, make_tiers: MakeTiers, directory: Path, policy: str = "lru", make_store: MakeStore = TieredStore) -> None:
        self._make_tiers = make_tiers
        self._make_store = make_store
        self._policy = policy
        self._directory = directory
        self.expected: dict[str, tuple[TensorSpec, bytes]] = {}
        self.held: list[Held] = []
        self.outcomes: Counter[str] = Counter()
        self._open()

    def _open(self) -> None:
        tiers = list(self._make_tiers(self._directory))
        self.faults = [Faults() for _ in tiers]
        self.highest = [tier.ledger.budget for tier in tiers]  # a budget may shrink below an earlier peak
        for tier, faults in zip(tiers, self.faults, strict=True):
            tier.backend = wrap(tier.backend, faults)
        self.store = self._make_store(tiers, self._policy)

    @property
    def persistent(self) -> bool:
        """True if a closed store is found again."""
        return not self.store.tiers[-1].volatile

    @property
    def roomy(self) -> bool:
        """True if the last tier takes everything, so that room is short in faster tiers only."""
        return self.store.tiers[-1].ledger.budget is None

    # -- operations ---------------------------------------------------------------------------------------------

    def put(self, key: str, tensor: torch.Tensor, *, fill: bool = False) -> None:
        spec, fixed = TensorSpec.of(tensor), self._leased_spec(key)
        fits = any(tier.ledger.fits(spec.nbytes) for tier in self.store.tiers)
        before = self._placement()
        with self._outcome("put", may_lack_room=not self.roomy):
            try:
                (self.store.fill if fill else self.store.put)(key, tensor)
            except BudgetError:
                assert fits or self._placement() == before, "a value too large for every tier made others move"
                raise
            except TierStoreError:
                assert fixed not in (None, spec), "put was refused without a lease on another spec"
                self.outcomes["put refused"] += 1
                return
            assert fits, f"a value of {spec.nbytes} bytes was accepted and fits nowhere"
            assert fixed in (None, spec), "put changed the spec of a leased value"
            self.expected[key] = spec, bits(tensor)

    def put_like(self, key: str, seed: int) -> None:
        """Replace a value by another one of the same spec, which is allowed within a lease too."""
        if key in self.expected:
            spec = self.expected[key][0]
            self.put(key, typed_view(random_bytes(spec.nbytes, spec.dtype, seed), spec))

    def get(self, key: str) -> None:
        with self._outcome("get", may_lack_room=not self._leasable([key])):
            try:
                found = self.store.get(key)
            except MissingKeyError:
                assert key not in self.expected, f"{key!r} was lost"
                self.outcomes["get missing"] += 1
                return
            self._compare(key, found)

    def scan(self, keys: Sequence[str]) -> None:
        """Get one value after the other, three times over: something to foresee."""
        for key in [*keys] * 3:
            self.get(key)
        self.outcomes["foreseen"] += self.store.plan is not None

    def delete(self, key: str) -> None:
        leased = self._leased_spec(key) is not None
        with self._outcome("delete"):
            try:
                del self.store[key]
            except MissingKeyError:
                assert key not in self.expected, f"{key!r} was lost"
                return
            except TierStoreError:
                assert leased, f"{key!r} was not leased and could not be deleted"
                return
            assert not leased, f"{key!r} was leased and could be deleted"
            del self.expected[key]

    def lease(self, keys: Sequence[str]) -> None:
        with self._outcome("lease", may_lack_room=not self._leasable(keys)):
            lease = self.store.lease(*keys)
            try:
                tensors = lease.__enter__()
            except MissingKeyError:
                assert not self.expected.keys() >= set(keys), f"one of {keys} was lost"
                return
            self.held.append(Held(lease, tuple(keys), tensors))
            assert tensors.keys() == tuple(keys)

    def release(self, number: int) -> None:
        self.held.pop(number % len(self.held)).lease.__exit__(None, None, None)

    def write(self, number: int, seed: int) -> None:
        """Write in place through a lease."""
        held = self.held[number % len(self.held)]
        if held.keys:
            key = held.keys[seed % len(held.keys)]
            overwrite(held.tensors[key], seed)
            self.expected[key] = self.expected[key][0], bits(held.tensors[key])
            with self._outcome("write"):
                self.store.changed(key)

    def prefetch(self, keys: Sequence[str]) -> None:
        with self._outcome("prefetch"):
            self.store.prefetch([key for key in keys if key in self.expected]).result(timeout=60)

    def offload(self, keys: Sequence[str]) -> None:
        known = [key for key in keys if key in self.expected]
        with self._outcome("offload", may_lack_room=not self.roomy):
            self.store.offload(known)
            for key in known:
                assert self._leased_spec(key) is not None or self.store.tier_of(key) != self.store.tiers[0].name, f"{key!r} stayed"

    def flush(self) -> None:
        with self._outcome("flush", may_lack_room=not self.roomy):
            self.store.flush()
            last = self.store.tiers[-1].backend
            assert set(self.expected) <= dict(last.entries()).keys(), "flush left a value out of the last tier"

    def resize(self, level: int, budget: int) -> None:
        tier = self.store.tiers[level]
        before = tier.ledger.budget
        if before is None:
            return
        with self._outcome("resize", may_lack_room=bool(self.held) or not self.roomy):
            try:
                self.store.resize(tier.name, budget)
            except BaseException:
                assert tier.ledger.budget == before, "a resize that failed changed the budget"
                raise
            self.highest[level] = max(self.highest[level] or 0, budget)

    def reopen(self) -> None:
        """Close and open again, if the last tier outlives that; a close that fails leaves the store open."""
        if not self.persistent:
            return
        while self.held:
            self.release(0)
        with self._outcome("reopen", may_lack_room=not self.roomy):
            self.store.close()
            self._open()
            self.check_values()

    def arm(self, level: int, call: Call, nth: int = 1, moment: Moment = "before") -> None:
        """Let a call of a backend fail, soon."""
        tier = self.store.tiers[level % len(self.faults)]
        if call == "get" and tier is self.store.tiers[0] and tier.memory:
            return  # live memory that was just written cannot fail to be found
        self.faults[level % len(self.faults)].arm(call, nth, moment=moment)

    def disarm(self) -> None:
        for faults in self.faults:
            faults.disarm()

    def close(self) -> None:
        """End every lease, check every value, and close the store."""
        self.disarm()
        while self.held:
            self.release(0)
        self.check_values()
        self.store.close(flush=False)

    # -- checks -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What must hold after each step, and once nothing is under way that the step began ahead of use."""
        self.store.moves.settle()
        assert set(self.store) == set(self.expected), f"the store and the dict differ in {set(self.store) ^ set(self.expected)}"
        assert len(self.store) == len(self.expected)
        for tier, highest in zip(self.store.tiers, self.highest, strict=True):
            self._check_tier(tier, highest)
        for held in self.held:
            for key, tensor in held.tensors.items():
                assert self.store.tier_of(key) == self.store.tiers[0].name, f"{key!r} is leased and was evicted"
                self._compare(key, tensor)
        leased = {key for held in self.held for key in held.keys}
        assert self.store.moves.leased_bytes == sum(self.expected[key][0].nbytes for key in leased)

    @staticmethod
    def _check_tier(tier: Tier, highest: int | None) -> None:
        ledger = tier.ledger
        stored = tier.held_bytes()
        assert ledger.used == stored, f"{tier.name}: the ledger says {ledger.used} bytes, the backend holds {stored}"
        assert ledger.budget is None or ledger.used <= ledger.budget, f"{tier.name}: {ledger.used} bytes used of {ledger.budget}"
        assert highest is None or ledger.peak <= highest, f"{tier.name}: a peak of {ledger.peak} bytes under {highest}"

    def check_values(self) -> None:
        """Compare every value, failures aside; what cannot be brought up now is read where it lies."""
        self.disarm()
        for key in self.expected:
            try:
                self._compare(key, self.store.get(key))
            except BudgetError:
                assert not self._leasable([key]), f"{key!r} cannot be read"
                level = [tier.name for tier in self.store.tiers].index(self.store.tier_of(key))
                self._compare(key, self.store.tiers[level].backend.get(key))

    def _compare(self, key: str, found: torch.Tensor) -> None:
        assert key in self.expected, f"{key!r} was deleted and came back"
        spec, expected = self.expected[key]
        assert TensorSpec.of(found) == spec, f"{key!r}: put {spec}, got {TensorSpec.of(found)}"
        assert bits(found) == expected, f"{key!r}: other bits came back"

    @contextmanager
    def _outcome(self, operation: str, *, may_lack_room: bool = False) -> Iterator[None]:
        try:
            yield
        except InjectedError:
            self.outcomes[f"{operation} failed"] += 1
        except BudgetError:
            if not may_lack_room:
                raise
            self.outcomes[f"{operation} no room"] += 1
        else:
            self.outcomes[operation] += 1

    def _leased_spec(self, key: str) -> TensorSpec | None:
        return self.expected[key][0] if any(key in held.keys for held in self.held) else None

    def _leasable(self, keys: Sequence[str]) -> bool:
        """True if leasing `keys` must succeed."""
        budget = self.store.tiers[0].ledger.budget
        together = {key for held in self.held for key in held.keys} | (set(keys) & self.expected.keys())
        return self.roomy and (budget is None or sum(self.expected[key][0].nbytes for key in together) <= budget)

    def _placement(self) -> dict[str, str]:
        return {key: self.store.tier_of(key) for key in self.expected}
