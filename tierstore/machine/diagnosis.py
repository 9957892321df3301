"""Everything about this machine that decides how well a tiered model runs on it."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from tierstore.devices import working_accelerator
from tierstore.errors import BackendError
from tierstore.machine.disks import folder_speed
from tierstore.machine.installed import Extra, Installed, extras_of, installed_backends
from tierstore.machine.limits import Limit, memory_limits
from tierstore.machine.memory import copy_speed, upload_speed, weight_speed

OWN = "tierstore"


@dataclass(frozen=True, slots=True)
class Device:
    """Something that computes; `nbytes` is its memory where torch tells."""

    name: str
    works: bool
    nbytes: int | None


@dataclass(frozen=True, slots=True)
class Link:
    """A measured way of bytes, in bytes per second (None: it could not be measured, and `remark` says why)."""

    name: str
    rate: float | None
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found; `problems` are what should be put right, each with the way to do that."""

    versions: dict[str, str]
    devices: list[Device]
    backends: list[Installed]
    extras: list[Extra]
    limits: list[Limit]
    direct_io: bool | None
    links: list[Link]
    problems: list[str]


def diagnose(folder: Path | None) -> Diagnosis:
    """Look at the machine, and measure it for a few seconds; the disk only if a `folder` on it is given.

    What cannot be used, or measured, is told among the problems.
    """
    problems: list[str] = []
    backends = installed_backends()
    problems += [f"backend {backend.name}: {backend.problem}" for backend in backends if backend.problem]
    devices = _devices(problems)
    direct_io, links = _disk_links(folder, problems)
    return Diagnosis(
        _versions(), devices, backends, extras_of(OWN), memory_limits(), direct_io, [*links, *_memory_links(problems)], problems
    )  # fmt: skip


def _versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version(OWN)
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {"python": platform.python_version(), "torch": str(torch.__version__), OWN: own, "system": platform.platform()}


def _devices(problems: list[str]) -> list[Device]:
    devices = [Device(f"cpu ({torch.get_num_threads()} threads)", True, None)]
    named, working = torch.accelerator.current_accelerator(), working_accelerator()
    if named is None:
        return devices
    if working is None:
        problems.append(f"torch was built for {named}, and none works here; computing takes place on the CPU, or see to the driver")
        return [*devices, Device(str(named), False, None)]
    found = [torch.device(named.type, number) for number in range(torch.accelerator.device_count())]
    return [*devices, *(Device(str(device), True, _device_bytes(device)) for device in found)]


def _device_bytes(device: torch.device) -> int | None:
    """Return the memory of an accelerator, None for kinds of which torch does not tell."""
    properties = getattr(torch.get_device_module(device), "get_device_properties", None)
    total = getattr(properties(device), "total_memory", None) if properties is not None else None
    return None if total is None else int(total)


def _disk_links(folder: Path | None, problems: list[str]) -> tuple[bool | None, list[Link]]:
    """Return whether direct I/O is possible in `folder` (None: nobody knows), and how fast files there are read."""
    if folder is None:
        return None, [Link("disk->cpu", None, "give --disk DIR to measure it")]
    try:
        speed = folder_speed(folder)
    except BackendError as error:
        problems.append(str(error))
        return None, [Link("disk->cpu", None, "see the problems")]
    refused = "" if speed.device else "the file system refuses direct I/O, so reads fill the page cache"
    return speed.device is not None, [Link("disk->cpu", speed.device, refused), Link("page cache->cpu", speed.cached)]


def _memory_links(problems: list[str]) -> list[Link]:
    cpu = torch.device("cpu")
    links = [Link("cpu->cpu", copy_speed()), Link("weights through cpu", weight_speed(cpu), "one token, bfloat16")]
    device = working_accelerator()
    if device is None:
        return links
    try:
        links.append(Link(f"cpu->{device.type}", upload_speed(device)))
    except BackendError as error:
        problems.append(str(error))
        links.append(Link(f"cpu->{device.type}", None, "see the problems"))
    return [*links, Link(f"weights through {device.type}", weight_speed(device), "one token, bfloat16")]
