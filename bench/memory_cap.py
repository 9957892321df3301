"""A model runs in a process whose memory is capped below the model's size, and gives the right output.

    python bench/memory_cap.py                                          # 3 GiB of weights, a cap of 1.5 GiB, a fast tier of 512 MiB
    python bench/memory_cap.py --size 512MiB --cap 600MiB --cpu 64MiB   # quick

Four processes, one after the other, read the same random decoder:

- uncapped: makes the weights, writes them with `torch.save`, and runs the plain model; this is the expected output;
- plain:    loads the weights into memory; has to die under the cap;
- mapped:   the same model over `torch.load(mmap=True)`, where the kernel's page cache decides what stays: the thing to beat;
- tiered:   `tiered(model, cpu=..., disk=...)` around two passes, and a third one after the `with`.

torch itself takes about 220 MiB. Where the cap is a cgroup it counts the page cache too, so everything that reads a large
file peaks at the cap; "anonymous" is the part that the kernel could not have taken back.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from mmap import MAP_PRIVATE, MAP_SHARED
from pathlib import Path
from typing import Any

import torch
from caps import Cap, DataLimit, make_cap
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from tierstore import format_size, parse_size, tiered

WIDTH, HIDDEN, HEADS, VOCABULARY, TOKENS = 1024, 2816, 16, 8192, 16


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
    """What one process is told: its role, the model, the fast tier's bytes, the directory of all files, how to map them."""

    role: str
    blocks: int
    dtype: str
    cpu: int
    place: str
    shared: bool

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
        self.told = self.nothing()
        self._last = time.perf_counter()

    @staticmethod
    def nothing() -> dict[str, Any]:
        return {"seconds": {}, "right": {}, "report": ""}

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
    with torch.serialization.set_default_mmap_options(MAP_SHARED if task.shared else MAP_PRIVATE):
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
        if task.shared:  # what was on disk comes back as private maps, which take no memory but which this limit counts
            DataLimit.lift()
    log.lap("leave")
    log.compare(model, 2, "pass 3 outside")


ROLES = {"uncapped": run_uncapped, "plain": run_plain, "mapped": run_mapped, "tiered": run_tiered}


# -- the parent ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """How one process went."""

    role: str
    cap: Cap
    code: int
    last_words: str
    seconds: float
    told: dict[str, Any]

    @property
    def right(self) -> bool:
        return self.code == 0 and all(self.told["right"].values())

    @property
    def died_of_memory(self) -> bool:
        """True for a kill by the kernel, and for memory that was refused."""
        return self.code == -9 or any(word in self.last_words for word in ("MemoryError", "allocate memory", "unable to mmap", "err == 0"))

    @property
    def outcome(self) -> str:
        if self.code == -9:
            return "killed by the kernel: out of memory"
        if self.code:
            return f"{'out of memory' if self.died_of_memory else 'FAILED'}: {self.last_words[:70]}"
        wrong = [name for name, fine in self.told["right"].items() if not fine]
        return f"WRONG: {', '.join(wrong)}" if wrong else f"right: {', '.join(self.told['right']) or 'by definition'}"


def run_process(task: Task, cap: Cap) -> Run:
    """Run one role in a process of its own under `cap`."""
    forget_pages(task.weights)
    command = ["sh", "-c", f'{cap.prelude} && exec "$@"', "sh", sys.executable, __file__, "--task", json.dumps(vars(task))]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stderr=errors)
        while process.poll() is None:
            with suppress(OSError):
                cap.sample(process.pid)
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        with suppress(OSError):
            cap.sample(process.pid)
        errors.seek(0)
        last_words = next((line for line in reversed(errors.read().splitlines()) if line.strip()), "")
    told = json.loads(task.result.read_text()) if task.result.exists() else Log.nothing()
    return Run(task.role, cap, process.returncode, last_words, seconds, told)


def forget_pages(file: Path) -> None:
    """Drop a file from the page cache, or a capped process would use pages that others pay for."""
    if file.exists():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table_of(runs: list[Run], limit: int) -> Table:
    table = Table()
    for name in ("process", "cap", "peak", "anonymous", "seconds", "outcome", "seconds of each step"):
        table.add_column(name, justify="right" if name in ("cap", "peak", "anonymous", "seconds") else "left")
    for run in runs:
        cap = "none" if run.role == "uncapped" else format_size(limit)
        steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in run.told["seconds"].items())
        table.add_row(run.role, cap, format_size(run.cap.peak), format_size(run.cap.anonymous), f"{run.seconds:.1f}", run.outcome, steps)
    return table


def measure(options: argparse.Namespace, place: str) -> int:
    console = Console(width=170, highlight=False)
    blocks = blocks_for(options.size, getattr(torch, options.dtype))
    runs = {}
    for role in ROLES:
        cap = make_cap(None if role == "uncapped" else options.cap)
        try:
            task = Task(role, blocks, options.dtype, options.cpu, place, shared=isinstance(cap, DataLimit))
            runs[role] = run_process(task, cap)
        finally:
            cap.close()
        console.print(f"{role} ({cap.name}): {runs[role].outcome}")
    console.print(runs["tiered"].told["report"], table_of(list(runs.values()), options.cap))
    shown = runs["plain"].died_of_memory and runs["tiered"].right
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
