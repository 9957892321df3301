"""What only an accelerator shows: copies between devices, pinned memory, models that come back to where they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.plainly import gradients, largest, nbytes, same, state
from tests.test_models import MODELS, mlp
from tierstore import Tier, TieredStore, open_backend, tiered
from tierstore.devices import working_accelerator

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    found = working_accelerator()
    if found is None:
        pytest.fail("tests marked gpu need an accelerator that works")
    return torch.empty(1, device=found).device


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("home", ["cpu", "accelerator"])
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_plain_on_the_accelerator(name: str, home: str, grad: bool, device: torch.device, scratch: Path) -> None:
    make, x = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    plain = copy.deepcopy(model).to(device)
    if home == "accelerator":
        model = model.to(device)
    devices = {n: p.device for n, p in model.named_parameters()}
    total = nbytes(model)

    def step(m: nn.Module) -> Any:
        with torch.set_grad_enabled(grad):
            y = m(x.to(device))
            if grad:
                y.square().sum().backward()
            return y.detach()

    expected = step(plain)
    with tiered(model, gpu=max(total // 3, largest(model)), cpu=total // 3, disk=scratch) as session:
        assert same(step(model), expected)
        assert session.device == device
        for tier in session.stats().tiers.values():
            assert tier.budget_bytes is None or tier.peak_bytes <= tier.budget_bytes
    assert {n: p.device for n, p in model.named_parameters()} == devices
    plain, model = plain.cpu(), model.cpu()
    assert same(gradients(model), gradients(plain))
    assert same(state(model), state(plain))


def test_held_model_moves_and_comes_back(device: torch.device) -> None:
    model = mlp()
    objects, values = dict(model.named_parameters()), state(model)
    with tiered(model, gpu="1MiB"):
        assert all(p.device == device for p in model.parameters())
        assert all(type(p) is nn.Parameter for p in model.parameters())
        model(torch.ones(1, 16, device=device)).sum().backward()
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert all(p.grad is not None and p.grad.device.type == "cpu" for p in model.parameters())
    assert dict(model.named_parameters()) == objects
    assert same(state(model), values)


def test_moving_to_the_same_device_is_fine(device: torch.device, scratch: Path) -> None:
    model = mlp()
    with tiered(model, gpu=largest(model) * 2, disk=scratch):
        model.to(device.type)
        with pytest.raises(ValueError, match="cannot be moved"):
            model.cpu()


def test_pinned_tier(device: torch.device) -> None:
    backend = open_backend("pinned")
    store = TieredStore([Tier("gpu", open_backend("device", device), 100_000), Tier("cpu", backend)])
    values = {str(i): torch.randn(100, 100) for i in range(10)}
    for key, value in values.items():
        store.put(key, value)
    assert backend.get("0").is_pinned()
    for key, value in values.items():
        assert torch.equal(store.get(key).cpu(), value)
        assert store.get(key).device == device
    store.close()


def test_memory_follows_the_budget(device: torch.device, scratch: Path) -> None:
    """The allocator's own peak stays within budget and activations: nothing hides behind the ledger."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(16)))
    x = torch.randn(1, 1024, device=device)
    with torch.no_grad(), tiered(model, gpu="16MiB", cpu="16MiB", disk=scratch):
        model(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            model(x)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() <= before + 2**22
        assert before <= 2**24 + 2**22 + x.nbytes + 2**23
