"""How fast the links of a plan are: as they are told, or measured here where the device is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tierstore.devices import compute_device, working_accelerator
from tierstore.errors import BackendError
from tierstore.machine.disks import files_speed, folder_speed
from tierstore.machine.memory import copy_speed, upload_speed, weight_speed
from tierstore.outlook.forecast import DISK, Rooms, Speeds


@dataclass(frozen=True, slots=True)
class Told:
    """What the user says: bytes per second from the disk, and into the accelerator (None: to be measured).

    The disk that is measured is that of `folder`, or that of the checkpoint if there is none. `device` computes; None stands
    for an accelerator if the plan has a tier "gpu", and for the CPU if not.
    """

    disk: float | None = None
    gpu: float | None = None
    folder: Path | None = None
    device: str | None = None


def find_speeds(rooms: Rooms, told: Told, files: Sequence[Path], dtype: torch.dtype) -> tuple[Speeds, list[str]]:
    """Return the speed of each link and of computing, and remarks on what is not known; `files` are those of the checkpoint.

    Raises `BackendError` for a device or a folder that was named and cannot be used.
    """
    remarks: list[str] = []
    device = _device(rooms, told, remarks)
    disk = told.disk if told.disk is not None else _disk(told, files, remarks)
    upload = told.gpu if told.gpu is not None else _upload(rooms, device, remarks)
    links = {link: _rate(link, upload, disk) for link in rooms.links}
    return Speeds(links, None if device is None else weight_speed(device, dtype)), remarks


def _device(rooms: Rooms, told: Told, remarks: list[str]) -> torch.device | None:
    """Return what computes, None for an accelerator that is not here."""
    if rooms.divided:
        return torch.device("cpu")
    device = compute_device(told.device) if told.device is not None else working_accelerator()
    if device is None:
        remarks.append("no accelerator works here, so computing is left out of the seconds")
    return device


def _disk(told: Told, files: Sequence[Path], remarks: list[str]) -> float | None:
    found = folder_speed(told.folder).device if told.folder is not None else files_speed(files)
    if found is None:
        where = told.folder or "the checkpoint (it is too small, or its file system refuses direct I/O)"
        remarks.append(f"the disk of {where} could not be measured; give --disk-bandwidth, or --disk DIR")
    return found


def _upload(rooms: Rooms, device: torch.device | None, remarks: list[str]) -> float | None:
    """Measure the link into the fast tier, if there is one that is not the disk's."""
    if rooms.divided:
        return copy_speed() if len(rooms.nbytes) > 1 else None
    if device is None:
        remarks.append("the link into the accelerator could not be measured here; give --gpu-bandwidth")
        return None
    try:
        return upload_speed(device)
    except BackendError as error:
        remarks.append(f"{error}; give --gpu-bandwidth")
        return None


def _rate(link: str, upload: float | None, disk: float | None) -> float | None:
    """Return the speed of a link: what comes from the disk into the accelerator is as slow as the slower of both."""
    source, target = link.split("->")
    if source != DISK:
        return upload
    if target == "gpu":
        return None if disk is None else (disk if upload is None else min(disk, upload))
    return disk
