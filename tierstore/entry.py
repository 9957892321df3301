"""One managed tensor: where its copies are and whether they may move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from tierstore.spec import TensorSpec


class Handout(Protocol):
    """What readers may take of resident `entries` without a lease, made by a user of the store."""

    @property
    def entries(self) -> Sequence[Entry]: ...

    def withdraw(self) -> bool:
        """Let no new reader have it; False, with all as before, if one who has it is not done yet."""

    def forget(self) -> None:
        """Let no new reader have it, whoever has it."""


class Guard(Protocol):
    """Knows of a value that several entries are pieces of: its memory is used as a whole, past the store."""

    def used(self) -> bool:
        """True while somebody may still use the whole."""

    def writes(self) -> int:
        """Return torch's count of writes to the whole."""


class Ready(Protocol):
    """The end of a copy on the device that may still be under way while its target is used already."""

    def wait(self) -> None:
        """Let what this thread computes from now on come after the copy; the thread itself does not wait."""

    def passed(self) -> bool:
        """True once the copy has ended."""

    def retire(self) -> None:
        """Let whatever is done with the target's memory, once it is given back, come after the copy."""


class Entry:
    """The bytes of one key. All fields are read and changed under the store's lock only.

    `tiers`: levels (0 is the fastest) that hold a copy equal to the newest value.
    `leases`: how many holders forbid that the copy in level 0 leaves; of these, `passing` end as soon as the value is there.
    `busy`: one thread is copying or replacing this entry; others wait for it, and it waits for nobody.
    `version`: counts changes of the value.
    `tensor`: the live tensor in level 0, while it is resident there and the tier is memory.
    `looked_up`: rows of it were read where it lies, without fetching it; None as long as nothing has been done with it.
    `seen`: torch's own count of writes to `tensor` as far as `version` knows of them.
    `ready`: what a computation waits for before it reads `tensor`, while that may still be filled on the device.
    `read_below`: copies under way that read the bytes in slower levels, which may not leave before.
    `guard`: of the whole of which this is a piece; None for what is whole itself.
    `handout`: what readers take of `tensor` without a lease; `shown`: it was read in this stay in level 0.
    """

    __slots__ = (
        "busy", "guard", "handout", "key", "leases", "looked_up", "nbytes", "passing", "read_below", "ready", "seen", "shown", "spec",
        "tensor", "tiers", "version",
    )  # fmt: skip

    def __init__(self, key: str, spec: TensorSpec) -> None:
        self.key = key
        self.tiers: set[int] = set()
        self.leases = 0
        self.passing = 0
        self.busy = False
        self.version = 0
        self.tensor: torch.Tensor | None = None
        self.looked_up: bool | None = None
        self.guard: Guard | None = None
        self.ready: Ready | None = None
        self.read_below = 0
        self.seen = 0
        self.shown = False
        self.handout: Handout | None = None
        self.describe(spec)

    def describe(self, spec: TensorSpec) -> None:
        """Take over the spec of a new value."""
        self.spec = spec
        self.nbytes = spec.nbytes

    @property
    def resident(self) -> bool:
        return 0 in self.tiers

    def writes(self) -> int:
        """Return torch's count of writes to the resident value; a tensor made in inference mode has none."""
        if self.guard is not None:
            return self.guard.writes()
        return 0 if self.tensor is None or self.tensor.is_inference() else self.tensor._version
