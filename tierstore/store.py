"""One get/put over any number of tiers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

import torch

from tierstore.backend import VolatileBackend
from tierstore.building import durable_tiers
from tierstore.checksum import Verify
from tierstore.entry import Entry
from tierstore.errors import BudgetError, ClosedError, ReadOnlyError, TierStoreError
from tierstore.lease import Lease
from tierstore.picture import draw
from tierstore.planning.names import policy_factory
from tierstore.planning.plan import Plan
from tierstore.planning.policy import Foresight, PolicyFactory
from tierstore.planning.schedule import FROM_FILES, TO_DEVICE
from tierstore.sizes import Size, parse_size
from tierstore.spec import TensorSpec
from tierstore.stats import Stats, TierStats
from tierstore.tier import Tier, check_order
from tierstore.transfer.engine import Engine
from tierstore.transfer.streams import engine_for
from tierstore.writing import Moves


class TieredStore:
    """Keeps tensors by key in `tiers`, fastest first, each inside its byte budget.

    `get` and `lease` bring a value into the first tier; what has to leave goes one tier down, or is dropped where a slower
    tier still holds the same bytes. What an earlier process left in a persistent tier is found again on opening.
    Thread-safe; the one lock is released around every transfer.
    """

    def __init__(self, tiers: Sequence[Tier], policy: str | PolicyFactory = "lru", engine: Engine | None = None) -> None:
        if not tiers:
            raise TierStoreError("a store needs at least one tier")
        names = [tier.name for tier in tiers]
        if len(set(names)) < len(names):
            raise TierStoreError(f"tier names must differ, got {names}")
        check_order(tiers)
        engine = engine_for(tiers[0].backend) if engine is None else engine
        make_policy = policy_factory(policy, cost=FROM_FILES if engine.computes_now else TO_DEVICE)
        for tier in tiers:
            tier.policy = make_policy()
            if isinstance(tier.policy, Foresight):
                tier.policy.budget(tier.ledger.budget)
                if engine.computes_now:
                    tier.policy.timed(engine.now)
        self._moves = Moves(tiers, engine)
        self._lock = self._moves.lock
        self._background: ThreadPoolExecutor | None = None
        try:
            for level in range(len(tiers)):
                self._find_stored(level)
        except BaseException:
            for tier in tiers:
                tier.close()
            raise

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, gpu: Size | None = None, cpu: Size | None = None,
        device: str | torch.device | None = None, policy: str | PolicyFactory = "lru", verify: Verify = "first",
    ) -> TieredStore:  # fmt: skip
        """Open the store that lasts in the directory `path`, made if need be, below tiers of memory of the sizes given.

        What is in memory only is written down when it leaves, by `flush`, and by `close`; without any size `put` returns when
        the value is on the device, and `get` gives a private map of its file. `verify`: when stored bytes are checked.
        """
        return cls(durable_tiers(path, gpu, cpu, device, verify), policy)

    # -- values -------------------------------------------------------------------------------------------------

    def put(self, key: str, tensor: torch.Tensor) -> None:
        """Store a copy of `tensor` under `key`, replacing an older value, in the fastest tier that can take it.

        Raises `BudgetError` if no tier can, and leaves the older value in place when it fails.
        """
        self._moves.put(key, tensor, evict=True)

    def fill(self, key: str, tensor: torch.Tensor, fastest: int = 0) -> None:
        """Like `put`, into the fastest tier with free room, from the one at level `fastest` on: nothing is evicted while a
        slower tier has room.
        """
        self._moves.put(key, tensor, evict=False, fastest=fastest)

    def get(self, key: str) -> torch.Tensor:
        """Return the value of `key`, brought into the fastest tier.

        The tensor is the store's own memory: read it; to change a value use `put`, or write inside a `lease` and call
        `changed`. Raises `KeyError` if there is none, `BudgetError` if it can never be resident.
        """
        moves = self._moves
        with self._lock:
            entry = moves.entry(key)
            if entry.tensor is not None and entry.ready is None and not entry.busy:
                moves.engine.computing()
                moves.counters.hits += 1
                moves.tiers[0].policy.access(key)
                tensor = entry.tensor
                moves.pump()
                return tensor
            moves.acquire([entry], "get", passing=True)
            if entry.tensor is not None:
                tensor = entry.tensor
                moves.release([entry], passing=True)
                return tensor
        try:
            return moves.tiers[0].backend.get(key)
        finally:
            with self._lock:
                moves.release([entry], passing=True)

    def lease(self, *keys: str) -> Lease:
        """Return a context manager: inside, the values are resident and stay so; it yields them in the order of `keys`.

        Raises `BudgetError` before anything moves if they do not fit into the fastest tier together.
        """
        return Lease(self._moves, keys)

    def changed(self, key: str) -> None:
        """Tell the store that the resident value of `key` was written in place; call it before the lease ends."""
        with self._lock:
            entry = self._moves.entry(key)
            if entry.tensor is None or not entry.leases:
                raise TierStoreError(f"{key!r} is not leased; call changed() inside the lease in which it was written, or use put")
            self._moves.outdate(entry)

    def __delitem__(self, key: str) -> None:
        with self._lock:
            entry = self._moves.idle_entry(key)
            if entry.leases:
                raise TierStoreError(f"{key!r} is leased; delete it after the lease has ended")
            self._check_deletable(entry)
            for tier in self._moves.tiers:  # stale copies first: the value must not outlive its end in an older version
                if key in tier.stale:
                    self._moves.delete_stale(tier, key)
            for level in sorted(entry.tiers):
                self._moves.drop(entry, level)
            del self._moves.entries[key]

    def _check_deletable(self, entry: Entry) -> None:
        for level, tier in enumerate(self._moves.tiers):
            if not tier.writable and (level in entry.tiers or entry.key in tier.stale):
                raise ReadOnlyError(f"{entry.key!r} cannot be deleted: tier {tier.name!r} has it, and only reads")

    def __contains__(self, key: object) -> bool:
        with self._lock:
            self._moves.check_open()
            return isinstance(key, str) and key in self._moves.entries and bool(self._moves.entries[key].tiers)

    def __len__(self) -> int:
        with self._lock:
            self._moves.check_open()
            return sum(bool(entry.tiers) for entry in self._moves.entries.values())

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            self._moves.check_open()
            return iter([key for key, entry in self._moves.entries.items() if entry.tiers])

    # -- placement ----------------------------------------------------------------------------------------------

    def prefetch(self, keys: str | Iterable[str]) -> Future[None]:
        """Bring values into the fastest tier in the background, as far as room can be made without waiting.

        A hint: what does not fit is left where it is. The future tells when it is done; nobody has to wait for it.
        """
        names = [keys] if isinstance(keys, str) else list(keys)  # outside the lock: a generator may ask this store
        with self._lock:
            entries = [self._moves.entry(key) for key in names]
            if self._background is None:
                self._background = ThreadPoolExecutor(1, thread_name_prefix="tierstore-prefetch")
            return self._background.submit(self._prefetch, entries)

    def offload(self, keys: str | Iterable[str]) -> None:
        """Take values out of the fastest tier, writing down what only lies there; leased ones, and those being read, stay."""
        names = [keys] if isinstance(keys, str) else list(keys)  # outside the lock: a generator may ask this store
        with self._lock:
            for key in names:
                entry = self._moves.idle_entry(key)
                if entry.resident and not entry.leases and self._moves.withdraw(entry) and not self._moves.evict(entry, 0):
                    raise self._moves.no_room(f"offloading {entry.key!r}", entry.nbytes)

    def resize(self, tier: str, budget: Size | None) -> None:
        """Change the budget of a tier to `budget` (None: no limit), evicting at once what no longer fits.

        Raises `BudgetError`, with the old budget kept, if leased entries alone exceed it.
        """
        budget = None if budget is None else parse_size(budget)
        names = [t.name for t in self._moves.tiers]
        if tier not in names:
            raise TierStoreError(f"no tier is called {tier!r}; give one of {names}")
        with self._lock:
            self._moves.check_open()
            level = names.index(tier)
            ledger = self._moves.tiers[level].ledger
            before = ledger.budget, ledger.aside
            ledger.budget, ledger.aside = budget, 0
            try:
                fits = budget is None or self._moves.make_room(level, 0)
            except BaseException:
                ledger.budget, ledger.aside = before
                raise
            if not fits:
                ledger.budget, ledger.aside = before
                raise BudgetError(
                    f"shrinking to {budget} bytes", tier=tier, required_bytes=ledger.used, budget_bytes=budget or 0,
                    hint="release leases first, or give the tiers below more room",
                )  # fmt: skip
            backend, policy = self._moves.tiers[level].backend, self._moves.tiers[level].policy
            if isinstance(backend, VolatileBackend):
                backend.trim()
            if isinstance(policy, Foresight):
                policy.budget(budget)
            self._moves.wake()

    def tier_of(self, key: str) -> str:
        """Return the name of the fastest tier that holds the value of `key`."""
        with self._lock:
            return self._moves.tiers[min(self._moves.entry(key).tiers)].name

    def spec_of(self, key: str) -> TensorSpec:
        """Return dtype, shape and stride of the value of `key`, without moving it."""
        with self._lock:
            return self._moves.entry(key).spec

    @property
    def tiers(self) -> tuple[Tier, ...]:
        return tuple(self._moves.tiers)

    @property
    def moves(self) -> Moves:
        """The core below this store, for layers that lease entries without names."""
        return self._moves

    def stats(self) -> Stats:
        """Return a snapshot of bytes per tier, traffic per link, hits, misses and stalls."""
        with self._lock:
            self._moves.catch_up()
            tiers, counters = self._moves.tiers, self._moves.counters
            return Stats(
                tiers={tier.name: self._tier_stats(level, tier) for level, tier in enumerate(tiers)},
                links={f"{a.name}->{b.name}": counters.link(i, j) for i, a in enumerate(tiers) for j, b in enumerate(tiers) if i != j},
                hits=counters.hits,
                misses=counters.misses,
                evictions=counters.evictions,
                stall_seconds=counters.stall_seconds + self._moves.engine.stall_seconds(),
            )

    # -- the end ------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write every value to the last tier that takes values, so that opening it again finds all of them.

        Nothing leaves the faster tiers. What a tier below holds, which only reads, is as safe there.
        """
        with self._lock:
            self._moves.check_open()
            self._moves.flush()

    def close(self, *, flush: bool | None = None) -> None:
        """Flush (by default if the last tier outlives the process), then close every backend. Closing twice is fine."""
        if self._moves.closed:
            return
        background, self._background = self._background, None
        if background is not None:
            background.shutdown(wait=True, cancel_futures=True)
        if flush if flush is not None else not self._moves.tiers[self._moves.home].volatile:
            with suppress(ClosedError):  # another thread was faster
                self.flush()
        with self._lock:
            if not self._moves.close():
                return
        self._moves.engine.close()
        for tier in self._moves.tiers:
            tier.close()

    def timeline(self, file: str | os.PathLike[str]) -> None:
        """Write what moved when, what was waited for, and the bytes in each tier over time, for Perfetto or chrome://tracing.

        A file that ends in .png becomes a picture: which values were in the fastest tier when, and how full each tier was.
        """
        tiers = self._moves.tiers
        with self._lock:
            if os.fspath(file).lower().endswith(".png"):
                draw(self._moves.timeline, [tier.name for tier in tiers], [tier.ledger.budget for tier in tiers], file)
            else:
                self._moves.timeline.write(file, [tier.name for tier in tiers])

    @property
    def plan(self) -> Plan | None:
        """What the policy of the fastest tier keeps and streams now; None if it has made no plan."""
        policy = self._moves.tiers[0].policy
        return policy.plan if isinstance(policy, Foresight) else None

    def __enter__(self) -> TieredStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TieredStore({', '.join(map(repr, self._moves.tiers))})"

    # -- inside -------------------------------------------------------------------------------------------------

    def _find_stored(self, level: int) -> None:
        """Take over what a persistent tier held before; a faster tier's value is the newer one."""
        tier = self._moves.tiers[level]
        for key, spec in tier.entries():
            if not tier.found(key, spec.nbytes):
                raise BudgetError(
                    f"opening what {tier.name!r} already holds", tier=tier.name,
                    required_bytes=tier.held_bytes(), budget_bytes=tier.ledger.budget or 0,
                )  # fmt: skip
            if key in self._moves.entries:
                tier.outdate(key, spec.nbytes)
                continue
            entry = self._moves.entries[key] = Entry(key, spec)
            self._moves.added(entry, level)

    def _prefetch(self, entries: list[Entry]) -> None:
        for entry in entries:
            with self._lock:
                if self._moves.closed:
                    return
                flight = self._moves.fetch(entry) if self._moves.entries.get(entry.key) is entry else None
                while flight is not None and not flight.done:
                    self._moves.pause()
                if flight is not None and flight.error is not None:
                    raise flight.error

    def _tier_stats(self, level: int, tier: Tier) -> TierStats:
        ledger = tier.ledger
        count = sum(level in entry.tiers for entry in self._moves.entries.values())
        return TierStats(ledger.budget, ledger.used, ledger.peak, count, ledger.aside)
