"""Records the accesses of a real run, to be replayed or planned from."""

from __future__ import annotations

from collections.abc import Iterator

from tierstore.planning.policy import Policy


class Recorder(Policy):
    """Evicts as `policy` does and writes down what happens.

    `trace`: every key used, in order; it grows as long as the run. `sizes`: bytes of each key that was ever in the tier, the
    newest where they changed.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.trace: list[str] = []
        self.sizes: dict[str, int] = {}

    def insert(self, key: str, nbytes: int) -> None:
        self.sizes[key] = nbytes
        self._policy.insert(key, nbytes)

    def access(self, key: str) -> None:
        self.trace.append(key)
        self._policy.access(key)

    def remove(self, key: str) -> None:
        self._policy.remove(key)

    def victims(self) -> Iterator[str]:
        return self._policy.victims()
