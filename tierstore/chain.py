"""A model on several devices: a store for each of them over common tiers, and one session over all. See the note in `sharing`."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from tierstore.building import GpuSize
from tierstore.errors import MissingKeyError, TierStoreError
from tierstore.parts import KeptDevices
from tierstore.patch.attach import Attachment
from tierstore.patch.chain import attach_all
from tierstore.patch.regions import StoredValue, named_tensors
from tierstore.patch.shares import Shares
from tierstore.report import forecast_of, outlook, render
from tierstore.running import Tiered, progress
from tierstore.sharing import Common, divided
from tierstore.sizes import Size, parse_size
from tierstore.stats import LinkStats, Stats
from tierstore.store import TieredStore

Models = Mapping[str, torch.nn.Module]


class Chain(NamedTuple):
    """The stores of several devices in the order of their shares, what they have in common, and the parts of the model."""

    stores: list[TieredStore]
    devices: list[torch.device]
    commons: list[Common]
    shares: Shares

    def close(self) -> None:
        """Close every store; backends in common go with the last."""
        for store in self.stores:
            store.close(flush=False)


class ChainTiered(Tiered):
    """A session over several devices. `store` is that of the first one, `stores` has all; statistics and names are of all together."""

    def __init__(
        self,
        models: Models,
        chain: Chain,
        stored: Mapping[int, StoredValue] | None = None,
        *,
        others: Container[str] = (),
        holders: Iterable[object] = (),
    ) -> None:
        self._chain = chain
        self.store, self.device = chain.stores[0], chain.devices[0]
        self._models = dict(models)
        self._open = False
        try:
            pairs = list(zip(chain.stores, chain.devices, strict=True))
            self._attachments = attach_all(pairs, models, chain.shares, progress, stored, others)
        except BaseException:
            chain.close()
            raise
        self._open = True
        self._attachment = self._attachments[0]
        self._devices = KeptDevices(holders, self.device)
        self._started = self.store.moves.engine.now()

    @property
    def attachments(self) -> Sequence[Attachment]:
        return tuple(self._attachments)

    @property
    def tier_map(self) -> dict[str, str]:
        found = {name: tier for attachment in self._attachments for name, tier in attachment.tier_map().items()}
        return {name: found[name] for name, _ in named_tensors(self._models) if name in found}

    def tier_of(self, name: str) -> str:
        places = self.tier_map
        if name in places:
            return places[name]
        for store in self._chain.stores:
            with suppress(MissingKeyError):
                return store.tier_of(name)
        raise MissingKeyError(f"no tensor or entry is called {name!r}")

    def stats(self) -> Stats:
        return merged([store.stats() for store in self._chain.stores], self._chain.commons)

    def report(self) -> str:
        held = all(attachment.holds_all for attachment in self._attachments)
        text = render(self.stats(), holds_all=held, device=", ".join(dict.fromkeys(map(str, self._chain.devices))))
        for name, store in self.stores.items():
            forecast = forecast_of(store, self._started)
            if forecast is not None:
                text += "".join(f"{name}: {line}\n" for line in outlook(store.stats(), forecast))
        return text

    def timeline(self, file: str | os.PathLike[str]) -> None:
        """The same, with a process for each device. Of a picture there is one for each device, with its tier's name in the file's."""
        path = Path(file)
        if path.suffix.lower() == ".png":
            for name, store in self.stores.items():
                store.timeline(path.with_stem(f"{path.stem}-{name.replace(':', '-')}"))
            return
        events = []
        for number, (name, store) in enumerate(self.stores.items(), 1):
            events.append({"name": "process_name", "ph": "M", "pid": number, "args": {"name": name}})
            with store.moves.lock:
                events += [event | {"pid": number} for event in store.moves.timeline.events([tier.name for tier in store.tiers])]
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def resize(self, *, gpu: GpuSize | None = None, cpu: Size | None = None) -> None:
        """Change budgets while running, as in `resize(gpu={1: "4GiB"})`; weights that no longer fit leave at once.

        What there is of RAM is divided anew among the devices.
        """
        budgets = self._new_budgets(gpu)
        ram = next((common for common in self._chain.commons if common.name == "cpu"), None)
        if cpu is not None and ram is None:
            raise TierStoreError(f"there is no tier called 'cpu' to resize; there are {list(self.stats().tiers)}")
        total = None if cpu is None else parse_size(cpu)
        before = {name: store.tiers[0].ledger.budget or 0 for name, store in self.stores.items() if name in budgets}
        try:
            self._resize_fast(budgets)
            if ram is not None:
                redivide(ram, self._chain, (ram.pool.budget or 0) if total is None else total)
        except BaseException:
            self._resize_fast(before)
            raise

    def _resize_fast(self, budgets: Mapping[str, int]) -> None:
        for attachment in self._attachments:
            fast = attachment.store.tiers[0]
            if fast.name in budgets:
                if fast.ledger.used > budgets[fast.name]:
                    attachment.release_held()
                attachment.store.resize(fast.name, budgets[fast.name])

    def _new_budgets(self, gpu: GpuSize | None) -> dict[str, int]:
        """Return the budgets asked for by the names of tiers; `TierStoreError` for a device that has none."""
        if gpu is None:
            return {}
        if not isinstance(gpu, Mapping):
            raise TierStoreError(f"there are several devices ({list(self.stores)}); give resize(gpu={{0: ...}}) with their indices")
        unknown = [index for index in gpu if f"gpu:{index}" not in self.stores]
        if unknown:
            raise TierStoreError(f"resize: no device has the index {unknown[0]!r} here; there are {list(self.stores)}")
        return {f"gpu:{index}": parse_size(size) for index, size in gpu.items()}

    def __repr__(self) -> str:
        return f"Tiered({', '.join(f'{name}={tier.budget_bytes}' for name, tier in self.stats().tiers.items())})"


def merged(parts: Sequence[Stats], commons: Iterable[Common]) -> Stats:
    """Return the statistics of several stores as one: each fast tier, then what is common; links of one name are summed."""
    fast = {next(iter(part.tiers)): next(iter(part.tiers.values())) for part in parts}
    tiers = fast | {common.name: common.stats(sum(part.tiers[common.name].entries for part in parts)) for common in commons}
    links: dict[str, LinkStats] = {}
    for part in parts:
        for name, link in part.links.items():
            links[name] = links[name] + link if name in links else link
    return Stats(
        tiers,
        links,
        hits=sum(part.hits for part in parts),
        misses=sum(part.misses for part in parts),
        evictions=sum(part.evictions for part in parts),
        stall_seconds=sum(part.stall_seconds for part in parts),
    )


def redivide(ram: Common, chain: Chain, total: int) -> None:
    """Give each store its part of `total` bytes of RAM; if weights cannot leave, `BudgetError`, and the parts are as they were."""
    budgets = [store.tiers[0].ledger.budget or 0 for store in chain.stores]
    parts = divided(total, chain.shares.lacking(budgets), [part.nbytes for part in chain.shares.parts])
    before = [store.tiers[1].ledger.budget or 0 for store in chain.stores]
    order = sorted(range(len(parts)), key=lambda place: parts[place] - before[place])  # who gives comes first
    if total > (ram.pool.budget or 0):
        ram.pool.budget = total
    done: list[int] = []
    try:
        for place in order:
            chain.stores[place].resize(ram.name, parts[place])
            done.append(place)
    except BaseException:
        for place in reversed(done):
            chain.stores[place].resize(ram.name, before[place])
        ram.pool.budget = sum(before)
        raise
    ram.pool.budget = total
