"""How much memory this process may have: what the machine has, and what control groups and resource limits leave of it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_NO_LIMIT = 1 << 60  # version 1 of control groups writes a huge number for "none"
_RLIMITS = {"address space": "RLIMIT_AS", "data": "RLIMIT_DATA", "lockable memory": "RLIMIT_MEMLOCK"}


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit on this process: `nbytes` (None: unlimited), and `used` of them by all that it covers, where that is known.

    `source` is the file or the name of the resource that says so.
    """

    name: str
    source: str
    nbytes: int | None
    used: int | None = None


def memory_limits(root: Path = Path("/")) -> list[Limit]:
    """Return every limit on memory that applies now; `root` is where the system's own files are found."""
    return [*_machine(root), *_groups(root), *_resources()]


def least_memory(limits: list[Limit]) -> int | None:
    """Return the lowest of the limits on memory as a whole (lockable memory is no such limit); None if there is none."""
    return min((limit.nbytes for limit in limits if limit.nbytes is not None and limit.source != "RLIMIT_MEMLOCK"), default=None)


def available_ram() -> int:
    """Return the bytes of RAM that can be taken without swapping, as the system says."""
    available = _ram(Path("/")).get("MemAvailable")
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if available is None else available


def _machine(root: Path) -> Iterator[Limit]:
    ram = _ram(root)
    if "MemTotal" in ram:
        used = ram["MemTotal"] - ram["MemAvailable"] if "MemAvailable" in ram else None
        yield Limit("RAM of the machine", "/proc/meminfo", ram["MemTotal"], used)


def _ram(root: Path) -> dict[str, int]:
    """Return the bytes "MemTotal" and "MemAvailable" as far as the system tells them."""
    file = root / "proc/meminfo"
    lines = file.read_text().splitlines() if file.is_file() else []
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(text.split()[0]) << 10 for name, text in found.items() if name in ("MemTotal", "MemAvailable")}


def _groups(root: Path) -> Iterator[Limit]:
    """Yield the limits of the control groups that this process is in, and of those that they are in."""
    file = root / "proc/self/cgroup"
    lines = file.read_text().splitlines() if file.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names, mount = [("memory.max", "memory.current"), ("memory.high", "memory.current")], root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names, mount = [("memory.limit_in_bytes", "memory.usage_in_bytes")], root / "sys/fs/cgroup/memory"
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for folder in (mount / inside, *(mount / parent for parent in inside.parents)):  # a container may see only the upper ones
            for limit, used in names:
                found = _number(folder / limit)
                if found is not None:
                    yield Limit("control group", str(folder / limit), found, _number(folder / used))


def _number(file: Path) -> int | None:
    """Return the number in a file; None if there is none, or it means that there is no limit."""
    try:
        text = file.read_text().strip()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    return int(text) if text.isdecimal() and int(text) < _NO_LIMIT else None


def _resources() -> Iterator[Limit]:
    for name, constant in _RLIMITS.items():
        if hasattr(resource, constant):
            soft = resource.getrlimit(getattr(resource, constant))[0]
            yield Limit(name, constant, None if soft == resource.RLIM_INFINITY else soft)
