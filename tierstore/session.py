"""`tiered`: any model inside a byte budget per tier, for the length of a `with`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tierstore.backend import SourceBackend
from tierstore.building import (
    Disk,
    FastTier,
    GpuSize,
    choose_device,
    choose_devices,
    closing_on_failure,
    disk_tier,
    memory_tier,
    memory_tiers,
)
from tierstore.chain_opening import over_checkpoint_in_chain, tiered_in_chain
from tierstore.checkpoint.binding import Bound, bind
from tierstore.checkpoint.dividing import present
from tierstore.checkpoint.source import open_source
from tierstore.errors import ModelError, TierStoreError
from tierstore.parts import find_parts
from tierstore.patch.regions import check_model, check_modules
from tierstore.patch.watch import refuse_attached
from tierstore.planning.names import policy_factory
from tierstore.planning.policy import PolicyFactory
from tierstore.running import Tiered
from tierstore.sizes import Size
from tierstore.store import TieredStore
from tierstore.tier import Tier


@dataclass(frozen=True, slots=True)
class Budgets:
    """Where to compute, how much memory to use, and what leaves when it is short; `chain`: of each device, if there are several."""

    device: torch.device
    gpu: Size | None
    cpu: Size | None
    policy: str | PolicyFactory
    chain: tuple[FastTier, ...] = ()


def budgets_of(device: str | torch.device | None, gpu: GpuSize | None, cpu: Size | None, policy: str | PolicyFactory) -> Budgets:
    """Return what these arguments of `tiered` mean; raise `BackendError` for devices that there are not."""
    if isinstance(gpu, Mapping):
        chain = choose_devices(device, gpu)
        return Budgets(chain[0].device, None, cpu, policy, chain)
    return Budgets(choose_device(device, gpu), gpu, cpu, policy)


def tiered(
    model: object,
    *,
    gpu: GpuSize | None = None,
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

    `gpu={0: "8GiB", 1: "8GiB"}` gives each device, by its index, a fast tier of its own ("gpu:0", "gpu:1") and its share of the
    layers, in proportion to the sizes and in the order given; what is below is shared. Activations move from one device to
    the next by themselves, and results come back to where the inputs were. With `device="cpu"` all of these tiers are RAM.

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
        budgets = budgets_of(device, gpu, cpu, policy)
        if budgets.chain:
            return tiered_in_chain(models, budgets.chain, cpu, disk, policy, parts.holders)
        store = TieredStore(_tiers(budgets.device, budgets.gpu, cpu, disk), policy)
        return Tiered(models, store, budgets.device, holders=parts.holders)
    budgets = budgets_of(device, gpu, cpu, policy)
    source = open_source(checkpoint, disk)
    with closing_on_failure(source):
        bound = bind(_single(models), source, dtype)
    return over_checkpoint(models, source, bound, budgets, parts.holders)


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
    if budgets.chain:
        return over_checkpoint_in_chain(models, source, bound, budgets.chain, budgets.cpu, budgets.policy, holders)
    with closing_on_failure(source):
        tiers = _tiers(budgets.device, budgets.gpu, budgets.cpu, source)
        values = present(source, bound.recipes, tiers[0])
    stored = {identity: values[name] for identity, name in bound.names.items()}
    return Tiered(models, TieredStore(tiers, budgets.policy), budgets.device, stored, holders=holders)


def _single(models: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    if len(models) != 1:
        raise ModelError(f"checkpoint= is for one model, and {len(models)} were given; load the others first")
    return next(iter(models.values()))


def _tiers(device: torch.device, gpu: Size | None, cpu: Size | None, disk: Disk | None) -> list[Tier]:
    """Return the tiers that were asked for, fastest first; the first one is always memory of the compute device."""
    tiers = memory_tiers(device, gpu, cpu) or [memory_tier("cpu", device, None)]
    if disk is not None:
        tiers.append(disk_tier(disk))
    return tiers
