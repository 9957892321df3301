"""Limits on the memory of a process: a cgroup where one can be made, else RLIMIT_DATA."""

import os
import resource
import time
from contextlib import suppress
from pathlib import Path


class Cap:
    """A limit on one process's memory; this one sets none and only looks.

    `prelude` is the shell command by which the process puts itself under the limit. `peak` is the most bytes that it held,
    files in memory included; `anonymous`, the most of those that the kernel could not take back; `cached`, the bytes of page
    cache that count now. All as of the last `sample`.
    """

    name, prelude = "no cap", ":"
    peak = anonymous = cached = 0

    def sample(self, pid: int) -> None:
        text = Path(f"/proc/{pid}/status").read_text()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in text.splitlines()) if "kB" in rest}
        self.peak = max(self.peak, sizes.get("VmHWM", 0))
        self.anonymous = max(self.anonymous, sizes.get("RssAnon", 0))

    def restart(self) -> None:
        """Forget the peaks so far."""
        self.peak = self.anonymous = 0

    def close(self) -> None:
        """Remove what was set up; the process has ended."""


class DataLimit(Cap):
    """RLIMIT_DATA counts private writable memory, files mapped that way included, whether or not it was ever touched."""

    name = "RLIMIT_DATA, as no memory cgroup can be made here"

    def __init__(self, limit: int) -> None:
        self.prelude = f"ulimit -S -d {limit // 1024}"

    @staticmethod
    def lift() -> None:
        """Take the limit off this process."""
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


class Cgroup(Cap):
    """A memory cgroup of its own, of version 1 or 2; raises `OSError` where none can be made. Counts the page cache too."""

    FILES = (
        ("memory/", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes", "total_rss", "total_cache"),
        ("", "memory.max", "memory.swap.max", "memory.peak", "anon", "file"),
    )

    def __init__(self, version: int, limit: int, tag: str = "") -> None:
        below, limit_file, swap_file, self._peak_file, self._anonymous_row, self._cached_row = self.FILES[version - 1]
        parent = Path("/sys/fs/cgroup", below)
        if version == 2 and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
            raise FileNotFoundError("the memory controller is not on here")
        self.folder = parent / f"tierstore-cap-{os.getpid()}{tag}"
        self.name, self.prelude = f"cgroup v{version} at {self.folder}", f"echo $$ > {self.folder}/cgroup.procs"
        self.folder.mkdir()
        try:
            (self.folder / limit_file).write_text(str(limit))
            with suppress(OSError):  # a kernel that does not account for swap
                (self.folder / swap_file).write_text(str(limit if version == 1 else 0))
        except OSError:
            self.folder.rmdir()
            raise

    def sample(self, pid: int) -> None:
        rows = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        self.anonymous = max(self.anonymous, int(rows[self._anonymous_row]))
        self.cached = int(rows[self._cached_row])
        self.peak = int((self.folder / self._peak_file).read_text())

    def restart(self) -> None:
        super().restart()
        with suppress(OSError):  # version 2 does not let the peak of a group be reset
            (self.folder / self._peak_file).write_text("0")

    def close(self) -> None:
        for _ in range(100):  # a process that has been killed may take a moment to leave
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.05)
        self.folder.rmdir()


def make_cap(limit: int | None, tag: str = "") -> Cap:
    """Return the strictest cap that this machine allows; `tag` tells apart several of one process."""
    if limit is None:
        return Cap()
    for version in (1, 2):
        with suppress(OSError):
            return Cgroup(version, limit, tag)
    return DataLimit(limit)
