"""A tier: a backend with a byte budget and a ledger."""

from __future__ import annotations

from tierstore.backend import Backend, MemoryBackend
from tierstore.errors import TierStoreError
from tierstore.ledger import Ledger
from tierstore.planning.classic import LRU
from tierstore.planning.policy import Policy
from tierstore.sizes import Size, parse_size


class Tier:
    """One level of a store: `name` for reports, `backend` for the bytes, `budget` in bytes or as a size string (None: no limit).

    The store that it is given to owns it and closes the backend.
    """

    def __init__(self, name: str, backend: Backend, budget: Size | None = None) -> None:
        if not isinstance(backend, Backend):
            raise TierStoreError(
                f"tier {name!r} needs a tierstore.Backend, got {type(backend).__name__}; tierstore.open_backend(name, ...) makes one"
            )
        self.name = name
        self.backend = backend
        self.ledger = Ledger(None if budget is None else parse_size(budget))
        self.policy: Policy = LRU()
        self.stale: dict[str, int] = {}  # outdated copies, kept until the new value is home: key -> bytes

    def __repr__(self) -> str:
        return f"Tier({self.name!r}, {type(self.backend).__name__}, budget={self.ledger.budget})"

    @property
    def memory(self) -> bool:
        """True if values are live tensors, lost when the process ends."""
        return isinstance(self.backend, MemoryBackend)

    def drop_stale(self, key: str) -> None:
        """Forget the outdated copy of `key`, whose bytes were already replaced or deleted."""
        nbytes = self.stale.pop(key, None)
        if nbytes is not None:
            self.ledger.release(nbytes)
