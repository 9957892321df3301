"""Activations cross between devices that differ: values, gradients and writes are those of one device.

The cases are in `two_devices_cases`: a process can have a backend of its own for good only, so they run in one of their own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_cases_of_two_devices() -> None:
    cases = Path(__file__).with_name("two_devices_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", str(cases)]
    ended = subprocess.run(command, cwd=cases.parents[1], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    assert " passed" in ended.stdout
