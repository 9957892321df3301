"""The fuzzer's targets under hypothesis, in every run; the coverage-guided fuzzer with `-m stress`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import entry, write_raw
from tests.disk.conftest import MEMORY
from tests.fuzz.targets import TARGETS, SafetensorsHeader, folder_for
from tierstore.backends import _safetensors

EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 40), st.one_of(st.binary(max_size=12), st.integers().map(lambda n: b"%d" % n))),
    max_size=6,
)


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Replace pieces of `data`, each given by where it begins, how long it is, and what comes in its place."""
    for start, length, new in edits:
        start %= len(data) + 1
        data = data[:start] + new + data[start + length :]
    return data


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", TARGETS)
def test_bytes_that_anybody_may_have_written_are_read_or_refused(name: str) -> None:
    with TemporaryDirectory(dir=MEMORY) as base:
        target = TARGETS[name](folder_for(Path(base), name))
        seeds = list(target.seeds())
        for data in seeds:
            target(data)
        assert target.accepted > 0, "no seed is good"

        @settings(max_examples=200, deadline=None)
        @given(st.sampled_from(seeds), EDITS)
        def mutated(data: bytes, edits: list[tuple[int, int, bytes]]) -> None:
            target(edited(data, edits))

        mutated()


HONEST = {"a": entry(0, 16)}
CHEATS: dict[str, tuple[str, Callable[..., object], dict[str, object]]] = {
    "overlap": ("_check_apart", lambda located: None, {"a": entry(0, 16), "b": entry(8, 24)}),
    "lie outside": ("_header_text", lambda file: _lying_about_size(file), {"a": entry(0, 32)}),
    "bytes of memory": ("_check_apart", lambda located: bytearray(50 << 20), HONEST),
    "not supported": ("_are_sizes", lambda value: True, {"a": {**entry(0, 16), "shape": ["4"]}}),
}


@pytest.mark.parametrize("what", CHEATS)
def test_a_reader_that_believes_its_input_is_found(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = SafetensorsHeader(tmp_path)
    data = write_raw(tmp_path / "input", CHEATS[what][2], bytes(24)).read_bytes()
    target(data)
    monkeypatch.setattr(_safetensors, *CHEATS[what][:2])
    with pytest.raises((AssertionError, TypeError), match=what.replace("lie outside", "lies outside")):
        target(data)


def _lying_about_size(file: Path) -> tuple[bytes, object]:
    data = file.read_bytes()
    identity = _safetensors.identity_of(file.stat())
    return data[8 : 8 + int.from_bytes(data[:8], "little")], identity._replace(size=identity.size + 100)


@pytest.mark.stress
@pytest.mark.timeout(7200)
def test_a_million_inputs() -> None:
    pytest.importorskip("atheris", reason="the coverage-guided fuzzer is the extra 'fuzz'")
    run = subprocess.run([sys.executable, "-m", "tests.fuzz", "--inputs", "1000000"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:]
