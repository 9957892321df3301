"""The parent's side of the children of `cpu_offload.py`: started under a cap, asked over pipes, stopped while others run."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from caps import Cap, Cgroup, make_cap
from offload_contenders import CONTENDERS, Task

CHILD = Path(__file__).with_name("offload_contenders.py")
SAMPLE_SECONDS, ANSWER_SECONDS = 0.05, 300.0
UNLIMITED = 1 << 40
MARGIN = 32 << 20  # for what calibration does not see: kernel memory of I/O, fragments of the heap, pages on their way to the disk


class Fate(Exception):  # noqa: N818  not an error of ours: it becomes a cell of the table
    """Why a contender has no figure: its short form, and the whole story."""

    def __init__(self, short: str, story: str) -> None:
        super().__init__(story)
        self.short, self.story = short, story


class Errand(Protocol):
    """What a child is told."""

    @property
    def contender(self) -> str: ...
    @property
    def place(self) -> str: ...
    def dumps(self) -> str:
        """Return it as text for a command line."""
        ...


class Child:
    """One child process under `cap`, which it closes. Between `ask`s it is stopped by a signal: it can neither read ahead nor compute.

    Subclasses may run another `program`, which speaks the same way, and say otherwise what a kill by the kernel means.
    """

    program, patience, killed = CHILD, ANSWER_SECONDS, "killed by the kernel: out of memory under the cap"

    def __init__(self, task: Errand, cap: Cap) -> None:
        self.cap = cap
        self._errors = Path(task.place, f"{task.contender}.errors")
        command = ["sh", "-c", f'{cap.prelude} && exec "$@"', "sh", sys.executable, str(self.program), task.dumps()]
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        self._unread = b""

    def ask(self, wish: str) -> dict[str, Any]:
        """Let the child go on, hand it one line, and return its answer; raise `Fate` if there is none."""
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, which the missing answer tells
            self._process.stdin.write(f"{wish}\n".encode())
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return the child's next answer, and stop it."""
        line = self._read_line()
        self._process.send_signal(signal.SIGSTOP)
        with suppress(OSError):
            self.cap.sample(self._process.pid)
        if not line:
            raise self._how_it_died()
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise Fate(told["short"], told["error"])
        return told

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        source, until = self._process.stdout.fileno(), time.monotonic() + self.patience
        while b"\n" not in self._unread:
            if select.select([source], [], [], SAMPLE_SECONDS)[0]:
                piece = os.read(source, 1 << 16)
                if not piece:
                    return b""
                self._unread += piece
            with suppress(OSError):
                self.cap.sample(self._process.pid)
            if time.monotonic() > until:
                self._process.kill()
                raise Fate("too slow", f"no answer within {self.patience:.0f} s")
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _how_it_died(self) -> Fate:
        self._process.send_signal(signal.SIGCONT)
        code = self._process.wait(60)
        if code == -signal.SIGKILL:
            return Fate("killed", self.killed)
        words = next((line for line in reversed(self._errors.read_text().splitlines()) if line.strip()), "no message")
        return Fate("died", f"exit status {code}: {words[:200]}")

    def close(self) -> None:
        """End the process, kindly if it lives, and remove the cap."""
        self._process.send_signal(signal.SIGCONT)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.cap.close()


def refuse_missing(name: str) -> None:
    """Raise `Fate` if a contender's libraries are not installed."""
    missing = [module for module in CONTENDERS[name].modules if find_spec(module) is None]
    if missing:
        raise Fate("not installed", f"needs {', '.join(missing)}")


def start(task: Task, limit: int | None) -> Child:
    """Start a child with at most `limit` bytes; raise `OSError` where no memory cgroup can be made."""
    cap = make_cap(limit, f"-{task.contender}")
    if limit is not None and not isinstance(cap, Cgroup):
        raise OSError("no memory cgroup can be made here (it takes root, and the memory controller)")
    try:
        return Child(task, cap)
    except BaseException:
        cap.close()
        raise


def once(task: Task, limit: int | None) -> tuple[dict[str, Any], Cap]:
    """Run a child that answers once; return the answer and its cap's figures."""
    child = start(task, limit)
    try:
        return child.answer(), child.cap
    finally:
        child.close()


def survives(task: Task, limit: int | None) -> bool:
    """Return whether a contender does two passes of each kind without being killed."""
    child = start(task, limit)
    try:
        child.answer()
        for tokens in task.tokens * 2:
            child.ask(f"pass {tokens}")
    except Fate as fate:
        return fate.short != "killed"  # anything else will be told by the child that is measured
    finally:
        child.close()
    return True


def allowance_of(task: Task) -> int:
    """Return the bytes that a contender's process needs beside weights: interpreter, libraries, activations, a margin.

    Measured as the peak of a cgroup without limit, less page cache and the one layer's weights, while the contender's
    libraries are imported and a plain decoder of one layer runs the largest pass.
    """
    told, cap = once(task, UNLIMITED)
    return cap.peak - cap.cached - int(told["weights"]) + MARGIN


def forget_pages(place: Path) -> None:
    """Flush every file below `place` and drop it from the page cache, or a child would use pages that others pay for."""
    for file in place.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with suppress(FileNotFoundError), file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def available_bytes() -> int:
    """Return how much memory the machine could give to new processes."""
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024
