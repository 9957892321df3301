"""Accesses that repeat: what must be there at once while some of them stream, and how to spread those that do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice

_STEPS = 12  # of the search for a price


@dataclass(frozen=True, slots=True)
class Cycle:
    """Keys in order of use, from the last on to the first again, and seconds of computing after each.

    `sizes` in bytes. Keys that are used at once have the same value in `together`; others need not be in it.
    """

    keys: Sequence[str]
    durations: Sequence[float]
    sizes: Mapping[str, int]
    together: Mapping[str, str]

    def without(self, resident: Collection[str]) -> Cycle:
        """Return the accesses that go on to the next tier."""
        left = [(key, duration) for key, duration in zip(self.keys, self.durations, strict=True) if key not in resident]
        return Cycle([key for key, _ in left], [duration for _, duration in left], self.sizes, self.together)

    def bytes(self, keys: Collection[str]) -> int:
        return sum(self.sizes[key] for key in keys)

    def at_once(self, keys: Collection[str]) -> dict[str, int]:
        """Return the bytes that are there when each of `keys` is used: its own, and those of the others that are used at once with it."""
        whole = Counter[str]()
        for key in keys:
            whole[self.together.get(key, key)] += self.sizes[key]
        return {key: whole[self.together.get(key, key)] for key in keys}

    def moved(self, resident: Collection[str], fixed_bytes: int) -> int:
        """Return what comes in while the cycle goes round once, in bytes, of which each transfer costs so many more."""
        return sum(self.sizes[key] + fixed_bytes for key in self.keys if key not in resident)

    def share(self, resident: Collection[str]) -> float:
        """Return which part of the computing is done with what streams."""
        streamed = sum(seconds for key, seconds in zip(self.keys, self.durations, strict=True) if key not in resident)
        return streamed / (sum(self.durations) or 1.0)

    def ring(self, resident: Collection[str], slots: int = 2, ahead: int = 0) -> int:
        """Return the bytes that streaming needs: all that is used at once, and what comes after that.

        These are the next `slots` - 1 entries, and more up to `ahead` bytes, if `slots` is more than 1.
        """
        streamed = [key for key in self.keys if key not in resident]
        most, start = 0, 0
        for use in self._uses(streamed):
            start += len(use)
            needed, beyond = set(use), 0
            for number, key in enumerate(islice(chain(streamed[start:], streamed), len(streamed) if slots > 1 else 0)):
                if number >= slots - 1 and beyond + self.sizes[key] > ahead:
                    break
                needed.add(key)
                beyond += self.sizes[key]
            most = max(most, self.bytes(needed))
        return most

    def _uses(self, keys: Sequence[str]) -> Iterator[list[str]]:
        """Yield what is used at once."""
        for _, run in groupby(keys, lambda key: self.together.get(key, key)):
            yield list(run)

    def late(self, resident: Collection[str], ring: int) -> float:
        """Return for how many seconds computing waits if the link is just fast enough.

        What is computed at one place cannot hide what streams at another that is more than `ring` bytes away.
        """
        streamed = [0 if key in resident else self.sizes[key] for key in self.keys]
        price = sum(self.durations) / max(1, sum(streamed))
        saved = late = 0.0
        for _ in range(2):  # the first time round shows with how much the second begins
            late = 0.0
            for nbytes, duration in zip(streamed, self.durations, strict=True):
                late += max(0.0, nbytes * price - saved)
                saved = min(max(0.0, saved - nbytes * price) + duration, ring * price)
        return late

    def spread(self, group: Collection[str], free: int, ring: int) -> set[str]:
        """Return keys of `group` of at most `free` bytes to stay, such that the others are spread evenly over the computing.

        A walk along the cycle saves up time at each access, and an entry streams when enough is saved to pay for it: so many
        seconds a byte. More than `ring` bytes are worth cannot be saved, since nothing can be fetched further ahead. The price
        is searched for that fills `free` best.
        """
        first = dict(zip(reversed(self.keys), reversed(self.durations), strict=True))
        walk = [(key, first[key]) for key in dict.fromkeys(self.keys)]
        streamed = self.bytes(group) - free
        low, best = (sum(first.values()) or 1.0) / max(1, streamed), set[str]()
        high = 2 * low
        for _ in range(_STEPS):  # the dearer, the more stays
            price = (low + high) / 2
            chosen = _walk(walk, self.sizes, group, price, ring)
            if self.bytes(chosen) > free:
                high = price
            else:
                low, best = price, max(best, chosen, key=self.bytes)
        return best or _walk(walk, self.sizes, group, low, ring, free)


def _walk(
    walk: Sequence[tuple[str, float]], sizes: Mapping[str, int], group: Collection[str], price: float, ring: int, free: int | None = None
) -> set[str]:
    """Return what stays at a price, no more than `free` bytes if that is given."""
    chosen: set[str] = set()
    saved, left = 0.0, free
    for key, duration in walk:
        saved = min(saved + duration, ring * price)
        if key not in group:
            continue
        cost = sizes[key] * price
        if 2 * saved >= cost or (left is not None and sizes[key] > left):
            saved -= cost
        else:
            chosen.add(key)
            left = None if left is None else left - sizes[key]
    return chosen
