"""Guesses which keys are used next, from the order in which they were used before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat

_CONTEXT = 32  # how many accesses before two occurrences of a key are compared to choose between them
_CANDIDATES = 32  # how many occurrences are compared
_ERRATIC_FAILURES = 3
_WRONG = 3  # guesses that were foretold; with as many wrong ones the rest is worth nothing
_SHORT_RUN = 48  # guesses right in a row; a longer run that ends is a change of phase, not a key that depends on data


class Predictor:
    """Follows the history of accesses at the place where it last went on as it does now.

    Programs repeat themselves: a forward pass, a step of a sampler, a whole request. `pointer` is the position in the
    history that the present repeats; what came after it then is expected now. An access that was not expected is no error:
    the pointer moves to the occurrence of that key with the longest equal past. So phases that take turns (a prefill, the
    steps of decoding, the models of a pipeline) are each recognised by how they begin, and nothing marks the end of a pass.

    Before the first access somebody may `foretell` what will be used, such as the weights of a model in the order of its
    modules. It stands in the history like a past that happened, until it was wrong a few times. A key that it does not know is
    no wrong guess: it comes in between, and the guess goes on.

    Keys whose accesses depend on data, such as the experts of a mixture, are found by how often the guess fails, and left
    out of the history.
    """

    def __init__(self, limit: int = 1 << 16) -> None:
        self.history: list[str] = []
        self.pointer: int | None = None
        self.matched = 0  # how many accesses in a row were expected
        self.aside = False  # the last access is none that was, or could have been, foreseen
        self.erratic: set[str] = set()
        self.on_erratic: Callable[[str], None] | None = None  # told which key was found to be erratic
        self._limit = limit
        self._previous: list[int] = []  # where the key at the same position of `history` occurred before; -1: nowhere
        self._latest: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._failed_at: deque[int] = deque(maxlen=64)  # at which accesses guesses failed
        self._seen = 0
        self._foretold = 0  # how many positions of `history` have not happened
        self._wrong = 0
        self.on_trim: Callable[[int], None] | None = None  # told how many positions were cut off at the front

    def foretell(self, keys: Sequence[str]) -> None:
        """Expect accesses to happen in this order; to be called before any that repeats."""
        for key in keys:
            self._append(key, self._latest.get(key, -1))
        self._foretold = len(self.history)

    @property
    def period(self) -> int | None:
        """How many accesses ago the present happened last; None while nothing repeats."""
        return None if self.pointer is None else len(self.history) - 1 - self.pointer

    @property
    def foretold(self) -> bool:
        """True as long as what was foretold is believed: it has not happened yet, nor been wrong too often."""
        return self._foretold > 0

    @property
    def guessing(self) -> bool:
        """True while what is expected next was foretold, and has not happened before."""
        return self.pointer is not None and self.pointer + 1 < self._foretold

    def sure(self, enough: int) -> bool:
        """True if the last guesses were right: all of a period, or `enough`, and as many again for each that failed lately."""
        if self.pointer is None:
            return False
        period = len(self.history) - 1 - self.pointer
        if self.matched >= period:
            return True
        since = self._seen - period
        while self._failed_at and self._failed_at[0] < since:
            self._failed_at.popleft()
        return self.matched >= enough * (1 + len(self._failed_at))

    def cycle(self) -> Sequence[str]:
        """Return the accesses expected until the present comes again, erratic keys left out."""
        if self.pointer is None:
            return ()
        erratic = self.erratic
        keys = self.history[self.pointer + 1 :]
        return [key for key in keys if key not in erratic] if erratic else keys

    def see(self, key: str) -> bool:
        """Record an access and say whether it was the expected one; also True if it was none of those that are foreseen (`aside`)."""
        self.aside = key in self.erratic
        if self.aside:
            return True
        self._seen += 1
        expected = self._expected()
        guessed = self.guessing
        before = self._latest.get(key, -1)
        self._append(key, before)
        if guessed and before < 0:
            self.aside = True
            return True
        if expected == key:
            assert self.pointer is not None
            self.pointer += 1
            self.matched += 1
            self._use_up()
            return True
        self._missed(expected, key, guessed=guessed, known=before >= 0)
        self.matched = 0
        self.pointer = self._resume()
        return False

    def _missed(self, expected: str | None, key: str, *, guessed: bool, known: bool) -> None:
        """Take note of a wrong guess; one that was foretold says nothing of how regular accesses are."""
        if expected is None:
            return
        if guessed:
            self._wrong += 1
            if self._wrong == _WRONG:
                self._trim(self._foretold)
            return
        self._failed_at.append(self._seen)
        if known and self.matched < _SHORT_RUN:  # a key never seen before says nothing of either
            self._failed(expected)
            self._failed(key)

    def see_expected(self, keys: list[str]) -> bool:
        """Record several accesses at once, none of them erratic, if each is the expected one; else do nothing and return False."""
        start, count = len(self.history), len(keys)
        if self.pointer is None or start + count >= 2 * self._limit:
            return False
        if self.history[self.pointer + 1 : self.pointer + 1 + count] != keys:
            return False
        self.aside = False
        self.history += keys
        self._previous += map(self._latest.get, keys, repeat(-1))  # of a key that occurs twice here both see the same one
        self._latest.update(zip(keys, range(start, start + count), strict=True))
        self.pointer += count
        self.matched += count
        self._seen += count
        self._use_up()
        return True

    def _use_up(self) -> None:
        """Forget what was foretold once it has happened: from here on the past says more."""
        if self._foretold and not self.guessing:
            self._trim(self._foretold)
            self.matched = 0

    def _expected(self) -> str | None:
        """Return the key after the pointer, which skips erratic ones."""
        if self.pointer is None:
            return None
        history, erratic = self.history, self.erratic
        after = self.pointer + 1
        while after < len(history) and history[after] in erratic:
            after += 1
        if after == len(history):
            self.pointer = None
            return None
        self.pointer = after - 1
        return history[after]

    def _append(self, key: str, before: int) -> None:
        self._latest[key] = len(self.history)
        self.history.append(key)
        self._previous.append(before)
        if len(self.history) >= 2 * self._limit:
            self._trim(len(self.history) - self._limit)

    def _trim(self, cut: int) -> None:
        del self.history[:cut]
        self._foretold = max(0, self._foretold - cut)
        self._previous = [max(position - cut, -1) for position in self._previous[cut:]]
        self._latest = {key: position - cut for key, position in self._latest.items() if position >= cut}
        self.pointer = None if self.pointer is None or self.pointer < cut else self.pointer - cut
        if self.on_trim is not None:
            self.on_trim(cut)

    def _resume(self) -> int | None:
        """Return the earlier occurrence of the last key whose past equals the present one longest; the latest among equals."""
        best, longest = None, -1
        for position in self._occurrences():
            length = self._common_past(position)
            if length > longest:
                best, longest = position, length
        return best

    def _occurrences(self) -> Iterator[int]:
        """Yield where the last key occurred before, latest first."""
        position = self._previous[-1]
        for _ in range(_CANDIDATES):
            if position < 0:
                return
            yield position
            position = self._previous[position]

    def _common_past(self, position: int) -> int:
        now = len(self.history) - 1
        length = 0
        while length < min(_CONTEXT, position) and self.history[position - 1 - length] == self.history[now - 1 - length]:
            length += 1
        return length

    def _failed(self, key: str) -> None:
        """Count a wrong guess; a key with many for its number of accesses is erratic."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        if key not in self.erratic and failures >= _ERRATIC_FAILURES and 3 * failures > self._uses(key):
            self.erratic.add(key)
            if self.on_erratic is not None:
                self.on_erratic(key)

    def _uses(self, key: str) -> int:
        count, position = 0, self._latest.get(key, -1)
        while position >= 0 and count < 3 * self._failures[key]:
            count += 1
            position = self._previous[position]
        return count
