"""Keys in the order of their last use, with the bytes that they have together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class Segment:
    """An ordered part of a tier: iterating starts with the key used longest ago. `nbytes` is the sum over its keys."""

    __slots__ = ("_sizes", "nbytes")

    def __init__(self) -> None:
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self.nbytes = 0

    def put(self, key: str, nbytes: int) -> None:
        """Add `key` as the one used last, or move it there with a new size."""
        self.nbytes += nbytes - self._sizes.get(key, 0)
        self._sizes[key] = nbytes
        self._sizes.move_to_end(key)

    def touch(self, key: str) -> None:
        """Make `key` the one used last."""
        self._sizes.move_to_end(key)

    def pop(self, key: str) -> int:
        """Take `key` out and return its bytes."""
        nbytes = self._sizes.pop(key)
        self.nbytes -= nbytes
        return nbytes

    def pop_oldest(self) -> tuple[str, int]:
        """Take out the key used longest ago; return it and its bytes."""
        key = self.oldest
        return key, self.pop(key)

    @property
    def oldest(self) -> str:
        """The key used longest ago; there must be one."""
        return next(iter(self._sizes))

    def __getitem__(self, key: str) -> int:
        return self._sizes[key]

    def __contains__(self, key: str) -> bool:
        return key in self._sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)
