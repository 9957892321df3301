"""Byte sizes as people write them, and the tree of errors."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore import errors
from tierstore.errors import BudgetError, CorruptionError, MissingKeyError, SizeError, TierStoreError
from tierstore.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("8GiB", 8 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 GiB", 3 * 2**29),
        (" 2 kb ", 2000),
        ("3KIB", 3072),
        ("1TB", 10**12),
        ("1tib", 2**40),
        ("7 B", 7),
        (12, 12),
        (0, 0),
        ("9007199254740993", 2**53 + 1),  # a float would lose the last bit
    ],
)
def test_accepted_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "bad", ["", "GiB", "8 GiBs", "-1", "-1GiB", "1e9", "8,5GB", "0x10", "1 2", ".5GB", "5.", -1, True, 1.5, None, b"8", [8]]
)
def test_refused_sizes_name_the_accepted_forms(bad: object) -> None:
    with pytest.raises(SizeError, match="8GiB") as caught:
        parse_size(bad)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    assert repr(bad) in str(caught.value) or str(bad) in str(caught.value)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (8 * 2**30, "8 GiB"),
        (3 * 2**40, "3 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_formatted_sizes(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@given(st.integers(0, 2**50))
def test_a_formatted_size_parses_to_nearly_the_same(nbytes: int) -> None:
    assert abs(parse_size(format_size(nbytes)) - nbytes) <= nbytes * 5e-4 + 0.5


def _all_errors() -> list[type[Exception]]:
    return [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]


@pytest.mark.parametrize("error", _all_errors())
def test_every_error_is_a_tierstore_error_with_a_builtin_parent(error: type[Exception]) -> None:
    assert issubclass(error, TierStoreError)
    builtin = [base for base in error.__mro__ if base.__module__ == "builtins" and base not in (Exception, BaseException, object)]
    assert builtin or error is TierStoreError


@pytest.mark.parametrize(
    ("error", "parent"), [(BudgetError, MemoryError), (CorruptionError, OSError), (MissingKeyError, KeyError), (SizeError, ValueError)]
)
def test_parents_that_callers_already_catch(error: type[Exception], parent: type[Exception]) -> None:
    assert issubclass(error, parent)


def test_budget_error_says_both_numbers_the_tier_and_the_way_out() -> None:
    error = BudgetError("a lease on 'w'", tier="gpu", required_bytes=200, budget_bytes=100)
    assert (error.operation, error.tier, error.required_bytes, error.budget_bytes) == ("a lease on 'w'", "gpu", 200, 100)
    assert str(error) == (
        "a lease on 'w' needs 200 bytes at once in tier 'gpu', whose budget is 100 bytes; raise the budget of 'gpu' to at least 200 bytes"
    )
    assert str(BudgetError("x", tier="gpu", required_bytes=2, budget_bytes=1, hint="do this")).endswith("; do this")


def test_corruption_error_names_key_file_and_reason() -> None:
    error = CorruptionError("w", "/data/f", "3 bytes short")
    assert (error.key, error.file, error.reason) == ("w", "/data/f", "3 bytes short")
    assert all(part in str(error) for part in ("'w'", "/data/f", "3 bytes short", "delete"))


def test_missing_key_error_prints_as_a_sentence() -> None:
    assert str(MissingKeyError("no entry is called 'x'")) == "no entry is called 'x'"
    assert str(MissingKeyError()) == ""


@pytest.mark.parametrize(
    "error",
    [BudgetError("put", tier="cpu", required_bytes=2, budget_bytes=1), CorruptionError("w", "f", "r")],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_process_borders(error: Exception) -> None:
    """A data loader or process pool pickles what a worker raises; one that does not unpickle hangs or hides it."""
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)
