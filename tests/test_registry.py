"""Backends are found by name through entry points, the built-in ones like those of others."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from tierstore import registry
from tierstore.backend import Backend
from tierstore.errors import BackendError
from tierstore.registry import GROUP, backend_class, backend_names, duplicate_names, open_backend
from tierstore.testing import DictBackend

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
DECLARED: dict[str, str] = PYPROJECT["project"]["entry-points"][GROUP]


def claim(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    found = [EntryPoint(name, value, GROUP) for name, value in points]
    monkeypatch.setattr(registry, "entry_points", lambda *, group: found if group == GROUP else [])


def test_the_installation_knows_every_declared_backend() -> None:
    installed = {
        point.name: point.value for point in entry_points(group=GROUP) if point.dist is not None and point.dist.name == "tierstore"
    }
    assert installed == DECLARED, "the installed metadata is stale: run pip install -e . again"


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_every_declared_backend_loads(name: str) -> None:
    assert issubclass(backend_class(name), Backend)
    assert name in backend_names()


def test_nothing_installed_is_claimed_twice() -> None:
    assert duplicate_names() == []


def test_open_backend_passes_arguments_on(tmp_path: Path) -> None:
    backend = open_backend("device", "cpu")
    assert str(backend.device) == "cpu"  # type: ignore[attr-defined]
    backend.close()


def test_an_unknown_name_lists_what_is_installed() -> None:
    with pytest.raises(BackendError) as caught:
        open_backend("dsik")
    assert "'dsik'" in str(caught.value)
    assert all(name in str(caught.value) for name in DECLARED)


def test_no_backends_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch)
    with pytest.raises(BackendError, match="installed: none"):
        backend_class("device")


def test_a_third_party_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, ("mine", "tierstore.testing.faults:DictBackend"))
    assert backend_class("mine") is DictBackend
    assert backend_names() == ["mine"]


def test_a_name_claimed_twice_is_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, ("mine", "one.package:One"), ("mine", "another:Two"), ("single", "tierstore.testing.faults:DictBackend"))
    with pytest.raises(BackendError, match=r"'mine'.*another:Two.*one\.package:One.*uninstall"):
        backend_class("mine")
    assert duplicate_names() == ["mine"]
    assert backend_class("single") is DictBackend


def test_the_same_claim_seen_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable install beside a regular one lists each entry point twice."""
    claim(monkeypatch, *[("mine", "tierstore.testing.faults:DictBackend")] * 2)
    assert backend_class("mine") is DictBackend
    assert duplicate_names() == []


@pytest.mark.parametrize("value", ["tierstore.testing.faults:wrap", "tierstore.ledger:Ledger"])
def test_what_is_not_a_backend_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    claim(monkeypatch, ("mine", value))
    with pytest.raises(BackendError, match=r"not a subclass of tierstore\.Backend"):
        backend_class("mine")
