"""Three tiers at once: a decoder larger than GPU and RAM budgets together, against a reference made layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gpu_contenders import Task
from gpu_models import DecoderShape
from gpu_results import Results
from gpu_rows import TierRow
from gpu_study import LATE, MARGIN, Deadline, GpuChild, Say, told_once
from offload_children import Fate, available_bytes

PATIENCE = 900.0  # seconds; to make and place 40 GB takes a while where the disk is slow
SPARE = 4 << 30  # bytes of RAM that the model must leave free while it is made


@dataclass(frozen=True)
class Tiers:
    """What is asked for; `gpu` and `cpu` are budgets in bytes."""

    shape: DecoderShape
    gpu: int
    cpu: int
    tokens: tuple[int, ...]
    rounds: int
    device: str
    place: str
    deadline: Deadline


def run_tiers(tiers: Tiers, results: Results, say: Say, save: Callable[[], None]) -> None:
    """Measure it; each row that does not come about says why."""
    try:
        rows = begin(tiers, results, say)
    except Fate as fate:
        results.note(f"three tiers: {fate}")
        say(f"three tiers: {fate.short}")
        return
    results.tiers += rows
    try:
        measure(tiers, rows, results, say, save)
    except Fate as fate:
        for row in rows:
            row.fate = row.fate if row.told else fate.short
        results.note(f"three tiers: {fate}")
        say(f"three tiers: {fate.short}")
    save()


def begin(tiers: Tiers, results: Results, say: Say) -> list[TierRow]:
    """Return the rows, with what a layer-by-layer pass answers and takes."""
    shape, need = tiers.shape, tiers.shape.bytes + (SPARE if tiers.shape.bytes > SPARE else 0)
    if need > available_bytes():
        raise Fate("no RAM", f"making the model takes {need / 1e9:.0f} GB of RAM, of which {available_bytes() / 1e9:.0f} GB are available")
    rows = []
    child = GpuChild(Task("reference", "plain", shape, tiers.device, tiers.place, tiers.tokens))
    try:
        for tokens in tiers.tokens:
            told = child.ask(str(tokens))
            rows.append(
                TierRow(
                    tokens=tokens,
                    touched=shape.touched(tokens),
                    gpu=tiers.gpu,
                    cpu=tiers.cpu,
                    total=shape.bytes,
                    pair=shape.pair,
                    compute=told["seconds"],
                    rate=results.ceilings.best,
                    disk_rate=results.ceilings.disk_best,
                    digest=told["digest"],
                )
            )
            say(f"three tiers, {tokens} tokens: the reference is known, {told['seconds']:.4f} s of computing")
    finally:
        child.close()
    return rows


def measure(tiers: Tiers, rows: list[TierRow], results: Results, say: Say, save: Callable[[], None]) -> None:
    needs = told_once(Task("calibrate", "plain", tiers.shape, tiers.device, tiers.place, tiers.tokens))["needs"]
    allowances = {tokens: need + MARGIN for tokens, need in zip(tiers.tokens, needs, strict=True)}
    task = Task("run", "tierstore", tiers.shape, tiers.device, tiers.place, tiers.tokens, tiers.gpu, tiers.cpu, allowances=allowances)
    child = GpuChild(task, PATIENCE)
    try:
        say(f"three tiers: placed in {child.answer()['set_up']:.1f} s")
        for row in rows:
            if tiers.deadline.passed():
                raise LATE
            child.ask(f"warm {row.tokens}")
            for _ in range(tiers.rounds):
                if row.told and tiers.deadline.passed():
                    break
                row.told.append(child.ask(f"turn {row.tokens}"))
                save()
            if not row.equal:
                apart = child.ask(f"differ {row.tokens}")["difference"]
                results.note(f"three tiers, {row.tokens} tokens: the output is not the reference's; largest difference {apart}")
            say(f"three tiers, {row.tokens} tokens: {row.seconds:.3f} s, bound {row.bound:.3f} s ({row.limit})")
    finally:
        child.close()
