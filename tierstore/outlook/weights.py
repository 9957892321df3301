"""What a model under `tiered` would keep in tiers, and in which order a pass uses it; known without reading any weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tierstore.patch.room import most_owned
from tierstore.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Part:
    """What comes and goes as one: a weight, or a part of it. `nbytes` in memory, `file_bytes` to be read for it."""

    key: str
    nbytes: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Weight:
    """One entry of the store: `spec` as it is in memory, tied tensors being one entry.

    `owners`: paths of the modules that have it. `parts`: how it could move at the finest where the fast tier is RAM of the CPU.
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

    def pieces(self, parts: int) -> tuple[Part, ...]:
        """Return the weight in pieces of so many parts."""
        return tuple(_joined(self.parts[start : start + parts]) for start in range(0, len(self.parts), parts))


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a model by name; `trace` has the names in order of use in one pass.

    `part_bytes`: of each part of a divided weight, except that the first and the last one may be smaller. `order` says where the
    order in `trace` comes from, `notes` what a reader should know about it.
    """

    by_name: Mapping[str, Weight]
    trace: tuple[str, ...]
    part_bytes: int
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


def _joined(parts: Sequence[Part]) -> Part:
    return Part(parts[0].key, sum(part.nbytes for part in parts), sum(part.file_bytes for part in parts))
