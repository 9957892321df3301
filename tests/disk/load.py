"""Many threads on a durable store, and processes that read it meanwhile; every operation is written down, and checked afterwards.

Values are int64 tensors filled with one number that is never used again, so a read tells which write it saw, and whether all of it.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.disk.children import Child
from tests.disk.conftest import open_descriptors
from tests.disk.histories import MISSING, Operation, check_register, check_single_writer, check_stale_reader
from tests.plainly import anonymous_bytes
from tierstore import TieredStore
from tierstore.backends.disk import DiskBackend

THREADS, PROCESSES = 8, 4
SHARED = tuple(f"shared/{number}" for number in range(12))
"""Keys that every thread writes, and nobody deletes."""

_OWNED = 3  # keys that each thread writes, and deletes, alone
_SIZES = (0, 1, 511, 8192, 40_000)  # elements besides the first one
_FLUSH_EVERY = 0.1  # seconds
_RECORD = struct.Struct("<BBHqdd")
_WRITE, _READ = 0, 1


@dataclass(slots=True)
class Usage:
    """What a process has of what it could leak, over time: bytes of anonymous memory once a second, descriptors, threads."""

    memory: list[int] = field(default_factory=list)
    descriptors: tuple[int, int] = (0, 0)
    threads: tuple[int, int] = (0, 0)

    def growth(self) -> int:
        """Bytes by which the last third of the time took more than the one before, by their medians; 0 for a short time."""
        third = len(self.memory) // 3
        before, after = sorted(self.memory[third : 2 * third]), sorted(self.memory[2 * third :])
        return after[len(after) // 2] - before[len(before) // 2] if third > 3 else 0


@dataclass(slots=True)
class Outcome:
    """What a load has shown; `problems` is empty if all is well."""

    operations: int = 0
    reads_elsewhere: int = 0
    flushes: int = 0
    evictions: int = 0
    growth: int = 0
    problems: list[str] = field(default_factory=list)


def key_of(number: int) -> str:
    """Return the key with this number: the shared ones, then those of each thread."""
    thread, own = divmod(number - len(SHARED), _OWNED)
    return SHARED[number] if number < len(SHARED) else f"own/{thread}/{own}"


class Log:
    """Operations of one thread, in a file, so that a long history takes no memory; its threads' numbers make values unlike."""

    def __init__(self, folder: Path, writer: int) -> None:
        self._file = (folder / f"{writer}.log").open("wb", buffering=1 << 16)
        self._next = count((writer + 1) << 32)

    def new_value(self) -> int:
        return next(self._next)

    def add(self, kind: int, key: int, value: int, start: float) -> None:
        self._file.write(_RECORD.pack(kind, 0, key, value, start, time.monotonic()))

    def close(self) -> None:
        self._file.close()


def value_in(tensor: torch.Tensor) -> int:
    """Return the number that a value consists of; raise `AssertionError` if that is not one."""
    first = int(tensor[0])
    assert bool((tensor == first).all()), f"a torn value: {first} and others"
    return first


# -- the processes that read ----------------------------------------------------------------------------------------------


def read_until_told(root: str, folder: str, number: int, channel: Connection) -> None:
    """Read random keys as of now until something comes through `channel`; then tell what was used, or what went wrong."""
    torch.set_num_threads(1)
    chance, usage = random.Random(number), Usage()
    log = Log(Path(folder), 100 + number)
    before, noted = (open_descriptors(), threading.active_count()), 0.0
    try:
        while not channel.poll():
            with closing(DiskBackend.reader(root)) as reader:
                for _ in range(300):
                    key, start = chance.randrange(len(SHARED) + THREADS * _OWNED), time.monotonic()
                    reader.refresh()
                    try:
                        value = value_in(reader.get(key_of(key)))
                    except KeyError:
                        value = MISSING
                    log.add(_READ, key, value, start)
            if time.monotonic() > noted + 1:
                noted = time.monotonic()
                usage.memory.append(anonymous_bytes())
    except Exception as error:  # noqa: BLE001  (told to the parent, for which it is a failure)
        channel.send(f"reader {number}: {type(error).__name__}: {error}")
    log.close()
    usage.descriptors, usage.threads = (before[0], open_descriptors() - 1), (before[1], threading.active_count())
    channel.send(usage)


# -- the threads that write -----------------------------------------------------------------------------------------------


class Load:
    """Runs the load on `store`, whose directory is `root`, and checks it. `folder` is for logs.

    `durable`: what `put` has returned from is there for every other process; else only after `flush`.
    """

    def __init__(self, store: TieredStore, root: Path, folder: Path, *, durable: bool) -> None:
        self.store = store
        self.root = root
        self.folder = folder
        self.durable = durable
        self.outcome = Outcome()
        self.flushes: list[tuple[float, float]] = []
        self._done = [0] * THREADS
        self._end = threading.Event()

    def run(self, seconds: float, operations: int, flushes: int = 4) -> Outcome:
        """Load the store for at least that long, and with at least as many operations of the threads, and flushes."""
        usage, before = Usage(), (open_descriptors(), threading.active_count())
        logs = [Log(self.folder, number) for number in range(THREADS)]
        for key in range(len(SHARED) + THREADS * _OWNED):
            self._write(logs[0] if key < len(SHARED) else logs[(key - len(SHARED)) // _OWNED], key, 1)
        self.store.flush()
        children = [Child(read_until_told, str(self.root), str(self.folder), number) for number in range(PROCESSES)]
        work = [lambda number=number: self._work(number, logs[number]) for number in range(THREADS)]
        threads = [threading.Thread(target=self._watched, args=(each,)) for each in (*work, self._flush)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + seconds
        while not self.outcome.problems and (time.monotonic() < until or sum(self._done) < operations or len(self.flushes) < flushes):
            self._end.wait(1.0 if seconds else 0.1)
            usage.memory.append(anonymous_bytes())
        self._end.set()
        for thread in threads:
            thread.join()
        for log in logs:
            log.close()
        self._hear(children)
        self.outcome.evictions = self.store.stats().evictions
        self.store.close()
        usage.descriptors, usage.threads = (before[0], open_descriptors()), (before[1], threading.active_count())
        self._note_usage("the process that writes", usage, engine_threads=True)
        self._check_history()
        self._check_files()
        return self.outcome

    def _watched(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  (a failure of the load, whatever it is)
            self.outcome.problems.append(f"{type(error).__name__}: {error}")

    def _flush(self) -> None:
        while not self._end.wait(_FLUSH_EVERY):
            start = time.monotonic()
            self.store.flush()
            self.flushes.append((start, time.monotonic()))

    def _work(self, number: int, log: Log) -> None:
        chance, store = random.Random(number), self.store
        hints = (0.0, 0.0) if self.durable else (0.5, 0.5)  # with one tier there is nowhere to go
        while not self._end.is_set() and not self.outcome.problems:
            key = chance.randrange(len(SHARED))
            own = len(SHARED) + number * _OWNED + chance.randrange(_OWNED)
            other = len(SHARED) + chance.randrange(THREADS * _OWNED)
            match chance.choices(range(7), (4, 3, 3, 1, 1, *hints))[0]:
                case 0:
                    self._read(log, chance.choice((key, own, other)))
                case 1:  # a key that nobody else writes: who holds a lease sees others write
                    self._read(log, own, leased=True)
                case 2:
                    self._write(log, key, chance.choice(_SIZES))
                case 3:
                    self._write(log, own, chance.choice(_SIZES))
                case 4:
                    self._delete(log, own)
                case 5:
                    store.prefetch([key_of(key)])
                case _:
                    store.offload([key_of(key)])
            self._done[number] += 1

    def _write(self, log: Log, key: int, size: int) -> None:
        value, start = log.new_value(), time.monotonic()
        self.store.put(key_of(key), torch.full((1 + size,), value, dtype=torch.int64))
        log.add(_WRITE, key, value, start)

    def _read(self, log: Log, key: int, *, leased: bool = False) -> None:
        start = time.monotonic()
        try:
            if leased:
                with self.store.lease(key_of(key)) as (tensor,):
                    value = value_in(tensor)
            else:
                value = value_in(self.store.get(key_of(key)))
        except KeyError:
            value = MISSING
        log.add(_READ, key, value, start)

    def _delete(self, log: Log, key: int) -> None:
        start = time.monotonic()
        try:
            del self.store[key_of(key)]
        except KeyError:
            log.add(_READ, key, MISSING, start)
        else:
            log.add(_WRITE, key, MISSING, start)

    # -- afterwards -----------------------------------------------------------------------------------------------

    def _hear(self, children: list[Child]) -> None:
        for number, child in enumerate(children):
            child.channel.send("end")
            for message in child.end():
                if isinstance(message, Usage):
                    self._note_usage(f"reader {number}", message)
                else:
                    self.outcome.problems.append(str(message))

    def _note_usage(self, who: str, usage: Usage, *, engine_threads: bool = False) -> None:
        self.outcome.growth = max(self.outcome.growth, usage.growth())
        for what, (before, after) in (("descriptors", usage.descriptors), ("threads", usage.threads)):
            if after > before:
                self.outcome.problems.append(f"{who} has {after} {what} instead of {before}")

    def _check_history(self) -> None:
        history: dict[int, dict[int, tuple[list[Operation], list[Operation]]]] = {}
        for file in self.folder.glob("*.log"):
            source = int(file.stem)
            for kind, _, key, value, start, end in _RECORD.iter_unpack(file.read_bytes()):
                by_source = history.setdefault(key, {})
                operations = by_source.setdefault(source if source >= 100 else 0, ([], []))[kind]
                operations.append(Operation.of(value, start, end))
        self.outcome.operations = sum(len(both[0]) + len(both[1]) for each in history.values() for both in each.values())
        for key, by_source in sorted(history.items()):
            for problem in self._wrong_with(key, by_source):
                self.outcome.problems.append(f"{key_of(key)}: {problem}")

    def _wrong_with(self, key: int, by_source: dict[int, tuple[list[Operation], list[Operation]]]) -> Iterator[str]:
        writes, reads = by_source.pop(0)
        elsewhere = [found for _, found in by_source.values()]
        self.outcome.reads_elsewhere += sum(map(len, elsewhere))
        self.outcome.flushes = len(self.flushes)
        owned = key >= len(SHARED)
        check = check_single_writer if owned else check_register
        writes.sort(key=lambda write: write.start)
        if self.durable:
            reads = [*reads, *(read for found in elsewhere for read in found)]
        yield from filter(None, [check(writes, reads)])
        if not self.durable:
            check = check_single_writer if owned else check_stale_reader
            for found in elsewhere:
                yield from filter(None, [check(writes, [self._after_flush(read) for read in found])])

    def _after_flush(self, read: Operation) -> Operation:
        """Return a read that need only see what the last flush before it has made visible."""
        first, last = 0, len(self.flushes)
        while first < last:
            middle = (first + last) // 2
            first, last = (middle + 1, last) if self.flushes[middle][1] < read.start else (first, middle)
        return Operation(read.value, read.start, read.end, self.flushes[first - 1][0] if first else 0.0)

    def _check_files(self) -> None:
        """Every file is one of a value that is there, and every value is sound."""
        files = [file for file in self.root.rglob("*") if file.is_file()]
        inspection = DiskBackend.verify(self.root)
        self.outcome.problems += [f"{finding.key} in {finding.file}: {finding.problem}" for finding in inspection.findings]
        blobs = sum(file.suffix == ".safetensors" for file in files)
        rest = {file.name for file in files if file.suffix != ".safetensors"}
        if blobs != inspection.values or rest != {"FORMAT", "LOCK", "COMMITS", "index.sqlite"}:
            self.outcome.problems.append(f"{blobs} files for {inspection.values} values, and {sorted(rest)}")
