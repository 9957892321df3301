"""What a check says when it finds a mistake, and the comparisons that all checks share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tierstore.backend import Backend
from tierstore.spec import TensorSpec
from tierstore.testing.values import bits

BACKEND_RULES = frozenset((
    "fresh", "dtype", "shape", "stride", "bits", "entries", "missing key", "overwrite", "put copies", "put only reads", "get is private",
    "get survives", "plain tensor", "delete", "atomic put", "odd keys", "threads", "large values", "live memory", "adopt", "allocate",
    "pieces", "extent", "read into", "stored bytes", "reopen", "release", "close",
))  # fmt: skip
"""What a backend can break, by the names in `ConformanceError.rule`."""

POLICY_RULES = frozenset((
    "fresh", "independence", "insert", "insert again", "access", "access all", "remove", "iterator", "stable order", "told", "wanted",
    "spare",
))  # fmt: skip
"""What a policy can break."""


class ConformanceError(AssertionError):
    """A broken rule: `rule` is its name, the message also says where it broke."""

    def __init__(self, rule: str, detail: str) -> None:
        assert rule in BACKEND_RULES | POLICY_RULES, rule
        self.rule = rule
        super().__init__(f"rule {rule!r} is broken: {detail}")


@contextmanager
def rule(name: str, detail: str = "") -> Iterator[None]:
    """Blame every exception inside on the rule `name`."""
    try:
        yield
    except ConformanceError:
        raise
    except Exception as error:
        raise ConformanceError(name, f"{detail}: {type(error).__name__}: {error}".removeprefix(": ")) from error


def require(condition: bool, name: str, detail: str) -> None:
    if not condition:
        raise ConformanceError(name, detail)


def compare(backend: Backend, key: str, expected: torch.Tensor, name: str, detail: str) -> None:
    """Require the value of `key` to equal `expected`; `name` is the rule that different bits break."""
    with rule(name, detail):
        found = backend.get(key)
    for field in ("dtype", "shape", "stride"):
        have, want = getattr(TensorSpec.of(found), field), getattr(TensorSpec.of(expected), field)
        require(have == want, field, f"{detail}: put {want}, got {have}")
    require(bits(found) == bits(expected), name, f"{detail}: the bits differ")


def compare_entries(backend: Backend, expected: dict[str, TensorSpec], name: str) -> None:
    with rule(name):
        listed = list(backend.entries())
    found = dict(listed)
    require(len(listed) == len(found), name, f"entries() names a key twice: {sorted(key for key, _ in listed)}")
    require(found.keys() == expected.keys(), name, f"entries() and puts differ in the keys {sorted(found.keys() ^ expected.keys())}")
    for key, spec in expected.items():
        require(found[key] == spec, name, f"entries() says {found[key]} ({found[key].nbytes} bytes) for {key!r}, put was {spec}")
