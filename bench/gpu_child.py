"""The child processes of `gpu_offload.py`: one task each, told as JSON on the command line, answered as JSON, a line at a time.

What is asked of a child that runs a contender ("wishes", each with a number of tokens):

- warm:    cap the device's memory, run until the contender is at its best, forget the peaks;
- turn:    one pass that does not count, then a few in a row that do;
- expect:  one pass, whose output is kept for others to compare with;
- differ:  one pass, whose output is compared with the one kept;
- traffic: one pass under torch's profiler, which counts the bytes of all copies.
"""

from __future__ import annotations

import ctypes
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_ceilings import Ceilings, measure_disk, measure_links
from gpu_contenders import CONTENDERS, Contender, Task
from gpu_device import Device, device_called
from gpu_models import DecoderShape, layer_by_layer, made
from offload_contenders import UnableError, digest, take_standard_output
from torch import Tensor

Told = dict[str, Any]

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
TURN_SECONDS, MOST_PASSES, LONG_PASS, LATER_WARM_UPS = 0.4, 8, 1.0, 2


class Runner:
    """Runs the passes of one contender."""

    def __init__(self, contender: Contender, task: Task, device: Device) -> None:
        self.contender, self.task, self.device, self.warmed = contender, task, device, False
        started = time.perf_counter()
        if contender.capped:
            device.limit(task.cap())
        self.answer = contender.start(task, device)
        device.wait()
        self.set_up = time.perf_counter() - started

    @torch.no_grad()
    def once(self, given: Tensor) -> Tensor:
        """Run one pass to its end."""
        output = self.task.shape.run(self.answer, given)
        self.device.wait()
        return output

    def given(self, tokens: int) -> Tensor:
        return self.task.shape.given(tokens, self.device.torch)

    def limit(self, tokens: int) -> None:
        if self.contender.capped:
            self.device.limit(self.task.cap(tokens))

    def warm(self, tokens: int) -> Told:
        self.limit(tokens)
        given = self.given(tokens)
        for _ in range(min(LATER_WARM_UPS, self.contender.warm_ups) if self.warmed else self.contender.warm_ups):
            self.once(given)
        self.warmed = True
        self.device.restart_peak()
        return {}

    def turn(self, tokens: int) -> Told:
        """Return the seconds of one forward, and what was moved for it; both are means over the passes of this turn."""
        given, forwards = self.given(tokens), self.task.shape.forwards
        started = time.perf_counter()
        output = self.once(given)
        passes = passes_of(time.perf_counter() - started)
        before, started = self.contender.carried(), time.perf_counter()
        for _ in range(passes):
            del output  # it would count twice in the peak
            output = self.once(given)
        seconds, after = time.perf_counter() - started, self.contender.carried()
        links = {name: (after[name] - before.get(name, 0)) / passes / forwards for name in after}
        return {
            "seconds": seconds / passes / forwards,
            "passes": passes,
            "links": links,
            "rings": self.contender.rings(),
            "digest": digest(output.cpu()),
            "peaks": self.device.peaks(),
        }

    def expect(self, tokens: int) -> Told:
        output = self.once(self.given(tokens)).cpu()
        torch.save(output, self.task.expected(tokens))
        return {"digest": digest(output)}

    def differ(self, tokens: int) -> Told:
        """Return the largest difference from the expected output, as a part of its largest value."""
        expected = torch.load(self.task.expected(tokens), weights_only=True).float()
        difference = (self.once(self.given(tokens)).cpu().float() - expected).abs().max() / expected.abs().max()
        return {"difference": difference.item() if difference.isfinite() else None}

    def traffic(self, tokens: int) -> Told:
        """Return the bytes copied for one forward."""
        self.limit(tokens)
        given = self.given(tokens)
        self.once(given)
        copied = self.device.traffic(lambda: self.once(given))
        return {name: nbytes / self.task.shape.forwards for name, nbytes in copied.items()}


def passes_of(seconds: float) -> int:
    """Return how many passes of so many seconds make a turn: several where they are short."""
    return 1 if seconds > LONG_PASS else max(2, min(MOST_PASSES, math.ceil(TURN_SECONDS / seconds)))


# -- actions ------------------------------------------------------------------------------------------------------------


def run(task: Task, device: Device, wishes: Iterable[str]) -> Iterator[Told]:
    """Set a contender up, say how long that took, and do what is asked for."""
    runner = Runner(CONTENDERS[task.contender](), task, device)
    can: dict[str, Callable[[int], Told]] = {
        "warm": runner.warm,
        "turn": runner.turn,
        "expect": runner.expect,
        "differ": runner.differ,
        "traffic": runner.traffic,
    }
    try:
        yield {"set_up": runner.set_up}
        for line in wishes:
            wish, tokens = line.split()
            yield can[wish](int(tokens))
    finally:
        runner.contender.stop()


def ceilings(task: Task, device: Device, wishes: Iterable[str]) -> Iterator[Told]:
    """Measure the links with `task.budget` bytes and the disk with a file of `task.ram` bytes."""
    found: Ceilings = measure_links(device, task.budget)
    if task.ram:
        try:
            found.disk = measure_disk(Path(task.place), task.ram)
        except OSError as error:
            found.trouble = f"the disk could not be measured: {error}"
    yield asdict(found)


@torch.no_grad()
def calibrate(task: Task, device: Device, wishes: Iterable[str]) -> Iterator[Told]:
    """Run one layer that is all on the device; return the bytes that passes need beside weights, for each number of tokens."""
    shape = task.shape.with_layers(1)
    model = made(shape, device.torch)
    device.limit(device.memory()[1])  # nothing is cached any more
    needs = []
    for tokens in task.tokens:
        device.restart_peak()
        for _ in range(2):
            output = shape.run(model, shape.given(tokens, device.torch))
            del output
        device.wait()
        needs.append(max(0, device.peaks().get("reserved", 0) - shape.bytes))
    yield {"needs": needs}


def reference(task: Task, device: Device, wishes: Iterable[str]) -> Iterator[Told]:
    """For each number of tokens asked for: what a decoder must answer, and how long that takes at least, a layer at a time in memory."""
    assert isinstance(task.shape, DecoderShape)
    for line in wishes:
        tokens = int(line)
        output, seconds = layer_by_layer(task.shape, tokens, device.torch, device.wait)
        output = output.cpu()
        torch.save(output, task.expected(tokens))
        yield {"seconds": seconds, "digest": digest(output)}


ACTIONS = {"run": run, "ceilings": ceilings, "calibrate": calibrate, "reference": reference}


def told_of(error: Exception) -> Told:
    """Return what a failure looks like to the parent."""
    if isinstance(error, UnableError):
        short = error.short
    else:
        short = "OOM" if isinstance(error, (torch.OutOfMemoryError, MemoryError)) else "error"
    return {"error": f"{type(error).__name__}: {error}".split("\n", 1)[0][:300], "short": short}


def die_with_parent() -> None:
    """Have the system kill this process when its parent ends, however that happens: stopped by a signal, it would stay, with its memory."""
    with suppress(OSError, AttributeError):  # other systems than Linux
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


def main() -> int:
    die_with_parent()
    answers = take_standard_output()
    task = Task.loads(sys.argv[1])
    try:
        for told in ACTIONS[task.action](task, device_called(task.device), sys.stdin):
            print(json.dumps(told), file=answers)
    except Exception as error:  # whatever a peer raises goes into its cell
        print(json.dumps(told_of(error)), file=answers)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
