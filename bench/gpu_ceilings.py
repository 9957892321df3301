"""What the links deliver at best: copies between page-locked RAM and the device in chunks, and direct reads of a file."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gpu_device import Device, Run
from raw_speed import RawReader
from torch import Tensor

CHUNKS = tuple(1 << power for power in (20, 22, 24, 26, 28))  # bytes
ROUNDS = 3


@dataclass
class Ceilings:
    """Bytes per second. Of the links by chunk size; `both`: each direction while the other one is busy too.

    `disk` has one figure for each time the file was read; it is empty if that failed, and `trouble` says why.
    """

    facts: dict[str, str] = field(default_factory=dict)
    h2d: list[tuple[int, float]] = field(default_factory=list)
    d2h: list[tuple[int, float]] = field(default_factory=list)
    both: list[tuple[int, float]] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    free: int = 0
    trouble: str = ""

    @property
    def best(self) -> float:
        """The rate to the device that bounds are made of."""
        return max(rate for _, rate in self.h2d)

    @property
    def disk_best(self) -> float | None:
        return max(self.disk, default=None)


def measure_links(device: Device, total: int) -> Ceilings:
    """Copy `total` bytes back and forth, `ROUNDS` times each way and for each size of chunk; the best of them counts."""
    here, back = device.host_memory(total), device.host_memory(total)
    there, source = (memory.to(device.torch, copy=True) for memory in (here, back))
    found = Ceilings()
    for chunk in (size for size in CHUNKS if size <= total):
        to, fro = partial(copy, there, here, chunk), partial(copy, back, source, chunk)
        found.h2d.append((chunk, total / least_seconds(device, to)))
        found.d2h.append((chunk, total / least_seconds(device, fro)))
        found.both.append((chunk, total / least_seconds(device, partial(device.beside, to, fro))))
    found.facts, found.free = device.facts(), device.memory()[0]
    return found


def copy(target: Tensor, source: Tensor, chunk: int) -> None:
    for to, of in zip(target.split(chunk), source.split(chunk), strict=True):
        to.copy_(of, non_blocking=True)


def least_seconds(device: Device, run: Run) -> float:
    """Return the seconds of the fastest of a few runs, after one that does not count."""
    seconds = []
    for _ in range(1 + ROUNDS):
        device.wait()
        started = time.perf_counter()
        run()
        device.wait()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def measure_disk(place: Path, size: int) -> list[float]:
    """Write a file of `size` random bytes, read it a few times, remove it; return bytes per second."""
    file = place / "disk-speed"
    piece = os.urandom(min(size, 8 << 20))
    try:
        with file.open("wb", buffering=0) as stream:
            for _ in range(size // len(piece)):
                stream.write(piece)
            os.fsync(stream.fileno())
        with RawReader(file) as reader:
            return [reader.measure() for _ in range(ROUNDS)]
    finally:
        file.unlink(missing_ok=True)
