"""The README's example of a backend is a package that installs, is found by its name, keeps the contract and runs a model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "tests" / "example_backend"

CONTRACT = """
import itertools, pathlib, sys
from tierstore import open_backend
from tierstore.testing import check_backend

folder, number = pathlib.Path(sys.argv[1]), itertools.count()

def reopen(old):
    old.close()
    return open_backend("sqlite", old.place)

check_backend(lambda: open_backend("sqlite", folder / str(next(number))), reopen=reopen)
print("kept")
"""

MODEL = """
import pathlib, sys
import torch
from tierstore import backend_names, tiered

model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
x = torch.randn(3, 64)
expected = model(x)
with tiered(model, cpu="40KB", disk=f"sqlite://{sys.argv[1]}/weights") as session:
    assert torch.equal(model(x), expected)
    assert session.stats().links["disk->cpu"].bytes > 0
assert torch.equal(model(x), expected)
print("sqlite" in backend_names())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package into a directory of its own, without network."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source")  # building leaves files beside the source
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder / "site"), str(folder / "source")], check=True, timeout=300)
    return folder / "site"


def run(script: str, site: Path, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=True).stdout


def test_it_keeps_the_contract(installed: Path, tmp_path: Path) -> None:
    assert run(CONTRACT, installed, tmp_path) == "kept\n"


def test_it_runs_a_model_by_its_url(installed: Path, tmp_path: Path) -> None:
    assert run(MODEL, installed, tmp_path) == "True\n"


def test_the_readme_shows_all_of_it() -> None:
    source = (EXAMPLE / "tierstore_sqlite.py").read_text()
    assert source in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(source.splitlines()) < 60
    assert 'sqlite = "tierstore_sqlite:SQLiteBackend"' in (ROOT / "README.md").read_text()
