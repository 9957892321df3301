"""A tier: a backend with a byte budget and a ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tierstore.backend import Backend, DistantBackend, MemoryBackend, ReadOnlyBackend, SizingBackend, VolatileBackend
from tierstore.errors import TierStoreError
from tierstore.ledger import Ledger
from tierstore.planning.classic import LRU
from tierstore.planning.policy import Policy
from tierstore.sizes import Size, parse_size
from tierstore.spec import TensorSpec


class Tier:
    """One level of a store: `name` for reports, `backend` for the bytes, `budget` in bytes or as a size string (None: no limit).

    The store that it is given to owns it and closes the backend.

    [Note: what a copy takes]
    Room for a value is reserved by what its tensor spans, since nobody knows before the writing what a compressing backend
    makes of it. Once it is written, the difference is given back, and that lower count is what leaves with it. So the ledger
    is never below what the backend holds, and equal to it whenever nothing is being written.
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
        self._stored: dict[str, int] = {}  # what copies take, where that is not what their tensors span

    def __repr__(self) -> str:
        return f"Tier({self.name!r}, {type(self.backend).__name__}, budget={self.ledger.budget})"

    def entries(self) -> Iterable[tuple[str, TensorSpec]]:
        """Yield key and spec of what the store finds there when it opens."""
        return self.backend.entries()

    def close(self) -> None:
        """Close the backend; called once, last."""
        self.backend.close()

    @property
    def memory(self) -> bool:
        """True if values are live tensors, lost when the process ends."""
        return isinstance(self.backend, MemoryBackend)

    @property
    def volatile(self) -> bool:
        """True if values are lost when the process ends."""
        return isinstance(self.backend, VolatileBackend)

    @property
    def writable(self) -> bool:
        """False if the backend only reads."""
        return not isinstance(self.backend, ReadOnlyBackend)

    @property
    def distant(self) -> bool:
        """True if a copy of what it holds is worth writing to a tier above it."""
        return isinstance(self.backend, DistantBackend)

    def takes(self, nbytes: int) -> bool:
        """True if the tier, were it empty, could be given a value of `nbytes`."""
        return self.writable and self.ledger.fits(nbytes)

    def written(self, key: str, reserved: int) -> None:
        """Give back what a copy, for which `reserved` bytes were reserved, turned out not to take."""
        if isinstance(self.backend, SizingBackend):
            self._stored[key] = self.backend.stored_bytes(key)
            self.ledger.release(reserved - self._stored[key])

    def found(self, key: str, nbytes: int) -> bool:
        """Reserve what a copy takes that was there when the tier was opened; False if that does not fit."""
        if isinstance(self.backend, SizingBackend):
            self._stored[key] = self.backend.stored_bytes(key)
        return self.ledger.reserve(self.taken(key, nbytes))

    def taken(self, key: str, nbytes: int) -> int:
        """Return what the ledger counts for a copy whose tensor spans `nbytes`."""
        return self._stored.get(key, nbytes)

    def held_bytes(self) -> int:
        """Return what everything takes that the backend lists."""
        backend = self.backend
        return sum(backend.stored_bytes(key) if isinstance(backend, SizingBackend) else spec.nbytes for key, spec in self.entries())

    def outdate(self, key: str, nbytes: int) -> None:
        """Keep count of a copy, whose tensor spans `nbytes`, as an outdated one."""
        self.stale[key] = self._stored.pop(key, nbytes)

    def dropped(self, key: str, nbytes: int) -> None:
        """Give back what a copy took that was deleted or replaced."""
        self.ledger.release(self._stored.pop(key, nbytes))

    def drop_stale(self, key: str) -> None:
        """Forget the outdated copy of `key`, whose bytes were already replaced or deleted."""
        nbytes = self.stale.pop(key, None)
        if nbytes is not None:
            self.ledger.release(nbytes)


def check_order(tiers: Sequence[Tier]) -> None:
    """Raise unless the tiers that only read come last, below one that takes what is fetched from them."""
    order = [tier.writable for tier in tiers]
    if not order[0] or order != sorted(order, reverse=True):
        readers = [tier.name for tier in tiers if not tier.writable]
        raise TierStoreError(f"tiers that only read ({readers}) come last, below at least one that takes values")
