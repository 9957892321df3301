"""`tiered`: any model inside a byte budget per tier, for the length of a `with`."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from tqdm import tqdm

from tierstore.backend import Backend, SourceBackend
from tierstore.building import choose_device, memory_tier, memory_tiers
from tierstore.checkpoint.binding import Bound, bind
from tierstore.checkpoint.dividing import present
from tierstore.checkpoint.source import open_source
from tierstore.errors import ModelError, TierStoreError
from tierstore.parts import KeptDevices, find_parts
from tierstore.patch.attach import Attachment
from tierstore.patch.regions import Region, StoredValue, check_model, check_modules
from tierstore.patch.watch import refuse_attached
from tierstore.planning.names import policy_factory
from tierstore.planning.policy import PolicyFactory
from tierstore.registry import backend_class, open_url
from tierstore.report import forecast_of, render
from tierstore.sizes import Size, format_size, parse_size
from tierstore.stats import Stats
from tierstore.store import TieredStore
from tierstore.tier import Tier

Disk = str | os.PathLike[str] | Backend | tuple[str | os.PathLike[str] | Backend, Size]


@dataclass(frozen=True, slots=True)
class Budgets:
    """Where to compute, how much memory to use, and what leaves when it is short."""

    device: torch.device
    gpu: Size | None
    cpu: Size | None
    policy: str | PolicyFactory


def tiered(
    model: object,
    *,
    gpu: Size | None = None,
    cpu: Size | None = None,
    disk: Disk | None = None,
    device: str | torch.device | None = None,
    policy: str | PolicyFactory = "auto",
    train: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Tiered:
    """Run `model` with its weights in tiers, each inside its byte budget; use as a context manager, or call `.close()`.

    `model`: a module, or a list or dict of modules that share the budgets, or an object that holds modules, such as a
    pipeline: those in its `components`, else those among its attributes; names in `tier_map` begin with theirs.

    `gpu`, `cpu`: sizes (`"8GiB"`, bytes, or None: that tier is left out, except that the computing tier is unlimited when no
    size is given at all). `disk`: a directory for scratch files, a `(directory, size)` pair, a URL for scratch objects, or a
    `Backend`. `device`: where to compute; by default the accelerator if one works, else the CPU. The tier called `gpu` is
    memory of that device, also when it is the CPU.

    `checkpoint`: the directory, file or URL whose tensors are the weights of a model on the meta device, found by name and
    used where they lie; `dtype` casts them on the way up. What is written goes to `disk`, or beside the checkpoint. Such a
    model has real values afterwards: private maps of the checkpoint's files, or of scratch where they had to be computed.

    Values, gradients and random numbers are those of the plain model. Raises `BudgetError`, `ModelError`, `BackendError`,
    `CheckpointError` or `ValueError` before the model is touched.
    """
    _reject_unbuilt(train=train, checkpoint=checkpoint, dtype=dtype)
    policy_factory(policy)
    parts = find_parts(model)
    models = parts.modules
    check_modules(models)
    refuse_attached(models)
    if checkpoint is None:
        check_model(models)
        compute = choose_device(device, gpu)
        return Tiered(models, TieredStore(_tiers(compute, gpu, cpu, disk), policy), compute, holders=parts.holders)
    budgets = Budgets(choose_device(device, gpu), gpu, cpu, policy)
    source = open_source(checkpoint, disk)
    with closing_on_failure(source):
        bound = bind(_single(models), source, dtype)
    return over_checkpoint(models, source, bound, budgets, parts.holders)


class Tiered:
    """A running session, made by `tiered`. Afterwards the model is as it was, with values as last written."""

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
            self._attachment.attach(models, _progress, stored)
        except BaseException:
            self._open = False
            store.close(flush=False)
            raise
        self._devices = KeptDevices(holders, device)
        self._started = store.moves.engine.now()

    @property
    def lifetime(self) -> object:
        """What lives as long as anything that needs the store."""
        return self._attachment

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copy of a tiered model is plain and has no session."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __enter__(self) -> Tiered:
        self.store.moves.check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Restore the model and remove the scratch files. Closing twice is fine.

        Raises `TierStoreError` if some weights could not be brought back (no memory left, a disk that fails): those stay
        tiered and usable, and closing again tries them again.
        """
        if self._open:
            self._attachment.detach()
            self._devices.restore()
            self._open = False
            self.store.close(flush=False)

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
        self.store.prefetch(self._attachment.keys_of(module))

    def offload(self, module: torch.nn.Module) -> None:
        """Take the weights of `module` out of the fast tier; they come back when they are used."""
        self._attachment.release_held(module)
        self.store.offload(self._attachment.keys_of(module))

    def resize(self, *, gpu: Size | None = None, cpu: Size | None = None) -> None:
        """Change budgets while running; weights that no longer fit leave at once."""
        for name, size in (("gpu", gpu), ("cpu", cpu)):
            if size is None:
                continue
            if name not in (tier.name for tier in self.store.tiers):
                raise TierStoreError(f"there is no tier called {name!r} to resize; it has {[t.name for t in self.store.tiers]}")
            budget = parse_size(size)
            if name == self.store.tiers[0].name and self.store.tiers[0].ledger.used > budget:
                self._attachment.release_held()
            self.store.resize(name, budget)

    def __repr__(self) -> str:
        return f"Tiered({', '.join(f'{t.name}={_shown(t.ledger.budget)}' for t in self.store.tiers)}, device={str(self.device)!r})"


def close_when_unused(session: Tiered) -> None:
    """Close the store of a session that nobody has to close, once its models are gone; or when the process ends."""
    weakref.finalize(session.lifetime, _close, session.store)


def _close(store: TieredStore) -> None:
    """Close `store` from a finaliser, which may run in any thread: one of the store's own cannot wait for the others."""
    if threading.current_thread() is threading.main_thread():
        store.close(flush=False)
    else:
        threading.Thread(target=store.close, kwargs={"flush": False}).start()


def _shown(budget: int | None) -> str:
    return "unlimited" if budget is None else format_size(budget)


def _progress(regions: Iterable[Region]) -> Iterable[Region]:
    bar: Iterable[Region] = tqdm(list(regions), desc="placing weights", unit="tensor", delay=1.0, leave=False)
    return bar


def _reject_unbuilt(*, train: bool, checkpoint: object, dtype: object) -> None:
    if train:
        raise TierStoreError("train=True (gradients and optimizer state in tiers) is not available yet; ordinary training works without it")
    if dtype is not None and checkpoint is None:
        raise TierStoreError("dtype= casts the weights of a checkpoint= on the way up; without one, cast the model first (model.to(dtype))")


def over_checkpoint(
    models: Mapping[str, torch.nn.Module], source: SourceBackend, bound: Bound, budgets: Budgets, holders: Iterable[object] = ()
) -> Tiered:
    """Start a session whose last tier is `source`, which has the values of the tensors that `bound` says."""
    with closing_on_failure(source):
        check_model(models, bound.names)
        tiers = _tiers(budgets.device, budgets.gpu, budgets.cpu, source)
        values = present(source, bound.recipes, tiers[0])
    stored = {identity: values[name] for identity, name in bound.names.items()}
    return Tiered(models, TieredStore(tiers, budgets.policy), budgets.device, stored, holders=holders)


@contextmanager
def closing_on_failure(backend: Backend) -> Iterator[None]:
    try:
        yield
    except BaseException:
        backend.close()
        raise


def _single(models: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    if len(models) != 1:
        raise ModelError(f"checkpoint= is for one model, and {len(models)} were given; load the others first")
    return next(iter(models.values()))


def _tiers(device: torch.device, gpu: Size | None, cpu: Size | None, disk: Disk | None) -> list[Tier]:
    """Return the tiers that were asked for, fastest first; the first one is always memory of the compute device."""
    tiers = memory_tiers(device, gpu, cpu) or [memory_tier("cpu", device, None)]
    if disk is not None:
        tiers.append(_disk_tier(disk))
    return tiers


def _disk_tier(disk: Disk) -> Tier:
    place, size = disk if isinstance(disk, tuple) else (disk, None)
    budget = None if size is None else parse_size(size)
    if isinstance(place, Backend):
        return Tier("disk", place, budget)
    text = os.fspath(place)
    if "://" not in text:
        return Tier("disk", backend_class("disk").scratch(Path(text)), budget)  # type: ignore[attr-defined]
    return Tier("disk", open_url(text), budget)
