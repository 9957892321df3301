"""A model runs in a process whose memory is capped below the model's size, and gives the right output.

    python bench/memory_cap.py                                          # 3 GiB of weights, a cap of 1.5 GiB, a fast tier of 512 MiB
    python bench/memory_cap.py --size 256MiB --cap 800MiB --cpu 64MiB   # quick, but there the plain model survives

Four processes, one after the other, read the same random decoder:

- uncapped: makes the weights, writes them with `torch.save`, and runs the plain model; this is the expected output;
- plain:    loads the weights into memory; has to die under the cap;
- mapped:   the same model over `torch.load(mmap=True)`, where the kernel's page cache decides what stays: the thing to beat;
- tiered:   `tiered(model, cpu=..., disk=...)` around two passes, and a third one after the `with`.

The cap counts the page cache too where it is a cgroup. "anonymous" is the part that the kernel could not take back.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from tierstore import format_size, parse_size, tiered

WIDTH, HIDDEN, HEADS, VOCABULARY, TOKENS = 1024, 2816, 16, 8192, 16
CGROUPS = Path("/sys/fs/cgroup")


# -- the model ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A layer of a decoder like Llama's: 49 MiB of float32 in matrices of 4 and 11 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        heads = (part(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = x + self.out(functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        y = self.between(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(blocks)), nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def blocks_for(size: int, dtype: torch.dtype) -> int:
    """Return how many blocks make a model of about `size` bytes."""
    with torch.device("meta"):
        block, rest = (sum(p.numel() for p in m.parameters()) * dtype.itemsize for m in (Block(), Decoder(0)))
    return max(1, round((size - rest) / block))


def empty_model(blocks: int, dtype: torch.dtype) -> Decoder:
    with torch.device("meta"):
        return Decoder(blocks).to(dtype)


@torch.no_grad()
def answers(model: nn.Module, turn: int) -> Tensor:
    ids = torch.arange(TOKENS).add(turn).mul(37).remainder(VOCABULARY)
    return model(ids[None])


# -- the four processes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What one process is told: its role, the model, the fast tier's bytes and the directory of all files."""

    role: str
    blocks: int
    dtype: str
    cpu: int
    place: str

    @property
    def kind(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def weights(self) -> Path:
        return Path(self.place, "weights.pt")

    @property
    def expected(self) -> Path:
        return Path(self.place, "expected.pt")

    @property
    def result(self) -> Path:
        return Path(self.place, f"{self.role}.json")


class Log:
    """What a process has to tell: seconds of each step, whether each check was right. Written at each step, as it may die."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.told: dict[str, Any] = {"seconds": {}, "right": {}, "report": ""}
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        """Note that `step` took the time since the last lap."""
        now = time.perf_counter()
        self.told["seconds"][step] = now - self._last
        self._last = now
        self.task.result.write_text(json.dumps(self.told))

    def compare(self, model: nn.Module, turn: int, step: str) -> None:
        """Run one pass and compare its output with the uncapped one's, bit for bit."""
        got = answers(model, turn)
        self.told["right"][step] = torch.equal(got, torch.load(self.task.expected, weights_only=True)[turn])
        self.lap(step)


def run_uncapped(task: Task, log: Log) -> None:
    torch.manual_seed(0)
    model = empty_model(task.blocks, task.kind).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.03)
    torch.save(model.state_dict(), task.weights)
    log.lap("make")
    outputs = []
    for turn in range(3):
        outputs.append(answers(model, turn))
        log.lap(f"pass {turn + 1}")
    torch.save(outputs, task.expected)


def load(task: Task, log: Log, *, mmap: bool) -> Decoder:
    model = empty_model(task.blocks, task.kind)
    model.load_state_dict(torch.load(task.weights, mmap=mmap, weights_only=True), assign=True)
    log.lap("load")
    return model


def run_plain(task: Task, log: Log, *, mmap: bool = False) -> None:
    model = load(task, log, mmap=mmap)
    for turn in range(3):
        log.compare(model, turn, f"pass {turn + 1}")


def run_mapped(task: Task, log: Log) -> None:
    run_plain(task, log, mmap=True)


def run_tiered(task: Task, log: Log) -> None:
    model = load(task, log, mmap=True)
    with tiered(model, cpu=task.cpu, disk=task.place, device="cpu") as session:
        log.lap("enter")
        for turn in range(2):
            log.compare(model, turn, f"pass {turn + 1}")
        tier = session.stats().tiers["cpu"]
        log.told["right"]["budget"] = tier.budget_bytes is not None and tier.peak_bytes <= tier.budget_bytes
        log.told["report"] = session.report()
    log.lap("leave")
    log.compare(model, 2, "pass 3 outside")


ROLES = {"uncapped": run_uncapped, "plain": run_plain, "mapped": run_mapped, "tiered": run_tiered}


# -- the cap ------------------------------------------------------------------------------------------------------------


class Cap:
    """A limit on a process's memory. `prelude` is the shell command by which the process puts itself under it."""

    name: str
    prelude: str

    def anonymous(self) -> int:
        """Return the bytes held now that are no page cache."""
        return 0

    def peak(self) -> int:
        """Return the most bytes ever held, page cache included."""
        return 0

    def close(self) -> None:
        """Remove what was set up; the process has ended."""


class Cgroup(Cap):
    """A memory cgroup of its own, with files named as in version 1 or 2; raises `OSError` where none can be made."""

    def __init__(self, parent: Path, files: dict[str, str], limit: int) -> None:
        self.folder, self._files = parent / f"tierstore-cap-{os.getpid()}", files
        self.name = f"cgroup v{files['version']} at {self.folder}"
        self.prelude = f"echo $$ > {self.folder}/cgroup.procs"
        self.folder.mkdir()
        try:
            (self.folder / files["limit"]).write_text(str(limit))
            with suppress(OSError):  # a kernel without swap accounting
                (self.folder / files["swap"]).write_text(files["swap_limit"].format(limit=limit))
        except OSError:
            self.folder.rmdir()
            raise

    def anonymous(self) -> int:
        rows = (line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return next(int(value) for name, value in rows if name == self._files["anonymous"])

    def peak(self) -> int:
        return int((self.folder / self._files["peak"]).read_text())

    def close(self) -> None:
        self.folder.rmdir()


class DataLimit(Cap):
    """RLIMIT_DATA: counts private memory that may be written, mapped or not yet touched; says nothing of the page cache."""

    def __init__(self, limit: int) -> None:
        self.name = "RLIMIT_DATA, as no memory cgroup can be made here"
        self.prelude = f"ulimit -d {limit // 1024}"

    def peak(self) -> int:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


V1 = {
    "version": "1", "limit": "memory.limit_in_bytes", "peak": "memory.max_usage_in_bytes", "anonymous": "total_rss",
    "swap": "memory.memsw.limit_in_bytes", "swap_limit": "{limit}",
}  # fmt: skip
V2 = {
    "version": "2", "limit": "memory.max", "peak": "memory.peak", "anonymous": "anon", "swap": "memory.swap.max", "swap_limit": "0",
}  # fmt: skip


def make_cap(limit: int) -> Cap:
    """Return the strictest cap that this machine allows."""
    for parent, files in ((CGROUPS / "memory", V1), (CGROUPS, V2)):
        with suppress(OSError):
            if files is V1 or "memory" in (parent / "cgroup.subtree_control").read_text().split():
                return Cgroup(parent, files, limit)
    return DataLimit(limit)


# -- the parent ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """How one process went."""

    role: str
    cap: int | None
    peak: int
    anonymous: int
    code: int
    last_words: str
    seconds: float
    told: dict[str, Any]

    @property
    def right(self) -> bool:
        return self.code == 0 and all(self.told["right"].values())

    @property
    def died_of_memory(self) -> bool:
        """True for a kill by the kernel, and for an allocation that failed."""
        return self.code in (-9, 137) or "alloc" in self.last_words.lower() or "MemoryError" in self.last_words

    @property
    def outcome(self) -> str:
        if self.died_of_memory:
            return "killed by the kernel: out of memory" if self.code in (-9, 137) else f"failed: {self.last_words[:60]}"
        if self.code:
            return f"FAILED with exit code {self.code}: {self.last_words}"
        if self.role == "uncapped":
            return "makes the expected output"
        wrong = [name for name, fine in self.told["right"].items() if not fine]
        return f"WRONG: {', '.join(wrong)}" if wrong else f"right in all of {', '.join(self.told['right'])}"


def run_process(task: Task, limit: int | None) -> Run:
    """Run one role in its own process, under a cap of `limit` bytes if one is given."""
    forget_pages(task.weights)
    cap = Cap() if limit is None else make_cap(limit)
    command = [sys.executable, __file__, "--task", json.dumps(vars(task))]
    if limit is not None:
        command = ["sh", "-c", f'{cap.prelude} && exec "$@"', "sh", *command]
    started = time.perf_counter()
    anonymous = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stderr=errors)
        while process.poll() is None:
            with suppress(OSError):
                anonymous = max(anonymous, cap.anonymous())
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        errors.seek(0)
        last_words = next((line for line in reversed(errors.read().splitlines()) if line.strip()), "")
    told = json.loads(task.result.read_text()) if task.result.exists() else {"seconds": {}, "right": {}, "report": ""}
    run = Run(task.role, limit, cap.peak(), anonymous, process.returncode, last_words, seconds, told)
    cap.close()
    return run


def forget_pages(file: Path) -> None:
    """Drop a file from the page cache, or a capped process would use pages that others pay for."""
    if file.exists():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table_of(runs: list[Run]) -> Table:
    table = Table()
    for name in ("process", "cap", "peak", "anonymous", "seconds", "outcome"):
        table.add_column(name, justify="right" if name in ("cap", "peak", "anonymous", "seconds") else "left")
    for run in runs:
        sizes = (format_size(size) if size else "-" for size in (run.cap, run.peak, run.anonymous))
        table.add_row(run.role, *sizes, f"{run.seconds:.1f}", run.outcome)
    return table


def steps_of(runs: list[Run]) -> Table:
    table = Table(title="seconds of each step", title_justify="left")
    names = list(dict.fromkeys(name for run in runs for name in run.told["seconds"]))
    for name in ("process", *names):
        table.add_column(name, justify="left" if name == "process" else "right")
    for run in runs:
        table.add_row(run.role, *(f"{run.told['seconds'][name]:.2f}" if name in run.told["seconds"] else "-" for name in names))
    return table


def measure(options: argparse.Namespace, place: str) -> int:
    console = Console(width=150)
    blocks = blocks_for(options.size, getattr(torch, options.dtype))
    cap = make_cap(options.cap)
    console.print(f"{blocks} blocks, {options.dtype}; cap: {cap.name}; fast tier {format_size(options.cpu)}; files in {place}")
    cap.close()
    runs = []
    for role in ROLES:
        task = Task(role, blocks, options.dtype, options.cpu, place)
        runs.append(run_process(task, None if role == "uncapped" else options.cap))
        console.print(f"{role}: {runs[-1].outcome}")
    by_role = {run.role: run for run in runs}
    console.print(by_role["tiered"].told["report"], table_of(runs), steps_of(runs))
    shown = by_role["plain"].died_of_memory and by_role["tiered"].right
    console.print("shown: the plain model dies under the cap, the tiered one is right" if shown else "NOT shown")
    return 0 if shown else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="3GiB", help="bytes of all weights (default: %(default)s)")
    parser.add_argument("--cap", type=parse_size, default="1.5GiB", help="bytes that a process may have (default: %(default)s)")
    parser.add_argument("--cpu", type=parse_size, default="512MiB", help="budget of the fast tier (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--dir", help="where to put files of twice the size, on a disk (default: a temporary directory)")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task = Task(**json.loads(options.task))
        ROLES[task.role](task, Log(task))
        return 0
    with tempfile.TemporaryDirectory(prefix="memory-cap-", dir=options.dir) as place:
        return measure(options, place)


if __name__ == "__main__":
    sys.exit(main())
