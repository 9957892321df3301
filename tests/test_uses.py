"""What people do with a model beside calling it: each use gives what it gives with the plain model, and leaves the same state."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, parametrizations, prune, vector_to_parameters
from torch.nn.utils.fusion import fuse_linear_bn_eval
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

from tests.plainly import gradients, nbytes, same, state, under_pressure
from tierstore import tiered

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
USES: dict[str, Callable[[nn.Module], Any]] = {}


class Block(nn.Module):
    """Has a parameter and a buffer of its own beside its children."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32)
        self.gain = nn.Parameter(torch.randn(32))
        self.register_buffer("shift", torch.linspace(0, 1, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.down(F.gelu(self.up(self.norm(x)))) + self.shift


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(5)))


def use(function: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    USES[function.__name__] = function
    return function


def loss(model: nn.Module) -> Callable[..., torch.Tensor]:
    return lambda p, x: functional_call(model, p, (x,)).square().sum()


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


# -- transforms, traces, modes --------------------------------------------------------------------------------------------


@use
def gradients_of_each_sample(m: nn.Module) -> Any:
    return vmap(grad(lambda p, x: loss(m)(p, x[None])), (None, 0))(dict(m.named_parameters()), X)


@use
def forward_mode(m: nn.Module) -> Any:
    p = {name: v.detach() for name, v in m.named_parameters()}
    return jvp(lambda p: functional_call(m, p, (X,)), (p,), ({name: torch.ones_like(v) for name, v in p.items()},))


@use
def dual_numbers(m: nn.Module) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(m(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


@use
def jacobian(m: nn.Module) -> Any:
    return jacrev(lambda g: functional_call(m, {"0.gain": g}, (X,)))(m[0].gain)


@use
def second_derivatives(m: nn.Module) -> Any:
    return hessian(lambda g: functional_call(m, {"0.gain": g}, (X,)).sum())(m[0].gain)


@use
def ensemble(m: nn.Module) -> Any:
    parameters, buffers = stack_module_state([m[0], m[1], m[2]])
    base = copy.deepcopy(m[0]).to("meta")
    return vmap(lambda p, b: functional_call(base, (p, b), (X,)))(parameters, buffers)


@use
def traced(m: nn.Module) -> Any:
    return torch.jit.trace(m, X)(X)


@use
def exported(m: nn.Module) -> Any:
    return torch.export.export(m, (X,)).module()(X)


@use
def symbolically_traced(m: nn.Module) -> Any:
    return torch.fx.symbolic_trace(m)(X)


@use
def fake_tensors(m: nn.Module) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return tuple(m(X).shape)


@use
def counted_flops(m: nn.Module) -> Any:
    with FlopCounterMode(display=False) as counter:
        m(X)
    return counter.get_total_flops()


@use
def autocast(m: nn.Module) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        result = m(X)
        result.float().sum().backward()
    return result.detach()


@use
def anomaly_detection(m: nn.Module) -> Any:
    with torch.autograd.detect_anomaly(check_nan=False):
        m(X).sum().backward()


@use
def saved_on_cpu(m: nn.Module) -> Any:
    with torch.autograd.graph.save_on_cpu():
        result = m(X)
    result.sum().backward()


@use
def checkpointed(m: nn.Module) -> Any:
    result = checkpoint_sequential(m, 3, X.clone().requires_grad_(), use_reentrant=False)
    result.sum().backward()
    return result.detach()


@use
def double_backward(m: nn.Module) -> Any:
    first = torch.autograd.grad(m(X).square().sum(), list(m.parameters()), create_graph=True)
    sum(g.square().sum() for g in first).backward()


@use
def backward_twice(m: nn.Module) -> Any:
    result = m(X).sum()
    result.backward(retain_graph=True)
    result.backward()


@use
def changed_before_backward(m: nn.Module) -> Any:
    result = m(X).sum()
    with torch.no_grad():
        m[3].up.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@use
def gradient_hooks(m: nn.Module) -> Any:
    seen: list[torch.Tensor] = []
    for p in m.parameters():
        p.register_hook(lambda g: g * 2)
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.sum()))
    m(X).sum().backward()
    return seen


@use
def threads(m: nn.Module) -> Any:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda i: m(X + i).detach(), range(8)))


# -- training -------------------------------------------------------------------------------------------------------------


@use
def momentum(m: nn.Module) -> Any:
    return trained(m, torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, foreach=True))


@use
def fused_adamw(m: nn.Module) -> Any:
    return trained(m, torch.optim.AdamW(m.parameters(), 0.01, fused=True))


@use
def line_search(m: nn.Module) -> Any:
    optimizer = torch.optim.LBFGS(m.parameters(), max_iter=4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = m(X).square().mean()
        value.backward()
        return value

    optimizer.step(closure)


@use
def clipped(m: nn.Module) -> Any:
    m(X).sum().backward()
    return clip_grad_norm_(m.parameters(), 0.1)


@use
def averaged(m: nn.Module) -> Any:
    average = AveragedModel(m)
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(1.1)
    average.update_parameters(m)
    return average(X).detach()


@use
def moving_average(m: nn.Module) -> Any:
    average = copy.deepcopy(m)
    with torch.no_grad():
        for p, q in zip(average.parameters(), m.parameters(), strict=True):
            p.lerp_(q + 1, 0.1)
    return average(X).detach()


@use
def partly_frozen(m: nn.Module) -> Any:
    m.requires_grad_(False)
    m[0].requires_grad_(True)
    m(X).sum().backward()


# -- reading weights ------------------------------------------------------------------------------------------------------


@use
def read_elsewhere(m: nn.Module) -> Any:
    w, g = m[0].up.weight, m[0].gain
    return [
        F.linear(F.linear(X, w), m[1].down.weight) + m[2].gain,
        torch.einsum("ij,kj->ik", X, w),
        torch.cat([p.flatten() for p in m.parameters()]),
        torch.stack([block.up.weight for block in m]).sum(0),
        torch.stack([row.sum() for row in w]),
        torch.linalg.svdvals(w) if torch.is_grad_enabled() else w,  # else torch asks whether it is a subclass, and takes another routine
        parameters_to_vector(m.parameters()),
        torch.mm(X, w.t(), out=torch.empty(4, 64)) if not torch.is_grad_enabled() else w.t(),
        w.t().contiguous().view(-1),
        w.t().reshape(-1),
        w.to(torch.bfloat16),
        w.view(32, 64).flatten(),
        [g.clone(), g.cpu(), g.contiguous(), torch.as_tensor(g), g.detach().to("cpu", copy=True), g.expand_as(X)],
    ]


@use
def read_by_others(m: nn.Module) -> Any:
    g = m[0].gain.detach()
    arrays = torch.from_numpy(g.numpy().copy()), torch.from_numpy(np.asarray(g).copy()), torch.from_dlpack(g).clone()
    return arrays, g.tolist(), g[3].item(), repr(m[0].gain), f"{g[0]:.3f} {g.norm():.4f} {bool((g > 9).any())}", g[0].item() in g


@use
def asked_about(m: nn.Module) -> Any:
    w = m[0].up.weight
    seen = w.shape, w.dtype, str(w.device), w.stride(), w.is_contiguous(), w.nbytes, w.is_leaf, w.requires_grad, len(w), w.T.shape
    return seen, isinstance(w, nn.Parameter), {p: i for i, p in enumerate(m.parameters())}[m[0].gain], w.untyped_storage().nbytes()


@use
def saved_and_loaded(m: nn.Module) -> Any:
    file, whole = io.BytesIO(), io.BytesIO()
    torch.save(m.state_dict(), file)
    torch.save(m, whole)
    other = net()
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return state(other), torch.load(io.BytesIO(whole.getvalue()), weights_only=False)(X)


@use
def fused(m: nn.Module) -> Any:
    return fuse_linear_bn_eval(m[0].up.eval(), nn.BatchNorm1d(64).eval())(X)


# -- changing weights -----------------------------------------------------------------------------------------------------


@use
def written_in_place(m: nn.Module) -> Any:
    with torch.no_grad():
        w = m[0].up.weight
        w[3:5].zero_()
        w.view(-1)[::7].add_(1)
        w[torch.tensor([1, 2])] = X[:2]
        w[w > 0] *= 2
        m[1].gain[0] = 5
        m[2].up.weight.data.copy_(torch.ones(64, 32))
    return m(X).detach()


@use
def other_data(m: nn.Module) -> Any:
    m[0].up.weight.data = m[0].up.weight.data * 2
    m[1].up.weight.data, m[1].up.bias.data, m[1].down.weight.data = torch.ones(10, 32), torch.ones(10), torch.ones(32, 10)
    return m(X).detach()


@use
def from_a_vector(m: nn.Module) -> Any:
    vector_to_parameters(parameters_to_vector(m.parameters()).detach() * 1.5, m.parameters())
    return m(X).detach()


@use
def initialised_again(m: nn.Module) -> Any:
    torch.manual_seed(3)
    m.apply(lambda layer: nn.init.xavier_uniform_(layer.weight) if isinstance(layer, nn.Linear) else None)
    nn.init.trunc_normal_(m[0].down.weight)
    return m(X).detach()


@use
def loaded_by_assignment(m: nn.Module) -> Any:
    m.load_state_dict({name: value * 2 for name, value in net().state_dict().items()}, assign=True)
    return m(X).detach(), str(m.load_state_dict(dict(list(net().state_dict().items())[:-1]), strict=False))


@use
def in_half_precision(m: nn.Module) -> Any:
    return m.half()(X.half()).detach(), m.to(torch.bfloat16)(X.bfloat16()).detach(), m.double()(X.double()).detach()


@use
def pruned(m: nn.Module) -> Any:
    prune.l1_unstructured(m[0].up, "weight", amount=0.3)
    while_pruned = m(X).detach()
    prune.remove(m[0].up, "weight")
    return while_pruned, m(X).detach()


@use
def parametrized(m: nn.Module) -> Any:
    parametrizations.spectral_norm(m[0].up)
    parametrizations.orthogonal(m[1].up)
    parametrizations.weight_norm(m[2].up)
    return m(X).detach()


@use
def another_structure(m: nn.Module) -> Any:
    torch.manual_seed(5)
    m[2] = Block()
    m[0].up.bias = None
    m[0].extra = nn.Parameter(torch.ones(32))
    m[0].gain = nn.Parameter(m[0].gain.detach() * 2)
    m[1].shift = torch.ones(32)
    m[1].register_buffer("more", torch.ones(3))
    m[4].up.weight = m[3].up.weight
    return m(X).detach(), [name for name, _ in m.named_parameters()], [name for name, _ in m.named_buffers()]


def outcome(function: Callable[[nn.Module], Any], model: nn.Module, mode: str) -> Any:
    torch.manual_seed(7)
    if mode == "inference":
        with torch.inference_mode():
            result = function(model)
    else:
        with torch.set_grad_enabled(mode == "grad"):
            result = function(model)
    return torch.utils._pytree.tree_map(lambda r: r.detach().clone() if isinstance(r, torch.Tensor) else r, result)


READS = ("read_elsewhere", "read_by_others", "asked_about", "counted_flops", "fused", "averaged", "moving_average", "in_half_precision")


CASES = [*((name, "grad") for name in USES), *((name, mode) for name in READS for mode in ("no_grad", "inference"))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [1 / 3, 10], ids=["third", "held"])
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_use_is_that_of_the_plain_model(name: str, mode: str, share: float, scratch: Path) -> None:
    plain, model = net(), net()
    expected = outcome(USES[name], plain, mode)
    with tiered(model, gpu=int(nbytes(model) * share), cpu=nbytes(model) // 3, disk=scratch, device="cpu"):
        assert same(outcome(USES[name], model, mode), expected)
    assert same(state(model), state(plain))
    assert same(gradients(model), gradients(plain))


def test_a_model_used_in_inference_mode_is_never_reinterpreted(scratch: Path) -> None:
    """Operators that may copy (`contiguous`, `reshape`, `to`) arrive undivided in inference mode, and look like views."""
    model, plain = net(), net()
    with under_pressure(model, scratch), torch.inference_mode():
        w, v = model[0].up.weight, plain[0].up.weight
        assert torch.equal(w.to(torch.bfloat16) + 0, v.to(torch.bfloat16))
        assert torch.equal(w.t().contiguous() + 0, v.t().contiguous())
        assert torch.equal(w.t().reshape(16, 128) + 0, v.t().reshape(16, 128))
        assert torch.equal(w.t().flatten() + 0, v.t().flatten())
