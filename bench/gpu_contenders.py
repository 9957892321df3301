"""The contenders of `gpu_offload.py`: each sets a model up in its own way, told a budget for the weights on the device.

Each is set up as its documentation says is best for speed. All libraries but tierstore are imported where they are used,
because a contender's process must not load those of the others.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar

import torch
from gpu_device import Device
from gpu_models import Answer, Shape, made, shape_from
from offload_contenders import UnableError

from tierstore import tiered


@dataclass(frozen=True)
class Way:
    """How a contender is told its budget: the share of it that it is told, and a word on what else differs."""

    share: float = 1.0
    setting: str = ""

    @property
    def story(self) -> str:
        return f"told {self.share:.0%} of the budget" + (f", {self.setting}" if self.setting else "")


LESS = tuple(Way(share) for share in (1.0, 0.9, 0.75, 0.5))


@dataclass(frozen=True)
class Task:
    """What one child is told; `way` indexes the contender's ways; `ram` and `budget` in bytes, `allowances` by tokens."""

    action: str
    contender: str
    shape: Shape
    device: str
    place: str
    tokens: tuple[int, ...]
    budget: int = 0
    ram: int = 0
    way: int = 0
    allowances: dict[int, int] = field(default_factory=dict)

    def dumps(self) -> str:
        return json.dumps(vars(self) | {"shape": self.shape.told(), "allowances": list(self.allowances.items())})

    @classmethod
    def loads(cls, text: str) -> Task:
        told = json.loads(text)
        parts = {"shape": shape_from(told["shape"]), "tokens": tuple(told["tokens"]), "allowances": dict(told["allowances"])}
        return cls(**told | parts)

    def cap(self, tokens: int | None = None) -> int:
        """Return the bytes of the device that the child may use: for some tokens, or for the most demanding ones."""
        return self.budget + (self.allowances[tokens] if tokens is not None else max(self.allowances.values()))

    def expected(self, tokens: int) -> Path:
        return Path(self.place, f"expected-{self.shape.kind}-{tokens}.pt")


class Contender(ABC):
    """One way to run a model.

    `modules` are imported, `install` is how to get them. `capped`: it has to keep to a budget. `anywhere`: it runs without
    CUDA. `ways`: how it may be told the budget, the best one first; the first with which it does not run out of memory is
    used. `warm_ups`: passes before it is at its best. `lone`: its plan is for one number of tokens, so each gets a process.
    """

    modules: ClassVar[tuple[str, ...]] = ()
    install: ClassVar[str] = ""
    capped: ClassVar[bool] = True
    anywhere: ClassVar[bool] = True
    lone: ClassVar[bool] = False
    ways: ClassVar[tuple[Way, ...]] = (Way(),)
    warm_ups: int = 2

    @abstractmethod
    def start(self, task: Task, device: Device) -> Answer:
        """Set up and return what runs a pass."""

    def stop(self) -> None:  # noqa: B027  most have nothing to do
        """Undo what `start` did, where the process is to live on."""

    def carried(self) -> dict[str, int]:
        """Return the bytes that it says it has moved so far, by link; empty if it does not count."""
        return {}

    def rings(self) -> tuple[int, ...]:
        """Return the bytes that it plans to use for streaming, in each tier but the last; empty if unknown."""
        return ()

    def way(self, task: Task) -> Way:
        return self.ways[task.way]

    def told(self, task: Task) -> int:
        """Return the bytes that it is told it may use for weights."""
        return int(task.budget * self.way(task).share)

    @classmethod
    def missing(cls, device: str) -> str:
        """Say why it cannot run here at all; empty if it can."""
        if any(find_spec(module) is None for module in cls.modules):
            return f"not installed: pip install {cls.install}"
        if not cls.anywhere and torch.device(device).type == "cpu":
            return "needs CUDA"
        return ""


class Plain(Contender):
    """All weights on the device: the time of computing alone. A bound, no contender."""

    capped = False

    def start(self, task: Task, device: Device) -> Answer:
        return made(task.shape, device.torch)


class Tierstore(Contender):
    """`tiered(model, gpu=budget, cpu=the rest)`, and a disk if there is to be one."""

    warm_ups = 4

    def start(self, task: Task, device: Device) -> Answer:
        model = made(task.shape, torch.device("cpu"))
        disk = task.place if task.ram else None
        self.session = tiered(model, gpu=task.budget, cpu=task.ram or task.shape.bytes, disk=disk, device=device.torch)
        return model

    def stop(self) -> None:
        self.session.close()

    def carried(self) -> dict[str, int]:
        return {name: link.bytes for name, link in self.session.stats().links.items()}

    def rings(self) -> tuple[int, ...]:
        plans = (getattr(tier.policy, "plan", None) for tier in self.session.store.tiers[:-1])
        return tuple(plan.ring_bytes[0] if plan else 0 for plan in plans)


class AccelerateCpu(Contender):
    """`cpu_offload`, which keeps nothing. It is handed page-locked weights: it does not see to that, and gains by it."""

    modules, install, warm_ups = ("accelerate",), "accelerate", 1

    def start(self, task: Task, device: Device) -> Answer:
        from accelerate import cpu_offload

        model = made(task.shape, torch.device("cpu"), page_locked=device.torch.type == "cuda")
        return cpu_offload(model, device.torch)


class AccelerateMax(Contender):
    """`infer_auto_device_map(max_memory=...)` and `dispatch_model`: what fits stays, the rest as in `cpu_offload`, page-locked too."""

    modules, install, warm_ups, ways = ("accelerate",), "accelerate", 1, LESS

    def start(self, task: Task, device: Device) -> Answer:
        from accelerate import dispatch_model, infer_auto_device_map

        cuda = device.torch.type == "cuda"
        model = made(task.shape, torch.device("cpu"), page_locked=cuda)
        places = infer_auto_device_map(model, max_memory={0: self.told(task), "cpu": 2 * task.shape.bytes})
        if 0 not in places.values():
            raise UnableError("keeps none", "infer_auto_device_map keeps nothing on the device, so this would be accelerate-cpu")
        if cuda:
            return dispatch_model(model, places)
        places = {name: "cpu" if place == 0 else "disk" for name, place in places.items()}  # its fast tier, and what is left
        return dispatch_model(model, places, main_device="cpu", offload_dir=mkdtemp(dir=task.place))


class Diffusers(Contender):
    """Group offloading with a stream, which keeps nothing between passes, whatever the budget."""

    modules, install = ("diffusers", "accelerate"), "diffusers"
    level: ClassVar[str]
    recording: ClassVar[bool] = False

    def start(self, task: Task, device: Device) -> Answer:
        from diffusers.hooks import apply_group_offloading

        model = made(task.shape, torch.device("cpu"))
        stream = device.torch.type == "cuda"
        options: dict[str, Any] = {"use_stream": stream, "record_stream": stream and self.recording}
        if self.level == "block_level":
            above = task.shape.blocks.rpartition(".")[0]  # it looks for lists of blocks only in modules that are named
            options |= {"num_blocks_per_group": 1, "block_modules": [above] if above else None}
        apply_group_offloading(model, device.torch, torch.device("cpu"), offload_type=self.level, **options)
        return model


class DiffusersBlock(Diffusers):
    level = "block_level"


class DiffusersLeaf(Diffusers):
    level = "leaf_level"


class DiffusersBlockRecord(DiffusersBlock):
    recording = True


class DiffusersLeafRecord(DiffusersLeaf):
    recording = True


class Mmgp(Contender):
    """`offload.all` with page-locked weights, asynchronous transfers and a budget, and without its quantisation."""

    modules, install, anywhere, ways = ("mmgp",), "mmgp", False, LESS

    def start(self, task: Task, device: Device) -> Answer:
        from mmgp import offload

        model = made(task.shape, torch.device("cpu"))
        self.manager = offload.all(
            {"transformer": model},
            pinnedMemory=True,
            quantizeTransformer=False,
            convertWeightsFloatTo=None,
            budgets={"transformer": self.told(task) >> 20},  # MiB; a number instead of a dict is ignored by 3.8
            asyncTransfers=True,
            perc_reserved_mem_max=0.9,
            verboseLevel=1,
        )
        return model


class FlexTensor(Contender):
    """`flextensor.offload` of all modules, told the share of the device's memory that is its cap."""

    modules, install, anywhere, lone = ("flextensor",), "flextensor", False, True
    ways = (Way(), Way(1.0, "profiling by getters"), Way(0.9, "profiling by getters"), Way(0.75, "profiling by getters"))

    def start(self, task: Task, device: Device) -> Answer:
        import flextensor

        way, allowance = self.way(task), task.cap(task.tokens[0]) - task.budget
        config = flextensor.OffloadConfig(
            gpu_device=device.torch.index,
            include_patterns=list(task.shape.parts),
            max_gpu_mem_fraction=(self.told(task) + allowance) / device.memory()[1],
            min_blocks=2,
            profile_mode="getter" if way.setting else "view",
        )
        model = flextensor.offload(made(task.shape, torch.device("cpu")), config=config)
        passes = flextensor.get_offload_manager().iters_before_inference + 1
        self.warm_ups = max(self.warm_ups, -(-passes // task.shape.forwards) + 1)
        return model


CONTENDERS: dict[str, type[Contender]] = {
    "plain": Plain,
    "tierstore": Tierstore,
    "accelerate-cpu": AccelerateCpu,
    "accelerate-max": AccelerateMax,
    "diffusers-block": DiffusersBlock,
    "diffusers-block-record": DiffusersBlockRecord,
    "diffusers-leaf": DiffusersLeaf,
    "diffusers-leaf-record": DiffusersLeafRecord,
    "mmgp": Mmgp,
    "flextensor": FlexTensor,
}
PEERS = tuple(name for name in CONTENDERS if name not in ("plain", "tierstore"))
QUICK = ("accelerate-max", "diffusers-block-record", "diffusers-leaf-record", "mmgp", "flextensor")
