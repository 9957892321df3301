"""What `gpu_offload.py` measured, and the arithmetic on it: bounds, ratios, verdicts. No torch, no processes.

N: bytes of weights that a forward reads. C: the budget. A forward must bring at least N - C bytes to the device, and a ring
through which the others stream takes room from what could stay: N - C + ring is what a plan moves. In time it takes at
least as long as the same forward with all weights resident, and as the copies at the speed measured in the same run.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

MOST_BYTES, MOST_OF_BOUND, MOST_OF_RESIDENT = 1.05, 1.10, 1.02
CLOSE = 1e-2  # part of an output's largest value; what differs by more is wrong
ALONE = ""  # beside whom a turn was taken, where no peer took part

Told = dict[str, Any]


@dataclass
class Row:
    """What was measured for one model, budget and number of tokens. Bytes and seconds are of one forward.

    `passes`: by contender, what its turns answered; "beside" says which peer took turns with tierstore then. `traffic`: bytes
    that the profiler saw copied. `differences`: how far outputs were from plain's, None for not at all a number. `fates`:
    why a contender has no figures. `rate`: bytes per second to the device. `pair`: bytes of the largest two weights in a row.
    """

    model: str
    percent: int
    tokens: int
    budget: int
    cap: int
    touched: int
    pair: int
    rate: float
    digest: str = ""
    passes: dict[str, list[Told]] = field(default_factory=dict)
    traffic: dict[str, dict[str, float]] = field(default_factory=dict)
    differences: dict[str, float | None] = field(default_factory=dict)
    ways: dict[str, str] = field(default_factory=dict)
    fates: dict[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """N - C."""
        return max(0, self.touched - self.budget)

    @property
    def ring(self) -> int:
        """The ring that tierstore plans with, but no more than the largest two weights in a row, and than the budget."""
        rings = [told["rings"][0] for told in self.passes.get("tierstore", []) if told["rings"]]
        return min(int(rings[-1]) if rings else self.pair, self.pair, self.budget)

    @property
    def resident(self) -> float:
        return self.seconds("plain")

    @property
    def link(self) -> float:
        return self.missing / self.rate

    @property
    def bound(self) -> float:
        return max(self.resident, self.link)

    @property
    def limit(self) -> str:
        return "link" if self.link > self.resident else "compute"

    def seconds(self, name: str, beside: str | None = None) -> float:
        """Return the median over a contender's turns, all or those beside a peer; nan if there are none."""
        times = [told["seconds"] for told in self.passes.get(name, []) if beside is None or told["beside"] == beside]
        return statistics.median(times) if times else math.nan

    def moved(self, name: str) -> float:
        """Return the bytes brought to the device: by its own count, or by the profiler's; nan if nobody counted."""
        own = [into_gpu(told) for told in self.passes.get(name, []) if told["links"]]
        return statistics.median(own) if own else self.traffic.get(name, {}).get("h2d", math.nan)

    def peak(self, name: str) -> float:
        peaks = [told["peaks"]["allocated"] for told in self.passes.get(name, []) if told["peaks"]]
        return max(peaks, default=math.nan)

    def output(self, name: str) -> str:
        """Say whether a contender's outputs were plain's, to the bit."""
        told = self.passes.get(name, [])
        if not told:
            return "-"
        if all(each["digest"] == self.digest for each in told):
            return "equal"
        apart = self.differences.get(name)
        if apart is not None and apart <= CLOSE:
            return f"within {apart:.0e}"
        return "WRONG" if apart is None else f"WRONG by {apart:.2g}"

    # -- verdicts ---------------------------------------------------------------------------------------------------

    def byte_ratio(self, name: str) -> float:
        """Bytes moved, over N - C + ring."""
        needed = self.missing + self.ring
        return self.moved(name) / needed if needed else math.nan

    def bytes_met(self, name: str) -> bool:
        return self.moved(name) <= MOST_BYTES * self.missing + self.ring

    def time_met(self, name: str) -> bool:
        most = MOST_OF_BOUND * self.link if self.limit == "link" else MOST_OF_RESIDENT * self.resident
        return self.seconds(name) <= most

    def rivals(self) -> dict[str, float]:
        """Return, for each peer that answered rightly and within the cap, its seconds over tierstore's in the same turns."""
        peers = [name for name in self.passes if name not in ("plain", "tierstore") and not self.output(name).startswith("WRONG")]
        ratios = {name: self.seconds(name) / self.seconds("tierstore", name) for name in peers}
        return {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio) and not self.peak(name) > self.cap}

    def best_rival(self) -> tuple[str, float] | None:
        rivals = self.rivals()
        return min(rivals.items(), key=lambda item: item[1]) if rivals else None


@dataclass
class TierRow:
    """Three tiers at once, one number of tokens: bytes and seconds of one forward.

    `compute`: seconds of the layers alone, one at a time on the device. `told`: what turns answered.
    """

    tokens: int
    touched: int
    gpu: int
    cpu: int
    total: int
    pair: int
    compute: float
    rate: float
    disk_rate: float | None
    digest: str
    told: list[Told] = field(default_factory=list)
    fate: str = ""

    @property
    def missing(self) -> int:
        return max(0, self.touched - self.gpu)

    @property
    def missing_in_ram(self) -> int:
        return max(0, self.touched - self.gpu - self.cpu)

    @property
    def seconds(self) -> float:
        return statistics.median(told["seconds"] for told in self.told) if self.told else math.nan

    @property
    def parts(self) -> dict[str, float]:
        """The seconds that computing and each link need at least."""
        disk = self.missing_in_ram / self.disk_rate if self.disk_rate else 0.0
        return {"compute": self.compute, "cpu->gpu": self.missing / self.rate, "disk->cpu": disk}

    @property
    def bound(self) -> float:
        return max(self.parts.values())

    @property
    def limit(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])

    def moved(self, link: str) -> float:
        """Return the bytes over "cpu->gpu" or "disk->cpu"; what skips the RAM counts for both."""
        count = into_gpu if link == "cpu->gpu" else from_disk
        return statistics.median(map(count, self.told)) if self.told else math.nan

    def ring(self, level: int) -> int:
        """Return the ring that tierstore plans with in a tier, but no more than two weights in a row there, three in the RAM."""
        rings = [told["rings"][level] for told in self.told if len(told["rings"]) > level]
        most = (self.pair, self.pair * 3 // 2)[level]
        return min(int(rings[-1]) if rings else most, most, (self.gpu, self.cpu)[level])

    def byte_ratio(self, link: str) -> float:
        least, level = (self.missing, 0) if link == "cpu->gpu" else (self.missing_in_ram, 1)
        return self.moved(link) / (least + self.ring(level)) if least + self.ring(level) else math.nan

    @property
    def equal(self) -> bool:
        return bool(self.told) and all(told["digest"] == self.digest for told in self.told)


def into_gpu(told: Told) -> float:
    return sum(nbytes for link, nbytes in told["links"].items() if link.endswith("->gpu"))


def from_disk(told: Told) -> float:
    return sum(nbytes for link, nbytes in told["links"].items() if link.startswith("disk->"))
