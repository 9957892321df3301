"""Checks that a backend or a policy keeps its contract; the error names the rule that it breaks.

A test of a backend is one call: `check_backend(lambda: MyBackend(next(fresh_directories)), reopen=close_and_open_again)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from tierstore.backend import Backend
from tierstore.testing.backend_checks import BACKEND_CHECKS, ODD_KEYS, check_reopen
from tierstore.testing.capability_checks import CAPABILITY_CHECKS
from tierstore.testing.policy_checks import check_policy
from tierstore.testing.release_checks import check_release
from tierstore.testing.rules import BACKEND_RULES, POLICY_RULES, ConformanceError, require, rule

__all__ = ["BACKEND_RULES", "ODD_KEYS", "POLICY_RULES", "ConformanceError", "check_backend", "check_policy"]


def check_backend(make_backend: Callable[[], Backend], *, reopen: Callable[[Backend], Backend] | None = None) -> None:
    """Raise `ConformanceError` for the first rule of `Backend` that fresh backends from `make_backend` break.

    `reopen` closes a backend and returns one over the same values; give it for backends that outlive their process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message="ComplexHalf")
        for check in (*BACKEND_CHECKS, *CAPABILITY_CHECKS):
            backend = make_backend()
            with rule("fresh", "a fresh backend cannot tell its entries"):
                require(not list(backend.entries()), "fresh", "make_backend() must return an empty backend each time")
            check(backend)
            with rule("close"):
                backend.close()
        if reopen is not None:
            check_reopen(make_backend(), reopen)
        check_release(make_backend)
