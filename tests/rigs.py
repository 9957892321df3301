"""Small stores over backends that a test can make fail, wait and be looked at.

Sizes here are bytes of uint8 tensors, so that budgets can be read off the numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tierstore.backend import Backend
from tierstore.store import TieredStore
from tierstore.testing import Delays, DictBackend, Faults
from tierstore.testing.faults import Interference


def value(nbytes: int, fill: int = 0) -> torch.Tensor:
    return torch.full((nbytes,), fill, dtype=torch.uint8)


class Slow(DictBackend):
    """A tier below memory that its test keeps, so that what it holds can be looked at and reopened."""


@dataclass
class Rig:
    """A store over the tiers "fast", "mid" and "slow" (as many as there are budgets), with a hand on each backend."""

    store: TieredStore
    hooks: list[Interference]
    slow: Backend

    def faults(self, level: int) -> Faults:
        hook = self.hooks[level]
        assert isinstance(hook, Faults)
        return hook

    def delays(self, level: int) -> Delays:
        hook = self.hooks[level]
        assert isinstance(hook, Delays)
        return hook

    def used(self, name: str) -> int:
        return self.store.stats().tiers[name].used_bytes

    def copies(self, link: str) -> int:
        return self.store.stats().links[link].copies

    def places(self) -> dict[str, str]:
        return {key: self.store.tier_of(key) for key in self.store}

    def check(self) -> None:
        """Ledgers agree with what backends hold, and nothing is leased or moving any more."""
        for tier in self.store.tiers:
            assert tier.ledger.used == sum(spec.nbytes for _, spec in tier.backend.entries()), tier
            assert tier.ledger.budget is None or tier.ledger.peak <= tier.ledger.budget, tier
        assert self.store.moves.leased_bytes == 0
        assert not any(entry.busy or entry.leases for entry in self.store.moves.entries.values())


MakeRig = Callable[..., Rig]


def in_threads(*tasks: Callable[[], object], timeout: float = 60) -> list[BaseException | None]:
    """Run all tasks at once and return what each raised."""
    raised: list[BaseException | None] = [None] * len(tasks)

    def run(number: int) -> None:
        try:
            tasks[number]()
        except BaseException as error:  # noqa: BLE001  (handed to the test)
            raised[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return raised


class Background:
    """Runs one task in a thread; `join` raises what it raised."""

    def __init__(self, task: Callable[[], object]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(task,), daemon=True)
        self._thread.start()

    def _run(self, task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001  (raised again by join)
            self._error = error

    def still_running(self, seconds: float = 0.1) -> bool:
        self._thread.join(seconds)
        return self._thread.is_alive()

    def join(self) -> None:
        assert not self.still_running(30), "the thread hangs"
        if self._error is not None:
            raise self._error
