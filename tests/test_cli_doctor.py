"""`tierstore doctor`: what it finds, what it measures, and that it leaves nothing behind."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from tierstore.__main__ import main
from tierstore.errors import BackendError
from tierstore.machine import diagnosis, disks, installed, memory
from tierstore.machine.limits import least_memory, memory_limits
from tierstore.registry import backend_names


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "_MOST", 16 << 20)
    monkeypatch.setattr(memory, "_NBYTES", 1 << 20)
    monkeypatch.setattr(memory, "_SECONDS", 0.0)


def doctor(capsys: pytest.CaptureFixture[str], *more: object, code: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json", *map(str, more)]) == code
    out, errors = capsys.readouterr()
    assert errors == ""
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_sound_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor(capsys, "--disk", tmp_path)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["tierstore"] == importlib.metadata.version("tierstore")
    assert [backend["name"] for backend in found["backends"]] == backend_names()
    assert not any(backend["problem"] for backend in found["backends"])
    rates = {link["name"]: link["rate"] for link in found["links"]}
    assert rates.keys() >= {"disk->cpu", "page cache->cpu", "cpu->cpu", "weights through cpu"}
    assert rates["cpu->cpu"] > 1e7
    assert rates["page cache->cpu"] > 1e7
    assert (rates["disk->cpu"] is not None) == found["direct_io"]
    assert found["problems"] == []
    assert not list(tmp_path.iterdir())


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--disk", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for text in ("python 3.", "device cpu", "tierstore.backends.disk:DiskBackend", "lockable memory", "disk->cpu", "direct I/O"):
        assert text in out, text


def test_without_a_directory_no_disk_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor(capsys)
    assert found["direct_io"] is None
    assert found["links"][0] == {"name": "disk->cpu", "rate": None, "remark": "give --disk DIR to measure it"}


def test_a_file_system_without_direct_io(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.open

    def refusing(path: str, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return honest(path, flags, *rest, **options)

    monkeypatch.setattr(disks.os, "open", refusing)
    found = doctor(capsys, "--disk", tmp_path)
    assert found["direct_io"] is False
    assert found["links"][0]["rate"] is None
    assert "refuses direct I/O" in found["links"][0]["remark"]
    assert found["links"][1]["rate"] > 1e6


@pytest.mark.parametrize("call", ["fsync", "pwrite", "preadv"])
def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, call: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    before = list(Path("/proc/self/fd").iterdir())
    monkeypatch.setattr(disks.os, call, failing)
    found = doctor(capsys, "--disk", tmp_path, code=1)
    monkeypatch.undo()
    assert any("Input/output error" in problem for problem in found["problems"])
    assert not list(tmp_path.iterdir())
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)


def test_a_directory_that_is_missing_or_full(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("is no directory" in problem for problem in doctor(capsys, "--disk", tmp_path / "no", code=1)["problems"])
    monkeypatch.setattr(disks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    assert any("too little room" in problem for problem in doctor(capsys, "--disk", tmp_path, code=1)["problems"])
    assert not list(tmp_path.iterdir())


def test_what_is_measured_is_what_was_read(tmp_path: Path) -> None:
    """The bytes per second are those that were read while the clock ran, whatever the clock does."""
    file = tmp_path / "file"
    file.write_bytes(bytes(40 << 20))
    speed = disks.files_speed([file])
    assert speed is None or 1e6 < speed < 1e12
    (tmp_path / "small").write_bytes(bytes(1000))
    assert disks.files_speed([tmp_path / "small"]) is None
    descriptor = os.open(file, os.O_RDONLY)
    try:
        parts = disks._parts([descriptor])
        assert parts == [(descriptor, 0), (descriptor, 8 << 20)], "no more than the most that is read"
        slab = disks.mmap.mmap(-1, 32 << 20)
        assert [disks._read_some(slab, thread, parts, 0.0) for thread in range(4)] == [8 << 20, 8 << 20, 0, 0]
        slab.close()
    finally:
        os.close(descriptor)


# -- backends ---------------------------------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    """Let these entry points be installed too."""
    honest = importlib.metadata.entry_points(group="tierstore.backends")

    def found(*, group: str) -> list[EntryPoint]:
        assert group == "tierstore.backends"
        return [*honest, *points]

    for module in ("tierstore.registry", "tierstore.machine.installed"):
        monkeypatch.setattr(f"{module}.entry_points", found)


def test_backends_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raising_backend.py").write_text("raise RuntimeError('no driver')")
    monkeypatch.syspath_prepend(str(tmp_path))
    plant(
        monkeypatch,
        EntryPoint("lost", "no_such_module:Backend", "tierstore.backends"),
        EntryPoint("raising", "raising_backend:Backend", "tierstore.backends"),
        EntryPoint("wrong", "json:JSONDecoder", "tierstore.backends"),
        EntryPoint("ram", "json:JSONEncoder", "tierstore.backends"),
    )
    found = doctor(capsys, code=1)
    problems = {backend["name"]: backend["problem"] for backend in found["backends"]}
    assert "No module named 'no_such_module'" in problems["lost"]
    assert "RuntimeError: no driver" in problems["raising"]
    assert "not a subclass of tierstore.Backend" in problems["wrong"]
    assert "is claimed by" in problems["ram"]
    assert problems["disk"] == ""
    assert sum("backend lost" in problem for problem in found["problems"]) == 1


def test_a_backend_whose_extra_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = [
        "torch>=2",
        'cloudfs>=1; extra == "cloud"',
        "torch; extra == 'fast'",
        'demo[cloud]; python_version > "3" and extra == "all"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires if name == "demo" else None)
    extras = {extra.name: extra for extra in installed.extras_of("demo")}
    assert extras["cloud"].missing == ("cloudfs",)
    assert extras["cloud"].command == "pip install 'demo[cloud]'"
    assert extras["fast"].missing == extras["all"].missing == ()
    point = EntryPoint("cloudy", "cloudfs:Backend", "tierstore.backends")
    monkeypatch.setattr(installed, "backend_class", lambda _: point.load())
    assert "pip install 'demo[cloud]'" in installed._problem("cloudy", "demo")
    assert installed.extras_of("nothing of this name") == []


# -- limits -----------------------------------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    """The group's own limit, those of the groups it is in, and none where it says max."""
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/jobs/mine\n",
            "sys/fs/cgroup/jobs/mine/memory.max": "max\n",
            "sys/fs/cgroup/jobs/mine/memory.high": "3000000\n",
            "sys/fs/cgroup/jobs/memory.max": "2000000\n",
            "sys/fs/cgroup/jobs/memory.current": "1500000\n",
            "proc/meminfo": "MemTotal:       4000 kB\nMemAvailable:   1000 kB\n",
        },
    )
    groups = [(limit.nbytes, limit.used) for limit in memory_limits(root) if limit.name == "control group"]
    assert groups == [(3000000, None), (2000000, 1500000)]
    assert least_memory(memory_limits(root)) == 2000000
    machine = memory_limits(root)[0]
    assert (machine.nbytes, machine.used) == (4000 << 10, 3000 << 10)


def test_control_groups_of_version_1_in_a_container(tmp_path: Path) -> None:
    """Where the path of the group is that of the host, and only the root is there."""
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,memory:/docker/abc\n3:pids:/x\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "700000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
            "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    groups = [(limit.nbytes, limit.used) for limit in memory_limits(root) if limit.name == "control group"]
    assert groups == [(700000, 5)]


def test_resource_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {resource.RLIMIT_AS: 1 << 30, resource.RLIMIT_MEMLOCK: 1000, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda what: (found[what], resource.RLIM_INFINITY))
    limits = {limit.source: limit.nbytes for limit in memory_limits(tmp_path)}
    assert limits == {"RLIMIT_AS": 1 << 30, "RLIMIT_MEMLOCK": 1000, "RLIMIT_DATA": None}
    assert least_memory(memory_limits(tmp_path)) == 1 << 30


# -- devices ----------------------------------------------------------------------------------------------------------------


def test_an_accelerator_that_does_not_work(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a build for CUDA is on a machine without a GPU."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(diagnosis, "working_accelerator", lambda: None)
    found = doctor(capsys, code=1)
    assert [(device["name"], device["works"]) for device in found["devices"]][1:] == [("cuda", False)]
    assert any("none works here" in problem for problem in found["problems"])


def test_an_accelerator_that_cannot_be_fed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(device: torch.device) -> float:
        raise BackendError(f"{device} cannot be measured: no memory can be locked")

    monkeypatch.setattr(diagnosis, "working_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(diagnosis, "upload_speed", refusing)
    found = doctor(capsys, code=1)
    assert any("no memory can be locked" in problem for problem in found["problems"])


@pytest.mark.gpu
def test_an_accelerator(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor(capsys)
    device = torch.accelerator.current_accelerator()
    assert device is not None
    assert any(entry["name"] == f"{device.type}:0" and entry["works"] for entry in found["devices"])
    rates = {link["name"]: link["rate"] for link in found["links"]}
    assert rates[f"cpu->{device.type}"] > 1e8
    assert rates[f"weights through {device.type}"] > 1e8
