"""The errors of tierstore: one tree, each with the builtin parent that callers already catch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any


def listed(names: Sequence[str], most: int) -> str:
    """Return the first of `names` as a message has them, at most so many, and dots for the others."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


class TierStoreError(Exception):
    """Anything that tierstore refuses or cannot do."""


class SizeError(TierStoreError, ValueError):
    """A byte size that does not parse."""


class MissingKeyError(TierStoreError, KeyError):
    """A key that the store does not hold."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class ClosedError(TierStoreError, ValueError):
    """A store or session that has been closed."""


class BackendError(TierStoreError, RuntimeError):
    """A backend that cannot be opened, found or used."""


class ReadOnlyError(BackendError):
    """A write to a backend that only reads."""


class UnsupportedTensorError(TierStoreError, TypeError):
    """A tensor, or an operation on one, that the store cannot honour."""


class ModelError(TierStoreError, ValueError):
    """A model that cannot be placed under `tiered`."""


class BudgetError(TierStoreError, MemoryError):
    """One operation needs more bytes in a tier than its budget allows.

    `required_bytes` is what the operation needs at once, `budget_bytes` what `tier` may hold.
    """

    def __init__(self, operation: str, *, tier: str, required_bytes: int, budget_bytes: int, hint: str = "") -> None:
        self.operation = operation
        self.tier = tier
        self.required_bytes = required_bytes
        self.budget_bytes = budget_bytes
        self._hint = hint
        way_out = hint or f"raise the budget of {tier!r} to at least {required_bytes} bytes"
        super().__init__(
            f"{operation} needs {required_bytes} bytes at once in tier {tier!r}, whose budget is {budget_bytes} bytes; {way_out}"
        )

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross process borders; exceptions rebuild from their message alone
        options: dict[str, Any] = {
            "tier": self.tier,
            "required_bytes": self.required_bytes,
            "budget_bytes": self.budget_bytes,
            "hint": self._hint,
        }
        return functools.partial(BudgetError, **options), (self.operation,)


class CheckpointError(TierStoreError, RuntimeError):
    """A checkpoint that cannot be opened, or that does not fit a model.

    `missing`, `unexpected` and `mismatched` name the tensors concerned, as `load_state_dict` would.
    """

    def __init__(
        self, message: str, *, missing: Sequence[str] = (), unexpected: Sequence[str] = (), mismatched: Sequence[str] = ()
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)
        super().__init__(message)


class RemoteError(TierStoreError, OSError):
    """A store elsewhere that refused a request, or kept failing for as many attempts as are made."""

    def __init__(self, operation: str, attempts: int, reason: str) -> None:
        self.operation = operation
        self.attempts = attempts
        self.reason = reason
        tried = "" if attempts == 1 else f" {attempts} times"
        super().__init__(f"{operation} failed{tried}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteError, (self.operation, self.attempts, self.reason)


class StorageError(TierStoreError, OSError):
    """A file system or device that refuses or fails; `errno` says how, the message what was kept and what to do."""


class CorruptionError(TierStoreError, OSError):
    """Stored bytes that are missing or do not match their description; `key` is empty where the file as a whole is wrong."""

    def __init__(self, key: str, file: str, reason: str) -> None:
        self.key = key
        self.file = file
        self.reason = reason
        whole = f"{file} is damaged ({reason}); restore the file"
        super().__init__(f"stored value of {key!r} is damaged ({reason}) in {file}; delete the entry or restore the file" if key else whole)

    def __reduce__(self) -> tuple[Any, ...]:
        return CorruptionError, (self.key, self.file, self.reason)
