"""The disk store after crashes: at every file call with the power gone, and killed at random moments."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tests.disk.children import Child, Value, fill_scratch, write_until_killed
from tests.disk.children import Step as CodedStep
from tests.disk.conftest import MEMORY, Unflushed
from tests.disk.golden import DISK_1, golden_values
from tierstore.backends._disk import direct, upkeep, writing
from tierstore.backends.disk import DiskBackend
from tierstore.spec import TensorSpec
from tierstore.testing.crashes import crash_states
from tierstore.testing.recording import Mark, Node, Recorder, Sync
from tierstore.testing.values import bits, make_value

Values = dict[str, torch.Tensor]
Step = tuple[str, torch.Tensor | None]  # key and new value, or None to delete it
Stored = dict[str, Value]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory if there is one: nothing here needs the device to have taken anything."""
    with TemporaryDirectory(dir=MEMORY, prefix="tierstore-test-") as folder:
        yield Path(folder)


def steps_of(seed: int, count: int) -> list[Step]:
    """Return puts, overwrites and deletions of few keys, of sizes below and above a page."""
    rng, present, steps = random.Random(seed), set[str](), list[Step]()
    for number in range(count):
        key = f"key {rng.randrange(4)}"
        if key in present and rng.random() < 0.3:
            present.discard(key)
            steps.append((key, None))
        else:
            present.add(key)
            layout = rng.choice(("contiguous", "transposed", "sliced", "scalar", "empty"))
            steps.append((key, make_value(torch.int16, layout, rng.choice((3, 500, 3000)), seed=number)))
    return steps


def take(values: Values, step: Step) -> Values:
    key, value = step
    after = {name: old for name, old in values.items() if name != key}
    return after if value is None else after | {key: value}


def do(store: DiskBackend, step: Step) -> None:
    key, value = step
    if value is None:
        store.delete(key)
    else:
        store.put(key, value)


def same(store: DiskBackend, expected: Values) -> bool:
    """True if a store holds just these values, bit for bit; every error is raised."""
    if dict(store.entries()) != {key: TensorSpec.of(value) for key, value in expected.items()}:
        return False
    return all(bits(store.get(key)) == bits(value) for key, value in expected.items())


# --- every call, with the power gone ---------------------------------------------------------------------------------


class Plain(Recorder):
    """A file system that has no files without a name."""

    def open_unnamed(self, folder: int) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def record(place: Path, steps: list[Step], *, reopen_after: int, kind: type[Recorder] = Recorder) -> Recorder:
    """Run a workload over a recorder, which also hears when each step begins and ends."""
    root = place / "recorded"
    root.mkdir()
    recorder = kind(root)
    store = DiskBackend(root, system=recorder)
    for number, step in enumerate(steps):
        if number == reopen_after:
            store.close()
            store = DiskBackend(root, system=recorder)
        recorder.mark(f"begin {number}")
        do(store, step)
        recorder.mark(f"end {number}")
    store.close()
    recorder.end()
    return recorder


def allowed(recorder: Recorder, steps: list[Step], made: int) -> list[Values]:
    """Return what a store may hold after so many calls: all steps that have ended, and perhaps the one that had begun."""
    begun = sum(isinstance(op, Mark) and op.text.startswith("begin") for op in recorder.log[:made])
    ended = sum(isinstance(op, Mark) and op.text.startswith("end") for op in recorder.log[:made])
    values: Values = {}
    for step in steps[:ended]:
        values = take(values, step)
    return [values, take(values, steps[ended])] if begun > ended else [values]


def failures(recorder: Recorder, steps: list[Step], place: Path, chosen: int, seed: int) -> Iterator[str]:
    """Open a store on every state that a crash may leave, and yield what is wrong there."""
    for number, (made, build) in enumerate(crash_states(recorder, random.Random(seed), chosen)):
        crashed = place / f"crashed {number}"
        build(crashed)
        problem = problem_in(crashed, allowed(recorder, steps, made))
        shutil.rmtree(crashed)
        if problem:
            yield f"after {made} calls, the last of them {recorder.log[made - 1]!r:.200}: {problem}"


def problem_in(crashed: Path, expected: list[Values]) -> str:
    try:
        store = DiskBackend(crashed, system=Unflushed())
    except Exception as error:  # noqa: BLE001  (whatever it is, it is a failure)
        return f"it does not open: {error!r}"
    try:
        if not any(same(store, values) for values in expected):
            return f"it holds {dict(store.entries())}, expected was one of {[sorted(values) for values in expected]}"
    except Exception as error:  # noqa: BLE001
        return f"it cannot be read: {error!r}"
    finally:
        store.close()
    findings = DiskBackend.verify(crashed).findings
    return f"verify finds {findings}" if findings else ""


def test_the_recorder_sees_everything(place: Path) -> None:
    """With all calls made and everything kept, the state is the directory itself."""
    steps = steps_of(1, 8)
    recorder = record(place, steps, reopen_after=4)
    kept, _ = [build for made, build in crash_states(recorder, random.Random(0), 0) if made == len(recorder.log)]
    kept(place / "built")
    assert tree(place / "built") == tree(place / "recorded")


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-shm"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.stat().st_size or path.name != "index.sqlite-wal"}


@pytest.mark.parametrize("way", ["usual", "in pieces", "without unnamed files"])
@pytest.mark.parametrize(
    ("seed", "count", "chosen"),
    [(1, 7, 2), *(pytest.param(seed, 25, 8, marks=pytest.mark.stress) for seed in range(2, 8))],
)
def test_a_crash_at_any_call_loses_nothing_that_was_committed(
    place: Path, monkeypatch: pytest.MonkeyPatch, way: str, seed: int, count: int, chosen: int
) -> None:
    if way == "in pieces":  # as values of more than 8 MiB are written
        monkeypatch.setattr(writing, "TOGETHER", 1000)
        monkeypatch.setattr(direct, "PIECE", 4096)
    steps = steps_of(seed, count)
    recorder = record(place, steps, reopen_after=count // 2, kind=Plain if way == "without unnamed files" else Recorder)
    states = sum(1 for _ in crash_states(recorder, random.Random(seed), chosen))
    found = list(failures(recorder, steps, place, chosen, seed))
    print(f"{way}: {states} states after {len(recorder.log)} calls and marks, {len(found)} failures")  # noqa: T201
    assert not found, found[:5]
    assert states > 300


def test_a_crash_while_version_1_is_taken_over_loses_nothing(place: Path) -> None:
    shutil.copytree(DISK_1, place / "recorded")
    recorder = Recorder(place / "recorded")
    DiskBackend(place / "recorded", system=recorder).close()
    recorder.end()
    for made, build in crash_states(recorder, random.Random(0), 2):
        build(place / "crashed")
        assert not problem_in(place / "crashed", [golden_values()]), recorder.log[made - 1]
        shutil.rmtree(place / "crashed")


@pytest.mark.parametrize("damage", ["index.sqlite", "FORMAT"])
def test_a_repair_that_is_cut_short_can_be_done_again(place: Path, damage: str) -> None:
    steps = steps_of(3, 10)
    values: Values = {}
    with closing(DiskBackend(place / "recorded", system=Unflushed())) as store:
        for step in steps:
            do(store, step)
            values = take(values, step)
    (place / "recorded" / damage).write_bytes(b"not what it was")
    recorder = Recorder(place / "recorded")
    upkeep.repair(place / "recorded", recorder)
    recorder.end()
    for made, build in crash_states(recorder, random.Random(0), 2):
        build(place / "crashed")
        upkeep.repair(place / "crashed", Unflushed())
        assert not problem_in(place / "crashed", [values]), recorder.log[made - 1]
        shutil.rmtree(place / "crashed")


@pytest.mark.parametrize("missing", ["files", "directories"])
def test_a_missing_flush_is_caught(place: Path, missing: str) -> None:
    """The same sweep finds a store whose program forgot to flush files, or directories."""
    steps = steps_of(1, 7)
    recorder = record(place, steps, reopen_after=3)
    recorder.log = [op for op in recorder.log if not (isinstance(op, Sync) and planted(op.node, recorder.root, missing))]
    assert next(failures(recorder, steps, place, 2, 1), None) is not None


def planted(node: Node, root: Node, missing: str) -> bool:
    return (node.folder and node is not root) if missing == "directories" else not node.folder


# --- killed at random moments ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("kills", [30, pytest.param(1000, marks=pytest.mark.stress)])
def test_a_kill_at_any_moment_loses_nothing_that_was_committed(tmp_path: Path, kills: int) -> None:
    root, rng = tmp_path / "store", random.Random(0)
    expected: Stored = {}
    steps = number = 0
    while number < kills or steps <= kills:  # a busy machine gets more of them, or the children would be killed before they do anything
        number += 1
        child = Child(write_until_killed, str(root), number)
        if rng.random() < 0.8:  # else it may not have opened the store yet
            child.channel.poll(10)
        time.sleep(rng.random() * 0.1)
        begun: CodedStep | None = None
        for message in child.kill():
            if message == "done":
                assert begun is not None
                expected, begun, steps = after(expected, begun), None, steps + 1
            else:
                begun = message  # type: ignore[assignment]
        expected = reopened(root, expected, begun)
    print(f"{number} kills among {steps} steps")  # noqa: T201


def after(values: Stored, step: CodedStep) -> Stored:
    key, value = step
    rest = {name: old for name, old in values.items() if name != key}
    return rest if value is None else rest | {key: value}


def reopened(root: Path, expected: Stored, begun: CodedStep | None) -> Stored:
    """Open the store, require it to hold what is expected, with the step that had begun or without, and return which it was."""
    store = DiskBackend(root, verify="always")
    try:
        found = {key: (spec, bits(store.get(key))) for key, spec in store.entries()}
    finally:
        store.close()
    assert found in ([expected] if begun is None else [expected, after(expected, begun)])
    assert len(list(root.glob("blobs/*/*"))) == len(found)
    return found


@pytest.mark.usefixtures("fork_server")
def test_nothing_is_left_of_scratch_when_its_process_is_killed(tmp_path: Path) -> None:
    child = Child(fill_scratch, str(tmp_path))
    assert child.channel.recv() == "full"
    assert list(tmp_path.iterdir()) == []
    child.kill()
    assert list(tmp_path.iterdir()) == []
