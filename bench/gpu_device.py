"""The compute device as `gpu_offload.py` sees it: waiting, capping, peaks, bytes copied. The CPU stands in where there is no GPU."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]

DIRECTIONS = {"HtoD": "h2d", "DtoH": "d2h"}  # what the profiler calls copies, and what they are called here


class Device(ABC):
    """One device. Bytes in, bytes out; `torch` is torch's own name of it."""

    torch: torch.device

    @abstractmethod
    def wait(self) -> None:
        """Return when all that was started is done."""

    @abstractmethod
    def limit(self, nbytes: int) -> None:
        """Let this process have at most so much of the device's memory from now on."""

    @abstractmethod
    def restart_peak(self) -> None:
        """Forget the peaks so far."""

    @abstractmethod
    def peaks(self) -> dict[str, int]:
        """Return the most bytes that were "allocated" and "reserved" since; empty where nobody counts."""

    @abstractmethod
    def traffic(self, run: Run) -> dict[str, int]:
        """Run, and return the bytes copied to the device ("h2d") and back ("d2h"), by whomever; empty where nobody counts."""

    @abstractmethod
    def host_memory(self, nbytes: int) -> Tensor:
        """Return RAM from which the device copies at its best."""

    @abstractmethod
    def beside(self, one: Run, other: Run) -> None:
        """Start both, so that the device can do them at the same time."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Return the bytes of the device's memory that are free, and all of them; (0, 0) where nothing is limited."""

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Return what a reader must know of the hardware and the software."""


class CpuDevice(Device):
    """Nothing is capped or counted, and copies are those within RAM."""

    torch = torch.device("cpu")

    def wait(self) -> None:
        pass

    def limit(self, nbytes: int) -> None:
        pass

    def restart_peak(self) -> None:
        pass

    def peaks(self) -> dict[str, int]:
        return {}

    def traffic(self, run: Run) -> dict[str, int]:
        return {}

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.ones(nbytes, dtype=torch.uint8)

    def beside(self, one: Run, other: Run) -> None:
        one()
        other()

    def memory(self) -> tuple[int, int]:
        return 0, 0

    def facts(self) -> dict[str, str]:
        return host_facts() | {"device": f"the CPU in place of a GPU, {torch.get_num_threads()} threads"}


class CudaDevice(Device):
    """One CUDA device, capped and counted by torch's own allocator and profiler."""

    def __init__(self, name: str) -> None:
        self.torch = torch.empty(1, device=name).device
        torch.cuda.set_device(self.torch)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def limit(self, nbytes: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / self.memory()[1]))

    def restart_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, int]:
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}

    def traffic(self, run: Run) -> dict[str, int]:
        self.wait()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            self.wait()
        with tempfile.TemporaryDirectory() as place:
            file = Path(place, "trace.json")
            profile.export_chrome_trace(str(file))
            return copied_bytes(json.loads(file.read_text()))

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.ones(nbytes, dtype=torch.uint8).pin_memory()

    def beside(self, one: Run, other: Run) -> None:
        for run in (one, other):
            with torch.cuda.stream(torch.cuda.Stream()):
                run()

    def memory(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info()

    def facts(self) -> dict[str, str]:
        free, total = self.memory()
        known = {
            "device": torch.cuda.get_device_name(),
            "memory": f"{total / (1 << 30):.1f} GiB, {free / (1 << 30):.1f} free",
            "CUDA": str(torch.version.cuda),
        }
        return known | driver_facts(self.torch.index) | host_facts()


def device_called(name: str) -> Device:
    """Return the device for "cpu" or "cuda"; raise `RuntimeError` if it cannot be used."""
    return CpuDevice() if torch.device(name).type == "cpu" else CudaDevice(name)


def copied_bytes(trace: dict[str, Any]) -> dict[str, int]:
    """Add up the copies between host and device in a trace of torch's profiler; empty if it has no copies at all."""
    copies = [event for event in trace["traceEvents"] if event.get("cat") == "gpu_memcpy"]
    sums = dict.fromkeys(DIRECTIONS.values(), 0) if copies else {}
    for event in copies:
        for word, direction in DIRECTIONS.items():
            if word in event["name"]:
                sums[direction] += int(event["args"]["bytes"])
    return sums


def host_facts() -> dict[str, str]:
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return {
        "host": f"{os.cpu_count()} cores, {ram:.0f} GiB of RAM, {platform.system()} {platform.release()}",
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }


def driver_facts(index: int) -> dict[str, str]:
    """Ask the driver's own tool for its version and for the PCIe link, which slows down when idle: ask after copies."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"driver": "unknown"}
    fields = ("driver_version", "pcie.link.gen.current", "pcie.link.width.current", "pcie.link.gen.max", "pcie.link.width.max")
    command = [program, f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        driver, generation, width, most, widest = (part.strip() for part in answer.strip().split(","))
        return {"driver": driver, "PCIe": f"generation {generation} x{width} (at most {most} x{widest})"}
    return {"driver": "unknown"}
