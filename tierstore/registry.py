"""Finds backends by name through the entry-point group `tierstore.backends`; built-in and third-party ones alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tierstore.backend import Backend
from tierstore.errors import BackendError

GROUP = "tierstore.backends"


def backend_names() -> list[str]:
    """Return the names of all installed backends, sorted."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def backend_class(name: str) -> type[Backend]:
    """Return the backend class registered as `name`; raise `BackendError` listing what is installed."""
    points = {(point.name, point.value): point for point in entry_points(group=GROUP) if point.name == name}
    if not points:
        raise BackendError(f"no backend is called {name!r}; installed: {', '.join(backend_names()) or 'none'}")
    if len(points) > 1:
        owners = ", ".join(sorted(_owner(point) for point in points.values()))
        raise BackendError(f"the backend name {name!r} is claimed by {owners}; uninstall all but one")
    loaded = next(iter(points.values())).load()
    if not (isinstance(loaded, type) and issubclass(loaded, Backend)):
        raise BackendError(f"the entry point {name!r} names {loaded!r}, which is not a subclass of tierstore.Backend")
    return loaded


def open_backend(name: str, *args: Any, **options: Any) -> Backend:
    """Construct the backend registered as `name` with the arguments of its class."""
    return backend_class(name)(*args, **options)


def open_url(url: str) -> Backend:
    """Construct the backend for a URL: the one named like its scheme, or else the one for everything remote.

    Where that can make a place of its own, which goes at the end, it does.
    """
    scheme = url.partition("://")[0]
    made = backend_class(scheme if scheme in backend_names() else "remote")
    opener: Callable[[str], Backend] = getattr(made, "scratch", made)
    return opener(url)


def duplicate_names() -> list[str]:
    """Return backend names that more than one distribution claims."""
    values = {(point.name, point.value) for point in entry_points(group=GROUP)}
    return sorted(name for name, count in Counter(name for name, _ in values).items() if count > 1)


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} ({point.value})" if point.dist is not None else point.value
