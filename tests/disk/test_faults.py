"""Every file call of a workload fails in turn: nothing is lost, nothing is wrong in silence, nothing hangs."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

from tests.disk.conftest import MEMORY
from tierstore import TierStoreError, tiered
from tierstore.backends.disk import DiskBackend
from tierstore.spec import TensorSpec
from tierstore.testing.interposed import Failing, Failure
from tierstore.testing.values import bits, make_value

Values = dict[str, torch.Tensor]

MADE_LATE = ("write", "truncate", "reserve", "sync", "link", "rename", "unlink", "make_folder", "commit", "advise", "close", "unlock")
"""What may have been done although an error is reported; an `open` like that would lose a descriptor."""


class Unsynced(Failing):
    """Counts and fails flushes, but does not wait for the device."""

    def sync(self, descriptor: int) -> None:
        self.around("sync", lambda: None)


@pytest.fixture
def place() -> Iterator[Path]:
    with TemporaryDirectory(dir=MEMORY, prefix="tierstore-test-") as folder:
        yield Path(folder)


def steps(store: DiskBackend, made: dict[str, torch.Tensor | None]) -> Iterator[Callable[[], None]]:
    """Yield puts, overwrites, reads and deletions; `made` hears before each step what its key will be if it ends well."""
    for number, (key, size) in enumerate((("a", 3), ("b", 3000), ("a", 500), ("b", None), ("c", 1), ("c", 9000), ("a", None))):
        value = None if size is None else make_value(size=size, seed=number)
        made[key] = value
        yield (lambda key=key: store.delete(key)) if value is None else (lambda key=key, value=value: store.put(key, value))  # type: ignore[misc]
        if value is not None:
            yield lambda key=key: check(store, key)  # type: ignore[misc]


def check(store: DiskBackend, key: str) -> None:
    """Read a value twice, mapped and as a transfer does it."""
    store.get(key)
    extent = store.extent(key)
    if extent.file is not None and extent.file.share():
        try:
            extent.prove(extent.file)
        finally:
            extent.file.close()


def run(root: Path, system: Failing) -> tuple[int, list[Values]]:
    """Do all steps, whatever fails; return how many failed, and what the store may hold."""
    failed, expected, made = 0, [Values()], dict[str, torch.Tensor | None]()
    try:
        store = DiskBackend(root, system=system, verify="always")
    except TierStoreError:
        return 1, expected
    for step in steps(store, made):
        changed = [apply(values, made) for values in expected]
        try:
            step()
            expected = changed
        except KeyError:  # it is not stored, because that failed before
            pass
        except TierStoreError:
            failed += 1
            expected = [*expected, *changed]
        made.clear()
    store.close()
    return failed, expected


def apply(values: Values, made: dict[str, torch.Tensor | None]) -> Values:
    after = {**values, **{key: value for key, value in made.items() if value is not None}}
    return {key: value for key, value in after.items() if key not in made or made[key] is not None}


def holds(root: Path, expected: list[Values]) -> bool:
    with closing(DiskBackend(root, verify="always")) as store:
        found = {key: (spec, bits(store.get(key))) for key, spec in store.entries()}
    return found in [{key: (TensorSpec.of(value), bits(value)) for key, value in values.items()} for values in expected]


@pytest.mark.parametrize(
    ("failure", "lasting", "late"),
    [
        pytest.param(errno.ENOSPC, False, False, id="full once"),
        pytest.param(errno.ENOSPC, True, False, id="full"),
        pytest.param(errno.EIO, False, False, id="a failure"),
        pytest.param(errno.EIO, True, False, id="failures from then on"),
        pytest.param(errno.EIO, False, True, id="a failure after it was done"),
        pytest.param("short", False, False, id="a short transfer"),
        pytest.param("short", True, False, id="short transfers"),
    ],
)
def test_whichever_call_fails_nothing_is_lost(place: Path, failure: Failure, lasting: bool, late: bool) -> None:
    """A step that raised may have come true only if nobody could know; one that did not raise has."""
    nth, failed_steps = 0, 0
    while True:
        nth += 1
        root, system = place / str(nth), Unsynced()
        system.arm(failure, nth, calls=MADE_LATE if late else (), lasting=lasting, late=late)
        failed, expected = run(root, system)
        fired = system.fired
        assert holds(root, expected), f"call {nth}: {system.names_called[nth - 1]}"
        assert DiskBackend.verify(root).sound
        shutil.rmtree(root)
        failed_steps += failed
        if not fired:
            break
    print(f"{nth - 1} calls, {failed_steps} steps failed")  # noqa: T201
    assert nth > (20 if failure == "short" else 70)
    assert (failed_steps > 20) == (failure != "short"), "short transfers are continued, and everything else is told"


# --- a whole pass of a model ------------------------------------------------------------------------------------------


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.stress)])
@pytest.mark.parametrize("durable", [True, False], ids=["durable", "scratch"])
@pytest.mark.parametrize("failure", [errno.EIO, errno.ENOSPC, "short"])
@torch.no_grad()
def test_a_model_whose_disk_fails_raises_or_is_right(place: Path, failure: Failure, durable: bool, stride: int) -> None:
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(2, 96)
    expected, weights = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    raised = 0
    for nth in range(1, 1000, stride):
        system = Unsynced()
        root = place / str(nth)
        disk = DiskBackend(root, system=system, verify="always") if durable else DiskBackend.scratch(root, system=system, verify="always")
        system.arm(failure, nth)
        try:
            with tiered(model, cpu=100_000, disk=disk, device="cpu"):
                for _ in range(2):
                    try:
                        assert torch.equal(model(x), expected)
                    except TierStoreError:
                        raised += 1
                fired = system.fired
                system.disarm()
                assert durable or torch.equal(model(x), expected), "it goes on when the fault has gone"
        except TierStoreError:  # when weights are placed, nothing has been taken from the model yet
            raised += 1
            fired = system.fired
            system.disarm()
        assert {name: value.tolist() for name, value in model.state_dict().items()} == {k: v.tolist() for k, v in weights.items()}
        shutil.rmtree(root, ignore_errors=True)
        if not fired:
            break
    print(f"{nth // stride} of {nth} calls failed, {raised} times an error was raised")  # noqa: T201
    assert nth > 8
    assert (raised > 0) == (failure != "short")
