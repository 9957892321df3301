"""Looking through a store on disk for damage, and putting it right; what a command line, or a script, calls."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass

from tierstore.errors import BackendError
from tierstore.registry import backend_class

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: with which value ("?" if that cannot be told), in which file, and what."""

    key: str
    file: str
    problem: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found in a store: sound values, their bytes, and everything that is not as it should be."""

    values: int
    nbytes: int
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        return not self.findings


class Maintained(ABC):
    """A backend whose stores can be looked through, and put right, without opening them as a tier."""

    @classmethod
    @abstractmethod
    def verify(cls, path: PathLike) -> Inspection:
        """Read every byte of the store at `path` and check it, changing nothing; also while another process writes.

        Raises `BackendError` if there is no store of this kind.
        """

    @classmethod
    @abstractmethod
    def repair(cls, path: PathLike) -> Inspection:
        """Leave the store at `path` with its sound values only; the findings say what was wrong, and what became of it.

        Raises `BackendError` if there is no store of this kind, or if another process has it open.
        """


def verify(path: PathLike, backend: str = "disk") -> Inspection:
    """Check every byte of the store at `path`, which the backend of this name has written."""
    return _maintained(backend).verify(path)


def repair(path: PathLike, backend: str = "disk") -> Inspection:
    """Drop what is damaged in the store at `path`, and make its index anew if need be."""
    return _maintained(backend).repair(path)


def _maintained(name: str) -> type[Maintained]:
    found = backend_class(name)
    if not issubclass(found, Maintained):
        raise BackendError(f"stores of the backend {name!r} cannot be looked through; open them instead")
    return found
