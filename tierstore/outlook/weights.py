"""What a model under `tiered` would keep in tiers, and in which order a pass uses it; known without reading any weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tierstore.patch.room import most_owned
from tierstore.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Part:
    """What comes and goes as one: a weight, or a piece of it. `nbytes` in memory, `file_bytes` to be read for it."""

    key: str
    nbytes: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Weight:
    """One entry of the store: `spec` as it is in memory, tied tensors being one entry.

    `owners`: paths of the modules that have it. `parts`: how it would move where the fast tier is RAM of the CPU.
    `row_bytes`: of one row, if rows are read by themselves where a module looks them up, for which nothing else moves; else 0.
    """

    name: str
    spec: TensorSpec
    file_bytes: int
    owners: tuple[str, ...]
    parts: tuple[Part, ...]
    row_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def whole(self) -> tuple[Part, ...]:
        """The weight as the only part of itself, which is how it moves on an accelerator."""
        return (Part(self.name, self.nbytes, self.file_bytes),)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a model by name; `trace` has the names in order of use in one pass.

    `order` says where that order comes from, `notes` what a reader should know about it.
    """

    by_name: Mapping[str, Weight]
    trace: tuple[str, ...]
    order: str
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.by_name.values())

    def largest(self) -> Weight:
        """Return the largest weight: a fast tier with less room is refused."""
        return max(self.by_name.values(), key=lambda weight: weight.nbytes)

    def largest_owner(self) -> tuple[str, int]:
        """Return the module whose own weights take the most bytes together, and these bytes."""
        return most_owned((owner, weight.nbytes) for weight in self.by_name.values() for owner in weight.owners)
