"""Doing a request again when the failure is one that passes, with growing random pauses and an end."""

from __future__ import annotations

import errno
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from tierstore.errors import RemoteError, TierStoreError

Result = TypeVar("Result")

_PASSING_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))  # of HTTP
_PASSING_ERRNO = frozenset(
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "EINTR", "ENETDOWN", "ENETRESET",
        "ENETUNREACH", "EPIPE", "EREMOTEIO", "ETIMEDOUT",
    )
    if hasattr(errno, name)
)  # fmt: skip
_PASSING_CLASSES = {  # of the libraries below fsspec, by module: those that are no OSError
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "botocore.exceptions": ("ConnectionError", "HTTPClientError", "IncompleteReadError"),
    "botocore.parsers": ("ResponseParserError",),
    "http.client": ("IncompleteRead",),
}


class IncompleteError(ConnectionError):
    """Fewer bytes than were asked for, without an error."""


@dataclass(frozen=True)
class Retries:
    """How often and for how long one request is tried: up to `attempts` times, and not after `deadline` seconds in all.

    Before attempt n + 1 it pauses for a random part of `first * 2**(n - 1)` seconds, at most `longest`: many clients that
    failed together do not come back together. `clock` and `sleep` are there for tests.
    """

    attempts: int = 6
    first: float = 0.5
    longest: float = 20.0
    deadline: float = 300.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    rng: random.Random = field(default_factory=random.Random)

    def until(self) -> float:
        """Return when an operation that begins now has to end, by `clock`."""
        return self.clock() + self.deadline

    def call(self, request: Callable[[], Result], operation: str, until: float) -> Result:
        """Return what `request` returns, after as many attempts as that takes and `until` allows.

        Raises `RemoteError` naming `operation` in the end; at once where trying again cannot help. A `FileNotFoundError` and
        what is a `TierStoreError` already are raised as they are.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return request()
            except (FileNotFoundError, TierStoreError):
                raise
            except Exception as error:
                pause = self.rng.uniform(0, min(self.longest, self.first * 2 ** (attempt - 1)))
                if not passes(error) or attempt == self.attempts or self.clock() + pause > until:
                    raise RemoteError(operation, attempt, _reason(error)) from error
                self.sleep(pause)
        raise ValueError(f"at least one attempt has to be made, got attempts={self.attempts}")


def passes(error: BaseException) -> bool:
    """True if the same request may succeed a moment later: timeouts, cut connections, a server that is busy or has failed."""
    # before the status: what a library raises for a cut body may have one of its own making below it
    if isinstance(error, TimeoutError | ConnectionError) or any(isinstance(error, kind) for kind in _library_errors()):
        return True
    status = next((number for link in _chain(error) if (number := _status(link)) is not None), None)
    if status is not None:
        return status in _PASSING_STATUS
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNO


def _library_errors() -> Iterator[type]:
    """Yield the classes of libraries that are loaded; others can have raised nothing."""
    for name, classes in _PASSING_CLASSES.items():
        module = sys.modules.get(name)
        yield from (getattr(module, each) for each in classes if hasattr(module, each))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from: fsspec turns errors of services into OSErrors, and keeps them below."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of botocore, aiohttp or gcsfs tells, or None."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) and 100 <= status < 600 else None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
