"""Tensors of a checkpoint that nobody has read yet, in the hands of code that loads a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import contents, write_single
from tierstore import TierStoreError
from tierstore.checkpoint.lazy import CheckpointTensor, unread_tensors
from tierstore.checkpoint.source import open_source

STATE = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5)}


@pytest.fixture
def unread(tmp_path: Path) -> Iterator[dict[str, torch.Tensor]]:
    folder = write_single(tmp_path / "c", STATE)
    before = contents(folder)
    source = open_source(folder, None)
    yield unread_tensors(source)
    source.close()
    assert contents(folder) == before, "a checkpoint stays as it is"


def test_what_is_written_is_seen_by_views_and_by_nobody_else(unread: dict[str, torch.Tensor]) -> None:
    plain, tensor = STATE["a"].clone(), unread["a"]
    column, turned, snapshot = tensor[:, 1], tensor.t(), tensor.clone()
    for each in (plain, tensor):
        each[-1] = -1.0
        each[0, 1:3].add_(0.5)
        torch.mul(each[1], 2.0, out=each[1])
    expected = {"tensor": plain, "column": plain[:, 1], "turned": plain.t(), "row": plain[0]}
    found = {"tensor": tensor, "column": column, "turned": turned, "row": tensor[0]}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(snapshot, STATE["a"])
    assert torch.equal(tensor + snapshot, plain + STATE["a"])
    assert torch.equal(copy.deepcopy(tensor), plain)
    column.zero_()
    assert torch.equal(tensor[:, 1], torch.zeros(3))
    assert not isinstance(copy.deepcopy(column), CheckpointTensor)


def test_an_operator_in_place_returns_its_argument(unread: dict[str, torch.Tensor]) -> None:
    tensor = unread["b"]
    assert tensor.add_(1) is tensor
    assert tensor.add_(1) is tensor
    assert torch.equal(tensor, STATE["b"] + 2)
    parameter = torch.nn.Parameter(unread["a"], requires_grad=False)
    assert parameter.fill_(3.0) is parameter
    assert parameter.sum() == 36


def test_what_was_computed_is_written_to_alone(unread: dict[str, torch.Tensor]) -> None:
    both = unread["a"] * unread["a"]
    both.add_(1.0)
    assert torch.equal(both, STATE["a"] ** 2 + 1)
    assert torch.equal(unread["a"], STATE["a"])


def test_views_that_nobody_can_follow_are_not_written_through(unread: dict[str, torch.Tensor]) -> None:
    both = unread["a"] + unread["a"]
    view = both[0]
    bits = unread["b"].view(torch.int32)
    for each in (view, both, bits, unread["b"]):
        with pytest.raises(TierStoreError, match="load the model plainly"):
            each.add_(1)
    with pytest.raises(TierStoreError, match="shape"):
        unread["a"].resize_(2)
