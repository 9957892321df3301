"""Fixtures for all tests: nothing may be left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith("tierstore")]
    assert not left, f"threads left behind: {left}"


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory for the disk tier; must be empty again afterwards."""
    place = tmp_path / "scratch"
    place.mkdir()
    yield place
    left = [path for path in place.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert not left, f"files left behind: {left}"
