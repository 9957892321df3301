"""Runs a small random model of every transformers type plainly, tiered and with accelerate, and compares bit for bit.

    python bench/zoo.py [--only TYPE ...] [--limit N] [--no-peers] [--json FILE] [--jobs 2]

Tiered means a third of the model's bytes in the fast tier, a third in RAM, the rest on disk. Reloaded means saved by
transformers and opened by `tierstore.from_pretrained` with a third in RAM, against what transformers itself loads. Each model
runs in a process of its own: one that hangs or crashes costs its own row.
"""

import argparse
import json
import multiprocessing
import os
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from exact import Outcome, accelerate_offload, difference, reloaded_run, state_of, tiered_run
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from shrink import CannotBuild, Sample, build, grad_outcome, model_types, reason, run_outcome

THIRD = 1 / 3
EQUAL = "equal"


@dataclass
class Row:
    """What was found of one model; a verdict is `equal`, a difference, an error, or empty where it did not get that far."""

    model_type: str
    class_name: str = ""
    note: str = ""
    nbytes: int = 0
    largest: int = 0
    share: float = 0.0
    built: str = ""
    plain: str = ""
    plain_grads: str = ""
    outputs: str = ""
    grads: str = ""
    plain_reloaded: str = ""
    reloaded: str = ""
    peer_outputs: str = ""
    peer_grads: str = ""
    ended: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> str:
        """The first thing that is wrong with the tiered run, or with the whole process."""
        if self.built and self.built != EQUAL:
            return ""
        wrong = {
            "outputs": self.outputs,
            "gradients": self.grads if self.plain_grads == EQUAL else EQUAL,
            "reloaded": self.reloaded if self.plain_reloaded == EQUAL else EQUAL,
        }
        return "; ".join(f"{what}: {verdict or 'not reached'}" for what, verdict in wrong.items() if verdict != EQUAL)


def verdict(expected: Outcome, run: Callable[[], Outcome]) -> str:
    """Returns `equal`, or how the run differs, or what it raised."""
    try:
        return difference(expected, run()) or EQUAL
    except Exception as error:  # noqa: BLE001 - whatever a model raises is a finding
        return reason(error)


def examine(model_type: str, peers: bool, pipe: Connection) -> None:
    """Fills the row of one model, and sends it after every stage so that a crash loses only what follows."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row, start = Row(model_type), time.perf_counter()
    for _ in stages(row, peers):
        row.seconds = time.perf_counter() - start
        pipe.send(row)
    pipe.close()


def stages(row: Row, peers: bool) -> Iterator[None]:
    """Fills a row; yields where it is worth sending."""
    try:
        sample = build(row.model_type)
    except CannotBuild as error:
        row.built = str(error)
        yield
        return
    row.built, row.class_name, row.note = EQUAL, sample.class_name, sample.note
    row.nbytes, row.largest = sample.nbytes, sample.largest
    plain = run_outcome(sample)
    row.plain = verdict(plain, lambda: run_outcome(sample))
    with_grads, row.plain_grads = plain_gradients(sample)
    yield
    yield from tiered_stages(row, sample, plain, with_grads)
    yield from reload_stages(row, sample)
    if peers:
        row.peer_outputs = row.peer_grads = "crashed"
        yield
        peer_stages(row, sample, plain, with_grads)
        yield


def plain_gradients(sample: Sample) -> tuple[Outcome | None, str]:
    """Returns what the plain model's backward gives and whether it gives it twice; nothing where it has no backward."""
    try:
        first = grad_outcome(sample)
    except Exception as error:  # noqa: BLE001 - not every plain model can go backward; the row says so
        return None, reason(error)
    if all(grad is None for grad in first.grads.values()):
        return None, "no gradients"
    return first, verdict(first, lambda: grad_outcome(sample))


def tiered_stages(row: Row, sample: Sample, plain: Outcome, with_grads: Outcome | None) -> Iterator[None]:
    """Runs tiered, without and with gradients; the verdict includes the model's state after the session has ended."""
    before = state_of(sample.model)

    def tier(run: Callable[[Sample], Outcome]) -> Outcome:
        outcome, share = tiered_run(sample.model, lambda: run(sample))
        row.share = max(row.share, share)
        return outcome

    def after(found: str) -> str:
        left = difference(before, state_of(sample.model)) if found == EQUAL else ""
        return f"state afterwards: {left}" if left else found

    row.outputs = "crashed"
    yield
    row.outputs = after(verdict(plain, lambda: tier(run_outcome)))
    row.grads = "crashed" if with_grads else ""
    yield
    if with_grads:
        row.grads = after(verdict(with_grads, lambda: tier(grad_outcome)))
    yield


def reload_stages(row: Row, sample: Sample) -> Iterator[None]:
    """Saves the model and runs it from there; what transformers itself cannot load twice with the same outputs is not compared."""
    kind = type(sample.model)
    with tempfile.TemporaryDirectory(prefix="zoo-checkpoint-") as folder:

        def loaded() -> Outcome:
            return run_outcome(replace(sample, model=kind.from_pretrained(folder)))

        row.plain_reloaded = "crashed"
        yield
        try:
            sample.model.save_pretrained(folder)
            expected = loaded()
        except Exception as error:  # noqa: BLE001 - not every model can be saved and loaded; the row says so
            row.plain_reloaded = reason(error)
            yield
            return
        row.plain_reloaded, row.reloaded = verdict(expected, loaded), "crashed"
        yield
        row.reloaded = verdict(
            expected, lambda: reloaded_run(kind, folder, sample.nbytes, lambda model: run_outcome(replace(sample, model=model)))
        )
        yield


def peer_stages(row: Row, sample: Sample, plain: Outcome, with_grads: Outcome | None) -> None:
    """Does the same with accelerate; it comes last because it leaves the model unusable."""
    try:
        with accelerate_offload(sample.model):
            row.peer_outputs = verdict(plain, lambda: run_outcome(sample))
            row.peer_grads = verdict(with_grads, lambda: grad_outcome(sample)) if with_grads else ""
    except Exception as error:  # noqa: BLE001 - a model that it cannot offload is a finding
        row.peer_outputs = row.peer_grads = reason(error)


def examine_all(types: list[str], peers: bool, jobs: int, seconds: float, progress: Progress) -> list[Row]:
    """Examines each type in a process of its own, `jobs` at a time, and ends those that take too long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo"])
    waiting, rows = list(reversed(types)), {name: Row(name) for name in types}
    running: dict[Connection, tuple[str, BaseProcess, float]] = {}
    task = progress.add_task("models", total=len(types))
    while waiting or running:
        while waiting and len(running) < jobs:
            name, (receiver, sender) = waiting.pop(), context.Pipe(duplex=False)
            process = context.Process(target=examine, args=(name, peers, sender))
            process.start()
            sender.close()
            running[receiver] = (name, process, time.monotonic() + seconds)
        for pipe in wait(list(running), timeout=1):
            if not take(pipe, rows):
                finish(running.pop(pipe), rows, "")
                progress.advance(task)
        for pipe in [p for p, (_, _, deadline) in running.items() if time.monotonic() > deadline]:
            finish(running.pop(pipe), rows, f"longer than {seconds:.0f} s")
            progress.advance(task)
    return list(rows.values())


def take(pipe: Connection, rows: dict[str, Row]) -> bool:
    """Stores one row that has arrived; False when the process has nothing more to say."""
    try:
        row = pipe.recv()
    except EOFError:
        return False
    rows[row.model_type] = row
    return True


def finish(job: tuple[str, BaseProcess, float], rows: dict[str, Row], late: str) -> None:
    """Ends a process and notes in its row why it has not got to the end."""
    name, process, _ = job
    if late:
        process.kill()
    process.join()
    row = rows[name]
    row.ended = late or (f"exit code {process.exitcode}" if process.exitcode else "")
    if row.ended:
        row.built = row.built or row.ended


def mark(text: str) -> str:
    return {EQUAL: "[green]yes", "": "-"}.get(text, "[red]no")


def show(console: Console, rows: list[Row]) -> None:
    """Prints one line for each model that was built."""
    table = Table(
        "type", "class", "KiB", "largest", "fast tier", "repeats", "outputs", "grads", "reloaded", "acc. outputs", "acc. grads", "s", "note"
    )
    for row in rows:
        if row.built == EQUAL:
            sizes = (f"{row.nbytes >> 10}", f"{row.largest / max(row.nbytes, 1):.0%}", f"{row.share:.0%}")
            marks = map(mark, (row.plain, row.outputs, row.grads, row.reloaded, row.peer_outputs, row.peer_grads))
            table.add_row(row.model_type, row.class_name, *sizes, *marks, f"{row.seconds:.1f}", row.note)
    console.print(table)


def summarize(console: Console, rows: list[Row]) -> None:
    """Prints what did not build, what differs, and the totals."""
    built = [row for row in rows if row.built == EQUAL]
    trained = [row for row in built if row.plain_grads == EQUAL]
    saved = [row for row in built if row.plain_reloaded == EQUAL]
    for row in rows:
        if row.built != EQUAL:
            console.print(f"not built: {row.model_type}: {row.built}", markup=False)
    for row in built:
        if row.plain != EQUAL or row.plain_grads != EQUAL:
            console.print(f"plain run: {row.model_type}: outputs {row.plain}; gradients {row.plain_grads}", markup=False)
        if row.plain_reloaded != EQUAL:
            console.print(f"plain, saved and loaded: {row.model_type}: {row.plain_reloaded}", markup=False)
        if row.ended:
            console.print(f"ended early: {row.model_type}: {row.ended}", markup=False)
    for row in built:
        if row.failed:
            console.print(f"FAILED: {row.model_type} ({row.class_name}): {row.failed}", markup=False)
    peer_errors = Counter(row.peer_outputs.split("(")[0][:100] for row in built if row.peer_outputs not in (EQUAL, ""))
    for error, count in peer_errors.most_common(8):
        console.print(f"accelerate outputs, {count} models: {error}", markup=False)
    silent = sum(row.peer_grads.endswith("is missing") for row in trained)
    peer_grads = sum(row.peer_grads == EQUAL for row in trained)
    lines = [
        f"built {len(built)} of {len(rows)} types, of which {len(trained)} have a repeatable backward when plain",
        f"fast tier larger than a third, because one operation needs more: {sum(row.share > THIRD for row in built)}",
        f"tiered: outputs equal {sum(row.outputs == EQUAL for row in built)} of {len(built)}",
        f"tiered: outputs and gradients equal {sum(row.grads == EQUAL for row in trained)} of {len(trained)}",
        f"from_pretrained: outputs equal {sum(row.reloaded == EQUAL for row in saved)} of {len(saved)} that transformers saves and loads",
        f"accelerate disk_offload: outputs equal {sum(row.peer_outputs == EQUAL for row in built)} of {len(built)}",
        f"accelerate disk_offload: gradients equal {peer_grads} of {len(trained)}, silently missing {silent}",
    ]
    console.print("\n".join(lines), highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description="every transformers type, plain against tiered, bit for bit")
    parser.add_argument("--only", nargs="*", default=[], metavar="TYPE", help="model types such as llama")
    parser.add_argument("--limit", type=int, help="the first N types")
    parser.add_argument("--no-peers", action="store_true", help="leave accelerate out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--seconds", type=float, default=180.0, help="time limit for one model")
    chosen = parser.parse_args()
    console, start = Console(width=190), time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        types = chosen.only or model_types()[: chosen.limit]
        rows = examine_all(types, not chosen.no_peers, chosen.jobs, chosen.seconds, progress)
    show(console, rows)
    summarize(console, rows)
    console.print(f"{time.perf_counter() - start:.0f} s")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
