"""Finds a policy by its name."""

from __future__ import annotations

from tierstore.errors import TierStoreError
from tierstore.planning.classic import FIFO, LRU, MRU
from tierstore.planning.frequency import TinyLFU
from tierstore.planning.policy import PolicyFactory

_NAMED: dict[str, PolicyFactory] = {"auto": LRU, "lru": LRU, "fifo": FIFO, "mru": MRU, "tinylfu": TinyLFU}


def policy_factory(policy: str | PolicyFactory) -> PolicyFactory:
    """Return what makes a fresh policy per tier: `policy` itself if callable, else the one of that name."""
    if callable(policy):
        return policy
    if policy not in _NAMED:
        raise TierStoreError(f"no policy is called {policy!r}; give one of {sorted(_NAMED)} or a callable that returns a tierstore.Policy")
    return _NAMED[policy]
