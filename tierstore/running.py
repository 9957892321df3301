"""A running session: a model under a store, until it is closed."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from tqdm import tqdm

from tierstore.building import GpuSize
from tierstore.errors import TierStoreError
from tierstore.parts import KeptDevices
from tierstore.patch.attach import Attachment
from tierstore.patch.regions import Region, StoredValue
from tierstore.report import forecast_of, render
from tierstore.sizes import Size, format_size, parse_size
from tierstore.stats import Stats
from tierstore.store import TieredStore


class Tiered:
    """A running session, made by `tiered`. Afterwards the model is as it was, with values as last written.

    `store` has all values; with several devices it is that of the first one: each has its own, see `stores`.
    """

    def __init__(
        self,
        models: Mapping[str, torch.nn.Module],
        store: TieredStore,
        device: torch.device,
        stored: Mapping[int, StoredValue] | None = None,
        *,
        holders: Iterable[object] = (),
    ) -> None:
        self.store = store
        self.device = device
        self._attachment = Attachment(store, device)
        self._open = True
        self._started = store.moves.engine.now()
        try:
            self._attachment.attach(models, progress, stored)
        except BaseException:
            self._open = False
            store.close(flush=False)
            raise
        self._devices = KeptDevices(holders, device)
        self._started = store.moves.engine.now()

    @property
    def attachments(self) -> Sequence[Attachment]:
        """The ties to each store; one lives as long as anything that needs its store."""
        return (self._attachment,)

    @property
    def stores(self) -> dict[str, TieredStore]:
        """The store of each device, by the name of its fast tier."""
        return {attachment.store.tiers[0].name: attachment.store for attachment in self.attachments}

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copy of a tiered model is plain and has no session."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __enter__(self) -> Self:
        self.store.moves.check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Restore the model and remove the scratch files. Closing twice is fine.

        Raises `TierStoreError` if some weights could not be brought back (no memory left, a disk that fails): those stay
        tiered and usable, and closing again tries them again.
        """
        if not self._open:
            return
        errors: list[TierStoreError] = []
        for attachment in self.attachments:
            try:
                attachment.detach()
            except TierStoreError as error:  # the other devices' weights come back all the same
                errors.append(error)
        if errors:
            raise errors[0]
        self._devices.restore()
        self._open = False
        for attachment in self.attachments:
            attachment.store.close(flush=False)

    @property
    def tier_map(self) -> dict[str, str]:
        """The tier of every parameter and buffer, by its name in the model."""
        return self._attachment.tier_map()

    def tier_of(self, name: str) -> str:
        """Return the fastest tier that holds the tensor called `name` in the model; raise `KeyError` if there is none."""
        places = self._attachment.tier_map()
        if name not in places:
            return self.store.tier_of(name)
        return places[name]

    def stats(self) -> Stats:
        """Return bytes per tier, traffic per link, hits, misses and stalls so far."""
        return self.store.stats()

    def report(self) -> str:
        """Return the same as a table to print."""
        forecast = forecast_of(self.store, self._started)
        return render(self.store.stats(), forecast, holds_all=self._attachment.holds_all, device=str(self.device))

    def timeline(self, file: str | os.PathLike[str]) -> None:
        """Write what moved when, what was waited for, and the bytes in each tier over time, for Perfetto or chrome://tracing.

        A file that ends in .png becomes a picture: which weights were in the fastest tier when, and how full each tier was.
        """
        self.store.timeline(file)

    def prefetch(self, module: torch.nn.Module) -> None:
        """Start to bring the weights of `module` into the fast tier, as far as there is room; returns at once."""
        for attachment in self.attachments:
            attachment.store.prefetch(attachment.keys_of(module))

    def offload(self, module: torch.nn.Module) -> None:
        """Take the weights of `module` out of the fast tier; they come back when they are used."""
        for attachment in self.attachments:
            attachment.release_held(module)
            attachment.store.offload(attachment.keys_of(module))

    def resize(self, *, gpu: GpuSize | None = None, cpu: Size | None = None) -> None:
        """Change budgets while running; weights that no longer fit leave at once."""
        for name, size in (("gpu", gpu), ("cpu", cpu)):
            if size is None:
                continue
            if isinstance(size, Mapping):
                raise TierStoreError(f"this session has one device; give resize({name}=...) a size")
            if name not in (tier.name for tier in self.store.tiers):
                raise TierStoreError(f"there is no tier called {name!r} to resize; it has {[t.name for t in self.store.tiers]}")
            budget = parse_size(size)
            if name == self.store.tiers[0].name and self.store.tiers[0].ledger.used > budget:
                self._attachment.release_held()
            self.store.resize(name, budget)

    def __repr__(self) -> str:
        return f"Tiered({', '.join(f'{t.name}={_shown(t.ledger.budget)}' for t in self.store.tiers)}, device={str(self.device)!r})"


def close_when_unused(session: Tiered) -> None:
    """Close the stores of a session that nobody has to close, once its models are gone; or when the process ends."""
    for attachment in session.attachments:
        weakref.finalize(attachment, _close, attachment.store)


def _close(store: TieredStore) -> None:
    """Close `store` from a finaliser, which may run in any thread: one of the store's own cannot wait for the others."""
    if threading.current_thread() is threading.main_thread():
        store.close(flush=False)
    else:
        threading.Thread(target=store.close, kwargs={"flush": False}).start()


def _shown(budget: int | None) -> str:
    return "unlimited" if budget is None else format_size(budget)


def progress(regions: Iterable[Region]) -> Iterable[Region]:
    bar: Iterable[Region] = tqdm(list(regions), desc="placing weights", unit="tensor", delay=1.0, leave=False)
    return bar
