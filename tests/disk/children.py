"""What child processes of tests do. They are forked from a server that has torch, but none of its threads, or they would hang."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess

import torch

from tierstore.backends.disk import DiskBackend
from tierstore.spec import TensorSpec
from tierstore.testing.values import LAYOUTS, bits, make_value

Value = tuple[TensorSpec, bytes]
Step = tuple[str, Value | None]  # key and new value, or None to delete it


class Child:
    """A process that runs `target(*arguments, connection)`, with the other end of the connection."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        context: ForkServerContext = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pytest", "tests.disk.children"])
        self.channel, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(target=target, args=(*arguments, theirs))
        self.process.start()
        theirs.close()

    def kill(self) -> list[object]:
        """Kill the process and return what it had said and nobody has heard."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        return self.end()

    def end(self) -> list[object]:
        """Wait for the end of the process and return what nobody has heard."""
        messages: list[object] = []
        with self.channel:
            while True:
                try:
                    messages.append(self.channel.recv())
                except (EOFError, OSError):
                    break
        self.process.join()
        self.process.close()
        return messages


def do_nothing(channel: Connection) -> None:
    channel.send("done")


def write_until_killed(root: str, seed: int, channel: Connection) -> None:
    """Do random steps for ever; say before each of them which it is, and "done" after it."""
    store = DiskBackend(root)
    rng = random.Random(seed)
    while True:
        key, value = _random_step(rng, {key for key, _ in store.entries()})
        channel.send((key, None if value is None else (TensorSpec.of(value), bits(value))))
        if value is None:
            store.delete(key)
        else:
            store.put(key, value)
        channel.send("done")


def _random_step(rng: random.Random, present: set[str]) -> tuple[str, torch.Tensor | None]:
    key = f"key {rng.randrange(5)}"
    if key in present and rng.random() < 0.25:
        return key, None
    size = rng.choice((1, 2, 100, 5000, 60_000))
    return key, make_value(torch.float32, rng.choice(sorted(LAYOUTS)), size, seed=rng.randrange(1 << 30))


def fill_scratch(folder: str, channel: Connection) -> None:
    scratch = DiskBackend.scratch(folder)
    for number in range(20):
        scratch.put(str(number), torch.zeros(1 << 20, dtype=torch.uint8))
    channel.send("full")
    time.sleep(60)


def read_keys(root: str, channel: Connection) -> None:
    """Read "a" and "b" until told to stop; say "sound" if every value was filled with one number, and none was lower than before."""
    with closing(DiskBackend.reader(root, verify="always")) as reader:
        channel.send("reading")
        highest = {"a": 0, "b": 0}
        while not channel.poll():
            reader.refresh()
            for key, least in highest.items():
                value = reader.get(key)
                highest[key] = int(value[0])
                if highest[key] < least or not bool((value == value[0]).all()):
                    channel.send(f"{key} was {least}, and then {value}")
                    return
        channel.send("sound")
