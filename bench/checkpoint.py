"""A checkpoint larger than the memory of the process: time to the first output, and bytes written.

    python bench/checkpoint.py                                    # 2 GiB of bfloat16, a cap of 700 MiB; as root
    python bench/checkpoint.py --size 256MiB --cap 600MiB --rounds 1    # quick

A Llama-shaped checkpoint with random weights is made (sharded safetensors, as `save_pretrained` writes it) and run once
without a cap; that is the expected output. Then the contenders take turns, each time in a new process in a memory cgroup of
its own, which counts interpreter, libraries and page cache, and with none of the checkpoint in the page cache:

- tierstore:   `tierstore.from_pretrained(AutoModelForCausalLM, DIR, cpu=BUDGET)`;
- accelerate:  `AutoModelForCausalLM.from_pretrained(DIR, device_map="auto", max_memory={"cpu": BUDGET}, offload_folder=...)`:
               what does not fit is read from the checkpoint whenever it is needed;
- accelerate-disk:  `from_pretrained(DIR)` and `disk_offload`, for which the model is loaded first and written to a second copy.

In every round the files are also read by none of them, around the page cache, at the speed of the device: no first output can
come much sooner than a process has opened the checkpoint and read it.

Both get the same dtype and the same input. "first output" is from the call that opens the checkpoint to the logits of one pass
over the prompt; "from start" is from the start of the process, imports included. Bytes written are those that the system
counts for the process, less what it writes to tell the result, which is nothing: that goes through a pipe.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from accelerate import disk_offload
from caps import Cap, Cgroup, make_cap
from offload_children import Child, Fate, forget_pages
from raw_speed import RawReader
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tierstore
from tierstore import format_size, parse_size

CONTENDERS = ("tierstore", "accelerate", "accelerate-disk")
TOKENS = 8


@dataclass(frozen=True)
class Task:
    """What one process is told: who it is, where the checkpoint and room for files are, the budget of weights in memory.

    `started`: when it was, by the system's monotonic clock.
    """

    contender: str
    checkpoint: str
    place: str
    budget: int
    started: float = 0.0

    def dumps(self) -> str:
        return json.dumps(asdict(self))


class CheckpointChild(Child):
    program = Path(__file__)


# -- the model ------------------------------------------------------------------------------------------------------------


KIND = LlamaForCausalLM  # named here, as transformers imports a model when it is named: not while somebody is being timed


def config_for(size: int) -> LlamaConfig:
    """Return a Llama-shaped config whose weights take about `size` bytes in bfloat16: 88 MiB a layer, and the rest 128 MiB."""
    layers = max(1, round((size - (128 << 20)) / (88.5 * (1 << 20))))
    return LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=16384, max_position_embeddings=512, dtype="bfloat16",
    )  # fmt: skip


def build(folder: str, size: int) -> None:
    torch.manual_seed(0)
    model = KIND(config_for(size)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")


def digest_of(model: Any) -> str:
    """Return a hash of the logits of one pass over a prompt."""
    with torch.no_grad():
        logits = model(torch.arange(TOKENS).mul(37)[None]).logits
    return hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()


# -- a child ----------------------------------------------------------------------------------------------------------------


def opened(task: Task) -> Any:
    if task.contender == "plain":
        return AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype="auto")
    if task.contender == "tierstore":
        return tierstore.from_pretrained(AutoModelForCausalLM, task.checkpoint, cpu=task.budget)
    if task.contender == "accelerate":
        memory = {"cpu": task.budget}
        return AutoModelForCausalLM.from_pretrained(
            task.checkpoint, dtype="auto", device_map="auto", max_memory=memory, offload_folder=task.place
        )
    model = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype="auto")
    return disk_offload(model, task.place, execution_device=torch.device("cpu"))


def work(task: Task) -> dict[str, Any]:
    begun, written = time.perf_counter(), bytes_written()
    model = opened(task)
    ready = time.perf_counter()
    digest = digest_of(model)
    ended = time.perf_counter()
    told = {
        "open": ready - begun,
        "first": ended - begun,
        "start": ended - task.started,
        "written": bytes_written() - written,
        "digest": digest,
    }
    if task.contender == "tierstore":
        tier = model.tiered.stats().tiers["cpu"]
        told["peak"], told["budget"] = tier.peak_bytes, tier.budget_bytes
    return told


def bytes_written() -> int:
    """Bytes that this process has handed to the system to write to files."""
    found = re.search(r"^write_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)
    return int(found[1]) if found else 0


# -- the parent -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    told: dict[str, Any]
    cap: Cap


def run(task: Task, limit: int | None) -> Outcome | Fate:
    """Run one process from a cold page cache; `Fate` if it has no result."""
    forget_pages(Path(task.checkpoint))
    cap = make_cap(limit, f"-{task.contender}")
    if limit is not None and not isinstance(cap, Cgroup):
        raise SystemExit("no memory cgroup can be made here (it takes root, and the memory controller)")
    with tempfile.TemporaryDirectory(dir=task.place) as place:
        child = CheckpointChild(Task(task.contender, task.checkpoint, place, task.budget, time.perf_counter()), cap)
        try:
            return Outcome(child.answer(), child.cap)
        except Fate as fate:
            return fate
        finally:
            child.close()


def raw_seconds(checkpoint: str) -> float:
    """Return how long the device needs for all bytes of a checkpoint."""
    total = 0.0
    for file in Path(checkpoint).glob("*.safetensors"):
        with RawReader(file) as reader:
            total += file.stat().st_size / reader.measure()
    return total


def table_of(runs: dict[str, list[Outcome | Fate]], expected: str) -> Table:
    table = Table(title="medians over rounds; ratio: seconds to first output over tierstore's")
    for name in (
        "contender",
        "open s",
        "first output s",
        "ratio",
        "from start s",
        "ratio from start",
        "peak",
        "anonymous",
        "written",
        "output",
    ):
        table.add_column(name, justify="left" if name in ("contender", "output") else "right")
    ours = [outcome for outcome in runs["tierstore"] if isinstance(outcome, Outcome)]
    for name, outcomes in runs.items():
        good = [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
        if not good or not ours:
            table.add_row(name, *[""] * 8, "; ".join({fate.short for fate in outcomes if isinstance(fate, Fate)}))
            continue
        fates = [fate.short for fate in outcomes if isinstance(fate, Fate)]
        words = ["as expected" if {o.told["digest"] for o in good} == {expected} else "DIFFERENT"]
        words += [f"{fates.count(fate)} of {len(outcomes)} {fate}" for fate in dict.fromkeys(fates)]
        table.add_row(name, *_cells(good, ours), ", ".join(words))
    return table


def _cells(good: list[Outcome], ours: list[Outcome]) -> list[str]:
    def median(of: list[Outcome], what: str) -> float:
        return statistics.median(outcome.told[what] for outcome in of)

    first, start = median(good, "first"), median(good, "start")
    return [
        f"{median(good, 'open'):.2f}",
        f"{first:.2f}",
        f"{first / median(ours, 'first'):.2f}",
        f"{start:.2f}",
        f"{start / median(ours, 'start'):.2f}",
        format_size(max(outcome.cap.peak for outcome in good)),
        format_size(max(outcome.cap.anonymous for outcome in good)),
        format_size(max(outcome.told["written"] for outcome in good)),
    ]


def measure(options: argparse.Namespace, place: str) -> int:
    console = Console(width=160, highlight=False)
    checkpoint = str(Path(place, "checkpoint"))
    build(checkpoint, options.size)
    size = sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors"))
    plain = run(Task("plain", checkpoint, place, options.budget), None)
    if isinstance(plain, Fate):
        raise plain
    runs: dict[str, list[Outcome | Fate]] = {name: [] for name in options.contenders}
    raw: list[float] = []
    for number in range(options.rounds):
        raw.append(raw_seconds(checkpoint))
        turn = number % len(options.contenders)
        for name in options.contenders[turn:] + options.contenders[:turn]:
            outcome = run(Task(name, checkpoint, place, options.budget), options.cap)
            runs[name].append(outcome)
            console.print(f"round {number + 1}: {name}: {outcome if isinstance(outcome, Fate) else outcome.told}")
    console.print(f"checkpoint {format_size(size)}, cap {format_size(options.cap)}, budget of weights {format_size(options.budget)}")
    console.print(table_of(runs, plain.told["digest"]))
    listed = ", ".join(f"{seconds:.2f}" for seconds in raw)
    console.print(f"reading the files with direct I/O, in the same rounds: {statistics.median(raw):.2f} s ({listed})")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default="2GiB", help="bytes of the checkpoint (default: %(default)s)")
    parser.add_argument("--cap", type=parse_size, default="700MiB", help="bytes that a process may have (default: %(default)s)")
    parser.add_argument("--budget", type=parse_size, default="160MiB", help="bytes of weights kept in memory (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--dir", help="where to put files, on a disk (default: a temporary directory)")
    parser.add_argument("task", nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        answer, sys.stdout = sys.stdout, sys.stderr
        print(json.dumps(work(Task(**json.loads(options.task)))), file=answer, flush=True)
        return 0
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.dir) as place:
        return measure(options, place)


if __name__ == "__main__":
    sys.exit(main())
