"""What the device delivers to a Python process that writes and reads plain files, with direct I/O and nothing else to do."""

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch

MIB = 1 << 20
SIZES = [size * MIB for size in (4, 8, 16, 32, 64) for _ in range(4)]
REQUEST = 8 * MIB


def huge_slab(nbytes: int) -> memoryview:
    """Return memory in huge pages with random bytes in it."""
    slab = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    slab.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(slab, dtype=torch.uint8).random_(256, generator=torch.Generator().manual_seed(0))
    return memoryview(slab)


def in_threads(count: int, act: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(act, range(count)))


class _Part(NamedTuple):
    """A part of the file `number`, and the memory that it is written from and read into."""

    number: int
    start: int
    memory: memoryview


class Raw:
    """One new file for each of `SIZES`, cut into requests that `threads` threads share.

    They go around in `memory`, of whole requests: each uses the part after that of the one before.
    """

    def __init__(self, folder: Path, threads: int, memory: memoryview) -> None:
        self.folder = folder
        self.threads = threads
        places = [memory[start : start + REQUEST] for start in range(0, len(memory), REQUEST)]
        cuts = ((number, start, min(REQUEST, size - start)) for number, size in enumerate(SIZES) for start in range(0, size, REQUEST))
        self._parts = [_Part(number, start, place[:length]) for (number, start, length), place in zip(cuts, cycle(places))]

    def read(self) -> None:
        with self._opened(os.O_RDONLY) as files:

            def act(thread: int) -> None:
                for part in self._parts[thread :: self.threads]:
                    if os.preadv(files[part.number], [part.memory], part.start) != len(part.memory):
                        raise OSError("a short read")

            in_threads(self.threads, act)

    def write(self) -> None:
        """Write everything, and flush no file."""
        with self._new_files() as files:
            self._fill(files)

    def write_durably(self) -> None:
        """Write everything, and then flush every file; nothing says yet which of them are whole."""
        with self._new_files() as files:
            self._fill(files)
            for file in files:
                os.fsync(file)

    def write_each_durably(self) -> None:
        """Write one file after the other, each with its name on the device before the next begins."""
        directory = os.open(self.folder, os.O_RDONLY)
        try:
            with self._new_files() as files, ThreadPoolExecutor(self.threads) as pool:
                for number, file in enumerate(files):
                    list(pool.map(lambda part: _write(files, part), [part for part in self._parts if part.number == number]))
                    os.fsync(file)
                    os.fsync(directory)
        finally:
            os.close(directory)

    def _fill(self, files: list[int]) -> None:
        def act(thread: int) -> None:
            for part in self._parts[thread :: self.threads]:
                _write(files, part)

        in_threads(self.threads, act)

    @contextmanager
    def _new_files(self) -> Iterator[list[int]]:
        """Open a new file of full size for each value, in a directory without files."""
        with self._opened(os.O_RDWR | os.O_CREAT) as files:
            for file, size in zip(files, SIZES, strict=True):
                os.posix_fallocate(file, 0, size)
            yield files

    @contextmanager
    def _opened(self, flags: int) -> Iterator[list[int]]:
        with ExitStack() as stack:
            files = [os.open(self.folder / f"raw {number}", flags | os.O_DIRECT) for number in range(len(SIZES))]
            for file in files:
                stack.callback(os.close, file)
            yield files


def _write(files: list[int], part: _Part) -> None:
    if os.pwrite(files[part.number], part.memory, part.start) != len(part.memory):
        raise OSError("a short write")
