"""The disk tier against the device and against other formats: durable and scratch writes, cold reads, warm values.

    pip install '.[bench]'
    python bench/disk.py [--dir DIR] [--rounds 5]
    python bench/disk.py --rounds 40 --no-others      # the device and us only: a virtual one needs many rounds
    python bench/disk.py --rounds 100 --no-others --parts durable

Values of 4 to 64 MiB, 496 MiB in all, in memory as aligned as a tier of RAM has it. The contenders take turns in every
round, another one first each time, and another one before each; each figure is the median over the rounds, and a ratio the
median of the ratios within a round: to one thread that does raw I/O in sequence, and to the best raw route, which is the one
of 1, 2 and 4 threads with the highest median (so it is the one that was lucky, where they are equally fast). "90 % sure" is
where the median of very many rounds would be, by the order of these alone. Raw is `pwrite` and `preadv` with direct I/O in
requests of 8 MiB that go round in 256 MiB of huge pages, as much as four of the largest values take.
"The same 8 MiB" is one thread that reads into one place again and again: so fast is memory that nobody needs for long, and
which may never leave the processor's cache; it is no route for values that are to stay.

Like is compared with like. Whatever was written in a turn is deleted, and the system flushed, before the next one begins: a
device that lets through so many bytes in a while has the same credit for everybody. Durable: raw writes end when every file
has been flushed, and so does every contender; what a library does not flush is flushed for it, and timed. The disk backend
also has every name, checksum and commit on the device when a `put` returns; "at once" is how many threads put, and
`flush()` is that of a store whose values are in RAM; both stay open from round to round. "File by file" is raw with file and
name flushed before the next begins. Scratch: nobody flushes, raw neither. Reads are cold (the files' pages are dropped before
each) and end in memory of the process.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from disk_formats import Format, files_in, formats
from disk_raw import MIB, REQUEST, SIZES, Raw, huge_slab, in_threads
from rich.console import Console
from rich.table import Table
from turns import interval, turned

from tierstore import Backend, Tier, TieredStore, open_backend
from tierstore.backends._arena import Arena
from tierstore.backends.disk import DiskBackend
from tierstore.checksum import Verify
from tierstore.transfer.reader import Reader

IN_FLIGHT = 4  # values that are read at once
THREADS = (1, 2, 4)
PARTS = ("durable", "scratch", "reads", "warm")

Act = Callable[[], object]


def values() -> dict[str, torch.Tensor]:
    """Return the values, in memory as aligned as a tier of RAM has it."""
    arena = Arena()
    made = {f"{number:02}": arena.allocate(size) for number, size in enumerate(SIZES)}
    for number, tensor in enumerate(made.values()):
        tensor.random_(256, generator=torch.Generator().manual_seed(number))
    return {key: tensor.view(torch.bfloat16) for key, tensor in made.items()}


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


def put_all(backend: Backend, tensors: Mapping[str, torch.Tensor], threads: int) -> None:
    left = iter(tensors.items())

    def act(_: int) -> None:
        for key, tensor in left:
            backend.put(key, tensor)

    in_threads(threads, act)


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

    def __init__(self, names: Iterable[str]) -> None:
        self.rates: dict[str, list[float]] = {name: [] for name in names}

    def add(self, name: str, rate: float) -> None:
        self.rates[name].append(rate)

    def references(self) -> dict[str, list[float]]:
        """Return what the others are compared with."""
        best = max((self.rates[raw_name(count)] for count in THREADS), key=statistics.median)
        return {"raw, 1 thread": self.rates[raw_name(1)], "the best raw": best}

    def table(self, title: str) -> Table:
        references = self.references()
        table = Table(title=title, title_justify="left")
        table.add_column("way")
        for column in ("GB/s", *(column for name in references for column in (f"of {name}", "90 % sure"))):
            table.add_column(column, justify="right")
        for name, rates in self.rates.items():
            cells = [f"{statistics.median(rates):.2f}"]
            for others in references.values():
                ratios = sorted(mine / other for mine, other in zip(rates, others, strict=True))
                cells += [f"{statistics.median(ratios):.2f}", interval(ratios)]
            table.add_row(name, *cells)
        return table


def raw_name(threads: int) -> str:
    return f"raw, {threads} threads"


@dataclass(frozen=True)
class Turn:
    """A contender; `prepared` makes everything ready, yields what is timed, and clears up."""

    name: str
    prepared: Callable[[], AbstractContextManager[Act]]


def run(turns: list[Turn], rounds: int) -> Figures:
    figures = Figures(turn.name for turn in turns)
    for number in range(rounds):
        for turn in turned(turns, number):
            with turn.prepared() as act:
                figures.add(turn.name, rate(act))
    return figures


def run_durable_writes(folder: Path, tensors: Mapping[str, torch.Tensor], raws: list[Raw], others: list[Format], rounds: int) -> Figures:
    with closing(DiskBackend(folder / "written")) as backend, TieredStore.open(folder / "flushed", cpu=sum(SIZES)) as store:
        turns = [Turn(raw_name(raw.threads), partial(into_files, raw.folder, raw.write_durably)) for raw in raws]
        turns.append(Turn(f"{raw_name(raws[-1].threads)}, file by file", partial(into_files, raws[-1].folder, raws[-1].write_each_durably)))
        turns += put_turns("disk backend", backend, tensors)
        turns.append(Turn("flush() of a store in RAM", partial(from_ram, store, tensors)))
        turns += [Turn(other.name, partial(into_files, other.folder, other.write)) for other in others if other.write is not None]
        return run(turns, rounds)


@contextmanager
def into_files(folder: Path, write: Act) -> Iterator[Act]:
    folder.mkdir(parents=True)
    yield write
    shutil.rmtree(folder)
    os.sync()


def put_turns(name: str, backend: Backend, tensors: Mapping[str, torch.Tensor]) -> list[Turn]:
    """Return the turns of a backend that stays open, and is filled again and again, as it is in use."""
    return [Turn(f"{name}, {count} at once", partial(into_backend, backend, tensors, count)) for count in THREADS]


@contextmanager
def into_backend(backend: Backend, tensors: Mapping[str, torch.Tensor], threads: int) -> Iterator[Act]:
    yield partial(put_all, backend, tensors, threads)
    for key in tensors:
        backend.delete(key)
    os.sync()


@contextmanager
def from_ram(store: TieredStore, tensors: Mapping[str, torch.Tensor]) -> Iterator[Act]:
    for key, tensor in tensors.items():
        store.put(key, tensor)
    yield store.flush
    for key in tensors:
        del store[key]
    os.sync()


def run_scratch_writes(folder: Path, tensors: Mapping[str, torch.Tensor], raws: list[Raw], rounds: int) -> Figures:
    with closing(DiskBackend.scratch(folder)) as backend:
        turns = [Turn(raw_name(raw.threads), partial(into_files, raw.folder, raw.write)) for raw in raws]
        return run([*turns, *put_turns("scratch", backend, tensors)], rounds)


def run_reads(folder: Path, tensors: Mapping[str, torch.Tensor], raws: list[Raw], others: list[Format], rounds: int) -> Figures:
    raws[0].folder.mkdir()
    raws[0].write()
    with closing(DiskBackend(folder / "store")) as backend:
        put_all(backend, tensors, 1)
    for other in others:
        other.folder.mkdir(exist_ok=True)  # some read what another one writes
        if other.write is not None:
            other.write()
    arena, narrow = Arena(), Raw(raws[0].folder, 1, huge_slab(REQUEST))
    with closing(Reader()) as reader:
        turns = [Turn(raw_name(raw.threads), partial(from_files, folder, raw.read)) for raw in raws]
        turns.append(Turn("raw, 1 thread, the same 8 MiB", partial(from_files, folder, narrow.read)))
        turns.append(Turn("disk backend, checksums on", partial(from_backend, folder, reader, arena, "first")))
        turns.append(Turn("disk backend, checksums off", partial(from_backend, folder, reader, arena, "never")))
        turns.append(Turn("store of 160 MiB, checksums on", partial(from_store, folder)))
        turns += [Turn(other.name, partial(from_files, folder, other.read)) for other in others]
        return run(turns, rounds)


@contextmanager
def from_files(folder: Path, read: Act) -> Iterator[Act]:
    drop_cache(folder)
    yield read


@contextmanager
def from_backend(folder: Path, reader: Reader, arena: Arena, verify: Verify) -> Iterator[Act]:
    drop_cache(folder)
    with closing(DiskBackend(folder / "store", verify=verify)) as backend:
        yield partial(read_all, reader, backend, arena)


@contextmanager
def from_store(folder: Path) -> Iterator[Act]:
    drop_cache(folder)
    with TieredStore.open(folder / "store", cpu=160 * MIB) as store:
        yield partial(read_store, store)


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
    parser.add_argument("--dir", type=Path, help="where to put 5 GiB of files for a while (default: the system's temporary directory)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-others", action="store_true", help="leave other formats out, for more rounds in the same time")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which tables to make (default: all)")
    options = parser.parse_args()
    console = Console(width=140, highlight=False)
    with tempfile.TemporaryDirectory(prefix="disk-", dir=options.dir) as directory:
        folder, tensors, memory = Path(directory), values(), huge_slab(256 * MIB)
        raws = [Raw(folder / "raw", count, memory) for count in THREADS]
        others = [] if options.no_others else list(formats(folder, tensors))
        if "durable" in options.parts:
            console.print(run_durable_writes(folder, tensors, raws, others, options.rounds).table("Durable writes"))
        if "scratch" in options.parts:
            console.print(run_scratch_writes(folder, tensors, raws, options.rounds).table("Scratch writes, nothing flushed"))
        if "reads" in options.parts:
            console.print(run_reads(folder, tensors, raws, others, options.rounds).table("Cold reads"))
        if "warm" in options.parts:
            console.print(warm(tensors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
