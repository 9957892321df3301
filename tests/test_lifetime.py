"""A session that nobody closes goes with its model, and takes its files and threads along."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from tierstore import ModelError, tiered
from tierstore.patch.watch import is_watched
from tierstore.running import close_when_unused


def model() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))


@pytest.mark.parametrize("gpu", ["40KB", "1MB"], ids=["tiered", "held"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_model_that_nobody_has_is_collected(gpu: str, grad: bool, scratch: Path) -> None:
    forgotten = model()
    session = tiered(forgotten, gpu=gpu, disk=scratch, device="cpu")
    close_when_unused(session)
    forgotten.tiered = session
    with torch.set_grad_enabled(grad):
        forgotten(torch.ones(2, 64))
    gone = weakref.ref(forgotten), weakref.ref(session), weakref.ref(session.store)
    del forgotten, session
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]


def test_a_tensor_keeps_the_session(scratch: Path) -> None:
    plain = model()
    expected = plain[3].weight.detach().clone()
    session = tiered(plain, gpu="40KB", disk=scratch, device="cpu")
    close_when_unused(session)
    weight = plain[3].weight
    del plain, session
    gc.collect()
    assert torch.equal(weight, expected)
    kept = weakref.ref(weight)
    del weight
    gc.collect()
    assert kept() is None


def test_a_session_that_another_thread_collects(scratch: Path) -> None:
    close_when_unused(tiered(model(), gpu="40KB", disk=scratch, device="cpu"))
    collector = threading.Thread(target=gc.collect)
    collector.start()
    collector.join()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and "close" in thread.name:
            thread.join()


def test_modules_set_after_a_session_was_collected(scratch: Path) -> None:
    close_when_unused(tiered(model(), gpu="40KB", disk=scratch, device="cpu"))
    gc.collect()
    plain = model()
    plain.extra = nn.Linear(2, 2)  # what that session left registered is told of this, and does nothing
    assert type(plain.extra.weight) is nn.Parameter
    with tiered(plain, gpu="40KB", disk=scratch, device="cpu"):
        assert is_watched(plain.extra)
        with pytest.raises(ModelError, match="already under tiered"):
            tiered(plain, gpu="40KB", disk=scratch, device="cpu")
    assert not is_watched(plain.extra)
