"""Looking at what is stored somewhere, through it for damage, and putting that right; what a command line, or a script, calls."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tierstore.errors import BackendError
from tierstore.registry import backend_class, backend_names
from tierstore.spec import TensorSpec

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


@dataclass(frozen=True, slots=True)
class Contents:
    """What is stored at `path`: the tensors by key, each with the file that has it, and the bytes of every file.

    `kind` says what it is ("disk store"), `facts` what else there is to know of such a thing: its format, its state. Files
    are named relative to `path`.
    """

    path: str
    kind: str
    tensors: Mapping[str, tuple[TensorSpec, str]]
    files: Mapping[str, int]
    facts: Mapping[str, str | int | bool]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors; their files have headers as well."""
        return sum(spec.nbytes for spec, _ in self.tensors.values())


class Described(ABC):
    """A backend that can tell what is stored at a path without opening it as a tier: headers and indices are read, and no value."""

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path) -> bool:
        """True if what is at `path`, which exists, looks like something of this kind, sound or not."""

    @classmethod
    @abstractmethod
    def describe(cls, path: Path) -> Contents:
        """Return what is there, changing nothing. Raises what opening it for reading would."""


def describe(path: PathLike) -> Contents:
    """Return what is stored at `path`, which one of the installed backends must recognise; raise `BackendError` if none does.

    Damage raises `CorruptionError`, a checkpoint that is not whole `CheckpointError`.
    """
    place = Path(path).expanduser().absolute()
    if not place.exists():
        raise BackendError(f"there is nothing at {place}; give the path of a checkpoint, of a file of one, or of a disk store")
    unusable = []
    for name in backend_names():
        try:
            kind = backend_class(name)
        except ImportError:
            unusable.append(name)
            continue
        if issubclass(kind, Described) and kind.recognises(place):
            return kind.describe(place)
    has = f"it has {sorted(entry.name for entry in place.iterdir())[:5]}" if place.is_dir() else "its name ends like none of theirs"
    raise BackendError(f"{place} is neither a checkpoint nor a store that an installed backend knows; {has}{_told_of(unusable)}")


def _told_of(unusable: list[str]) -> str:
    return f"; {', '.join(unusable)} cannot be imported, and `tierstore doctor` says why" if unusable else ""


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
