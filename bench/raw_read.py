"""How fast values come from disk into RAM, against the device itself.

    python bench/raw_read.py [--dir DIR] [--rounds 3]

Reads 64 files of 16 MiB that the disk backend wrote. The ways take turns; each figure is the median over the rounds.
Cold: nothing is in the page cache (the files' pages are dropped before each run); warm: everything is. "device" is one
thread with direct I/O into one piece of huge pages: what no way can beat by much; the page cache never helps it.
"""

import argparse
import ctypes
import mmap
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tierstore import FileBackend, FileExtent, open_backend
from tierstore.backends._arena import Arena
from tierstore.transfer.reader import Reader

FILES = 64
FILE_BYTES = 16 << 20
IN_FLIGHT = 4  # extents that are read at once
REQUEST = 8 << 20

Way = Callable[[FileBackend, list[str]], None]


def with_reader(reader: Reader, allocate: Callable[[int], torch.Tensor]) -> Way:
    """Return a way that reads each value into fresh memory from `allocate` and then lets go of it."""

    def read(backend: FileBackend, keys: list[str]) -> None:
        room, ended, errors = threading.Semaphore(IN_FLIGHT), threading.Semaphore(0), list[BaseException]()

        def done(error: BaseException | None) -> None:
            errors.extend([] if error is None else [error])
            room.release()
            ended.release()

        for key in keys:
            room.acquire()
            extent = backend.extent(key)
            reader.submit(extent, allocate(extent.nbytes), done)
        for _ in keys:
            ended.acquire()
        if errors:
            raise errors[0]

    return read


def mapped(backend: FileBackend, keys: list[str]) -> None:
    """Map each file and copy it."""
    for key in keys:
        backend.get(key).clone()


def device(slab: mmap.mmap) -> Way:
    """Return a way that reads with direct I/O and one thread into the same memory again and again."""

    def read(backend: FileBackend, keys: list[str]) -> None:
        for key in keys:
            extent = backend.extent(key)
            descriptor = os.open(extent.path, os.O_RDONLY | os.O_DIRECT)
            for start in range(0, extent.nbytes, REQUEST):
                length = min(REQUEST, extent.nbytes - start)
                if os.preadv(descriptor, [memoryview(slab)[start : start + length]], extent.offset + start) != length:
                    raise OSError(f"a short read of {extent.path}")
            os.close(descriptor)

    return read


def huge_slab() -> mmap.mmap:
    slab = mmap.mmap(-1, FILE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    slab.madvise(mmap.MADV_HUGEPAGE)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(slab)), 0, len(slab))
    return slab


def set_cache(extents: list[FileExtent], *, warm: bool) -> None:
    """Read all files into the page cache, or drop them from it."""
    for extent in extents:
        descriptor = os.open(extent.path, os.O_RDONLY)
        if warm:
            while os.read(descriptor, REQUEST):
                pass
        else:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(way: Way, backend: FileBackend, keys: list[str]) -> tuple[float, float]:
    """Return GB/s and the seconds of CPU per GiB."""
    nbytes, started, busy = len(keys) * FILE_BYTES, time.perf_counter(), cpu_seconds()
    way(backend, keys)
    return nbytes / 1e9 / (time.perf_counter() - started), (cpu_seconds() - busy) * 2**30 / nbytes


def run(backend: FileBackend, reader: Reader, rounds: int) -> Table:
    keys = [str(number) for number in range(FILES)]
    for key in keys:
        backend.put(key, torch.randint(256, (FILE_BYTES,), dtype=torch.uint8))
    extents = [backend.extent(key) for key in keys]
    arena = Arena()
    ways = {
        "reader, recycled memory": with_reader(reader, arena.allocate),
        "reader, fresh memory": with_reader(reader, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8)),
        "map and clone": mapped,
        "device": device(huge_slab()),
    }
    ways["reader, recycled memory"](backend, keys[: 2 * IN_FLIGHT])  # the first time, no memory is recycled
    figures: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for warm in (False, True):
            for name, way in ways.items():
                set_cache(extents, warm=warm)
                figures.setdefault((name, warm), []).append(measure(way, backend, keys))
    return table_of(list(ways), figures, rounds)


def table_of(names: list[str], figures: dict[tuple[str, bool], list[tuple[float, float]]], rounds: int) -> Table:
    table = Table(title=f"{FILES} files of {FILE_BYTES >> 20} MiB, medians of {rounds}", title_justify="left")
    for column in ("way", "cold GB/s", "of device", "CPU s/GiB", "warm GB/s", "CPU s/GiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name in names:
        cold, warm = figures[name, False], figures[name, True]
        share = statistics.median(mine / bound for (mine, _), (bound, _) in zip(cold, figures["device", False], strict=True))
        cells = [median(cold, 0), f"{share:.2f}", median(cold, 1), median(warm, 0), median(warm, 1)]
        table.add_row(name, *cells)
    return table


def median(pairs: list[tuple[float, float]], place: int) -> str:
    return f"{statistics.median(pair[place] for pair in pairs):.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to put 1 GiB of files for a while (default: the system's temporary directory)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raw-read-", dir=options.dir) as directory:
        backend = open_backend("disk", Path(directory) / "store")
        assert isinstance(backend, FileBackend)
        with closing(backend), closing(Reader(request_bytes=REQUEST)) as reader:
            Console(width=140, highlight=False).print(run(backend, reader, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
