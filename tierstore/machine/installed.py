"""Which backends are installed, which of them can be imported, and which packages of the extras are missing."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points

from tierstore.errors import BackendError
from tierstore.registry import GROUP, backend_class

_REQUIREMENT = re.compile(r"""\s*([\w.-]+)(?:\[[^]]*\])?([^;]*);.*\bextra\s*==\s*['"]([^'"]+)['"]""")


@dataclass(frozen=True, slots=True)
class Installed:
    """A backend: its name, the class behind it, who brought it, and why it cannot be used ("" if it can)."""

    name: str
    target: str
    distribution: str
    problem: str


@dataclass(frozen=True, slots=True)
class Extra:
    """An extra of a distribution: the packages that are missing for it (none: it is complete), and the command that brings them."""

    name: str
    missing: tuple[str, ...]
    command: str


def installed_backends() -> list[Installed]:
    """Return every backend by name; each is imported."""
    found = []
    for point in sorted(set(entry_points(group=GROUP)), key=lambda point: point.name):
        owner = point.dist.name if point.dist is not None else "?"
        found.append(Installed(point.name, point.value, owner, _problem(point.name, owner)))
    return found


def _problem(name: str, owner: str) -> str:
    try:
        backend_class(name)
    except BackendError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  (importing runs code of others, which may fail in any way; that is looked for)
        lacking = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
        helping = [extra for extra in extras_of(owner) if lacking and any(lacking in package for package in extra.missing)]
        way_out = helping[0].command if helping else f"pip install --force-reinstall {owner}"
        return f"it cannot be imported ({type(error).__name__}: {error}); {way_out}"
    return ""


def extras_of(distribution: str) -> list[Extra]:
    """Return the extras of an installed distribution; none if it is not installed, or has none."""
    try:
        requires = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    packages: dict[str, list[str]] = {}
    for requirement in requires:
        match = _REQUIREMENT.match(requirement)
        if match is not None:
            packages.setdefault(match[3], []).append(match[1])
    own = distribution.lower()
    return [
        Extra(name, tuple(_missing(package for package in needed if package.lower() != own)), f"pip install '{distribution}[{name}]'")
        for name, needed in packages.items()
    ]


def _missing(packages: Iterator[str]) -> Iterator[str]:
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package
