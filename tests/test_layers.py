"""Imports point downwards only, and nothing in `tierstore/` knows a concrete backend."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "tierstore"

# bottom first; modules of one layer may import one another, without a cycle
LAYERS = (
    {"errors", "sizes", "spec", "recipe", "devices", "shield", "file_system", "checksum", "open_file"},
    {"backend", "registry", "maintenance", "pieces"},
    {"ledger", "planning"},
    {"entry", "tier", "sharing", "building", "stats", "timeline", "picture", "transfer", "machine"},
    {"residency", "flights", "leasing", "writing", "lease"},
    {"store"},
    {"report"},
    {"patch"},
    {"parts", "running", "chain", "chain_opening", "session", "training", "checkpoint", "pretrained", "outlook", "compat"},
    {"commands", "__main__", "testing"},
)


def module_names() -> dict[str, Path]:
    """Map "patch.scope" to its file, for every module but the backends; the package itself is ""."""
    files = [file for file in SOURCE.rglob("*.py") if "backends" not in file.relative_to(SOURCE).parts]
    return {".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip("."): file for file in files}


FILES = module_names()
MODULES = sorted(name for name in FILES if name)


def imports_in(source: str) -> Iterator[str]:
    """Yield every imported module of the package relative to it, also imports inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides its layer; write it out"
            assert node.module is not None
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in named if name.removeprefix("tierstore.") in FILES}
            yield from modules
            if named - modules:  # a name that the module itself defines
                yield node.module


def own_imports(name: str, files: dict[str, Path]) -> set[str]:
    """Return which modules of the package `name` imports."""
    found = set()
    for imported in imports_in(files[name].read_text()):
        if imported == "tierstore":
            found.add("")
        elif imported.startswith("tierstore.") and (
            imported.removeprefix("tierstore.") in files or imported.startswith("tierstore.backends")
        ):
            found.add(imported.removeprefix("tierstore."))
    return found


def layer(name: str) -> int:
    top = name.partition(".")[0]
    for rank, names in enumerate(LAYERS):
        if top in names:
            return rank
    raise AssertionError(f"tierstore/{top} has no place in LAYERS; add it there, above everything it imports")


def test_there_is_something_to_check() -> None:
    assert {"errors", "store", "patch", "testing.faults"} <= set(MODULES)
    assert own_imports("store", FILES) >= {"backend", "entry", "writing"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name: str) -> None:
    upwards = sorted(other for other in own_imports(name, FILES) if layer(other) > layer(name))
    assert not upwards, f"tierstore.{name} imports {upwards} from a layer above it"


@pytest.mark.parametrize("name", ["", *MODULES])
def test_no_module_knows_a_concrete_backend(name: str) -> None:
    known = [other for other in own_imports(name, FILES) if other.startswith("backends")]
    assert not known, f"tierstore.{name} imports {known}; find it with tierstore.registry.backend_class"


@pytest.mark.parametrize("name", [name for name in MODULES if layer(name) < len(LAYERS) - 1])
def test_no_module_imports_the_package_itself(name: str) -> None:
    assert "" not in own_imports(name, FILES), "import from the module that defines the name, or the package's import order matters"


def test_planning_knows_no_torch() -> None:
    """Policies and plans are replayed where no tensor is; what they import must not bring torch in either."""
    seen, todo = set[str](), [name for name in MODULES if name.startswith("planning.")]
    assert "planning.replay" in todo
    while todo:
        name = todo.pop()
        seen.add(name)
        assert "torch" not in {other.partition(".")[0] for other in imports_in(FILES[name].read_text())}, f"tierstore.{name} imports torch"
        todo += own_imports(name, FILES) - seen


def test_no_cycles() -> None:
    graph = {name: {other for other in own_imports(name, FILES) if other in FILES and other != name} for name in MODULES}
    packages = {name for name in MODULES if any(other.startswith(f"{name}.") for other in MODULES)}
    for name in graph:  # importing a.b runs a/__init__ first, which is allowed to import a.b
        graph[name] -= {package for package in packages if name.startswith(f"{package}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"cycle: {' -> '.join(error.args[1])}")


def test_layers_name_each_module_once() -> None:
    names = [name for names in LAYERS for name in names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    from tierstore.store import TieredStore", "tierstore.store"),
        ("if TYPE_CHECKING:\n    import tierstore.session", "tierstore.session"),
        ("from tierstore import store", "tierstore.store"),
        ("from tierstore import TieredStore, store", "tierstore"),
        ("from tierstore.backends.disk import DiskBackend", "tierstore.backends.disk"),
    ],
)
def test_hidden_imports_are_seen(source: str, found: str) -> None:
    assert found in set(imports_in(source))
