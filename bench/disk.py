"""The durable disk tier against the device and against other formats: cold reads, durable writes, warm values.

    python bench/disk.py [--dir DIR] [--rounds 3]

Values of 4 to 64 MiB, 496 MiB in all. The contenders take turns in every round; each figure is the median over the rounds,
and the ratios are medians of the ratios within a round, since devices and neighbours are not the same all the time.
Reads are cold (the files' pages are dropped before each of them) and end in memory of the process. "raw" is the best of 1, 2
and 4 threads of `preadv`, or `pwrite`, with direct I/O in requests of 8 MiB, into and from the same aligned huge pages again
and again; its writes are preallocated and flushed at the end. The other formats flush nothing; that is done for them, and timed.
"""

import argparse
import ctypes
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch
import zarr
from accelerate.utils import OffloadedWeightsLoader, offload_state_dict
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from tierstore import Tier, TieredStore, open_backend
from tierstore.backends._arena import Arena
from tierstore.backends.disk import DiskBackend
from tierstore.transfer.reader import Reader

MIB = 1 << 20
SIZES = [size * MIB for size in (4, 8, 16, 32, 64) for _ in range(4)]
REQUEST = 8 * MIB
IN_FLIGHT = 4  # values that are read at once
THREADS = (1, 2, 4)
MMAP = "torch.load(mmap=True)"

Act = Callable[[], object]


def values() -> dict[str, torch.Tensor]:
    """Return the values, in memory as aligned as a tier of RAM has it."""
    arena = Arena()
    made = {f"{number:02}": arena.allocate(size) for number, size in enumerate(SIZES)}
    for number, tensor in enumerate(made.values()):
        tensor.random_(256, generator=torch.Generator().manual_seed(number))
    return {key: tensor.view(torch.bfloat16) for key, tensor in made.items()}


def huge_slab(nbytes: int) -> memoryview:
    slab = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    slab.madvise(mmap.MADV_HUGEPAGE)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(slab)), 1, nbytes)
    return memoryview(slab)


def in_threads(count: int, act: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(act, range(count)))


class Raw:
    """Direct I/O on one file for each size, cut into requests that `threads` threads share."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.threads = threads
        self._slabs = [huge_slab(REQUEST) for _ in range(threads)]
        self._parts = [
            (number, start, min(REQUEST, size - start)) for number, size in enumerate(SIZES) for start in range(0, size, REQUEST)
        ]

    def read(self) -> None:
        with ExitStack() as stack:
            files = [self._open(stack, number, os.O_RDONLY) for number in range(len(SIZES))]

            def act(thread: int) -> None:
                for number, start, length in self._parts[thread :: self.threads]:
                    if os.preadv(files[number], [self._slabs[thread][:length]], start) != length:
                        raise OSError("a short read")

            in_threads(self.threads, act)

    def write(self) -> None:
        with ExitStack() as stack:
            files = [self._open(stack, number, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for number in range(len(SIZES))]
            for file, size in zip(files, SIZES, strict=True):
                os.posix_fallocate(file, 0, size)

            def act(thread: int) -> None:
                for number, start, length in self._parts[thread :: self.threads]:
                    if os.pwrite(files[number], self._slabs[thread][:length], start) != length:
                        raise OSError("a short write")

            in_threads(self.threads, act)
            for file in files:
                os.fsync(file)

    def _open(self, stack: ExitStack, number: int, flags: int) -> int:
        file = os.open(self.folder / f"raw {number}", flags | os.O_DIRECT)
        stack.callback(os.close, file)
        return file


def read_all(reader: Reader, backend: DiskBackend, arena: Arena) -> None:
    """Read every value as the link from disk to RAM does, into recycled memory."""
    room, ended, errors = threading.Semaphore(IN_FLIGHT), threading.Semaphore(0), list[BaseException]()

    def done(error: BaseException | None) -> None:
        errors.extend([] if error is None else [error])
        room.release()
        ended.release()

    keys = [key for key, _ in backend.entries()]
    for key in keys:
        room.acquire()
        extent = backend.extent(key)
        reader.submit(extent, arena.allocate(extent.nbytes), done)
    for _ in keys:
        ended.acquire()
    if errors:
        raise errors[0]


def read_store(store: TieredStore) -> None:
    """Read every value through a store with 160 MiB of RAM, four ahead."""
    keys = sorted(store)
    for place, key in enumerate(keys):
        store.prefetch(keys[place : place + IN_FLIGHT])
        with store.lease(key):
            pass


def put_all(backend: DiskBackend, tensors: Mapping[str, torch.Tensor], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(backend.put, tensors, tensors.values()))


def flushed(folder: Path) -> None:
    """Flush every file in a directory that somebody else has written without."""
    for path in files_in(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def others(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Act, Act]]:
    """Yield name, write and read of other formats, one file for each value; their writes are flushed afterwards."""
    for name in ("safetensors", "torch", "accelerate", "zarr"):
        (folder / name).mkdir(parents=True)
    place, suffix = folder / "safetensors", ".safetensors"

    def save_safetensors() -> None:
        for key, tensor in tensors.items():
            save_file({"data": tensor}, place / f"{key}{suffix}")
        flushed(place)

    yield "safetensors", save_safetensors, lambda: [load_file(place / f"{key}{suffix}")["data"].clone() for key in tensors]

    def save_torch() -> None:
        for key, tensor in tensors.items():
            torch.save(tensor, folder / "torch" / key)
        flushed(folder / "torch")

    yield "torch.save and load", save_torch, lambda: [torch.load(folder / "torch" / key) for key in tensors]
    yield MMAP, lambda: None, lambda: [torch.load(folder / "torch" / key, mmap=True).clone() for key in tensors]

    def save_accelerate() -> None:
        offload_state_dict(folder / "accelerate", dict(tensors))
        flushed(folder / "accelerate")

    def load_accelerate() -> None:
        loader = OffloadedWeightsLoader(save_folder=folder / "accelerate")
        for key in tensors:
            loader[key].clone()

    yield "accelerate's offload files", save_accelerate, load_accelerate

    def save_zarr() -> None:
        group = zarr.open_group(folder / "zarr", mode="w")
        for key, tensor in tensors.items():
            array = group.create_array(key, shape=(tensor.numel(),), chunks=(tensor.numel(),), dtype=np.uint16, compressors=None)
            array[:] = tensor.view(torch.uint16).numpy()
        flushed(folder / "zarr")

    def load_zarr() -> None:
        group = zarr.open_group(folder / "zarr", mode="r")
        for key in tensors:
            np.asarray(group[key][:])

    yield "zarr, uncompressed", save_zarr, load_zarr


def drop_cache(folder: Path) -> None:
    os.sync()
    for path in files_in(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def rate(act: Act) -> float:
    """Return GB/s."""
    started = time.perf_counter()
    act()
    return sum(SIZES) / 1e9 / (time.perf_counter() - started)


class Figures:
    """GB/s by name, one for each round."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {}

    def add(self, name: str, rate: float) -> None:
        self.rates.setdefault(name, []).append(rate)

    def best_raw(self) -> list[float]:
        return [max(turn) for turn in zip(*(self.rates[f"raw, {count} threads"] for count in THREADS), strict=True)]

    def table(self, title: str) -> Table:
        table = Table(title=title, title_justify="left")
        for column in ("way", "GB/s", "of the best raw", "least", "most"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for name, rates in self.rates.items():
            ratios = [mine / best for mine, best in zip(rates, self.best_raw(), strict=True)]
            shown = [statistics.median(rates), statistics.median(ratios), min(ratios), max(ratios)]
            table.add_row(name, *(f"{figure:.2f}" for figure in shown))
        return table


def run_writes(folder: Path, tensors: Mapping[str, torch.Tensor], peers: list[tuple[str, Act, Act]], rounds: int) -> Figures:
    figures = Figures()
    for turn in range(rounds):
        for count in THREADS:
            figures.add(f"raw, {count} threads", rate(Raw(folder / "raw", count).write))
        for threads in (1, 2):
            with closing(DiskBackend(folder / f"written {turn} {threads}")) as backend:
                figures.add(
                    f"disk backend, {threads} at once", rate(lambda backend=backend, threads=threads: put_all(backend, tensors, threads))
                )
                for key in tensors:
                    backend.delete(key)
        for name, write, _ in peers:
            if name != MMAP:
                figures.add(name, rate(write))
    return figures


def run_reads(folder: Path, reader: Reader, peers: list[tuple[str, Act, Act]], rounds: int) -> Figures:
    figures, arena = Figures(), Arena()
    checked = {"first": "checksums on", "never": "checksums off"}
    for _ in range(rounds):
        for count in THREADS:
            figures.add(f"raw, {count} threads", rate(Raw(folder / "raw", count).read))
        for verify, name in checked.items():
            drop_cache(folder)
            with closing(DiskBackend(folder / "store", verify=verify)) as backend:  # type: ignore[arg-type]
                figures.add(f"disk backend, {name}", rate(lambda backend=backend: read_all(reader, backend, arena)))
        drop_cache(folder)
        with TieredStore.open(folder / "store", cpu=160 * MIB) as store:
            figures.add("store of 160 MiB, checksums on", rate(lambda store=store: read_store(store)))
        for name, _, read in peers:
            drop_cache(folder)
            figures.add(name, rate(read))
    return figures


def warm(tensors: Mapping[str, torch.Tensor]) -> str:
    """Say what it costs to get a value that is in RAM, and whether that is a copy."""
    with TieredStore([Tier("cpu", open_backend("ram"))]) as store:
        for key, tensor in tensors.items():
            store.put(key, tensor)
        places = {key: store.get(key).data_ptr() for key in tensors}
        started = time.perf_counter()
        same = all(store.get(key).data_ptr() == places[key] for _ in range(100) for key in tensors)
        micros = (time.perf_counter() - started) / 100 / len(tensors) * 1e6
    return f"warm values of 4 to 64 MiB: {micros:.1f} us per get, {'no copy' if same else 'COPIED'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to put 3 GiB of files for a while (default: the system's temporary directory)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    console = Console(width=140, highlight=False)
    with tempfile.TemporaryDirectory(prefix="disk-", dir=options.dir) as directory, closing(Reader()) as reader:
        folder, tensors = Path(directory), values()
        (folder / "raw").mkdir()
        peers = list(others(folder, tensors))
        console.print(run_writes(folder, tensors, peers, options.rounds).table("Durable writes"))
        with closing(DiskBackend(folder / "store")) as backend:
            put_all(backend, tensors, 1)
        console.print(run_reads(folder, reader, peers, options.rounds).table("Cold reads"))
        console.print(warm(tensors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
