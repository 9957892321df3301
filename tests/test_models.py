"""Every way that code gets at a weight gives the plain model's numbers."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.plainly import compare, nbytes, nothing_leased, restored, same, state, under_pressure
from tierstore import tiered
from tierstore.patch.tensor import TieredTensor

X = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(width, 2 * width), nn.LayerNorm(width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def mlp() -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(4)))


def backward(output: torch.Tensor) -> torch.Tensor:
    output.square().sum().backward()
    return output.detach()


def run(x: torch.Tensor = X) -> Callable[[nn.Module], Any]:
    return lambda model: model(x) if not torch.is_grad_enabled() else backward(model(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, 16), mlp(), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.alias = nn.Parameter(self.body[0].up.weight.data.view(-1)[5:40])  # shares memory without being the same object

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids))) + self.alias.sum()


class UsesChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child, self.body = nn.Linear(16, 16), mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(F.linear(x, self.child.weight, self.child.bias) + x @ self.child.weight.t())


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ParameterList(nn.Parameter(torch.randn(16, 16)) for _ in range(4))
        self.table = nn.ParameterDict({"a": nn.Parameter(torch.randn(16)), "b/c": nn.Parameter(torch.randn(16))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for item in self.items:
            x = torch.tanh(x @ item)
        return x * self.table["a"] + self.table["b/c"]


class Shapes(nn.Module):
    """0-dim, empty, transposed, sliced, expanded and channels-last weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 16))
        self.transposed = nn.Parameter(torch.randn(16, 12).t())
        self.sliced = nn.Parameter(torch.randn(16, 32)[:, ::2])
        self.register_buffer("expanded", torch.randn(16, 1).expand(16, 16))
        self.conv = nn.Conv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x @ self.sliced + x @ self.expanded) * self.scale + torch.cat([self.empty, x]).sum()
        return y[:, :12] @ self.transposed + self.conv(x.reshape(1, 4, 4, 4)).sum()


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step, self.body = nn.Linear(16, 16), mlp()

    def forward(self, x: torch.Tensor, depth: int = 3) -> torch.Tensor:
        y = torch.tanh(self.step(x))
        return self.body(y) if depth == 0 else self(y, depth - 1) + self.step(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn, self.body = kind(16, 16, num_layers=2, bidirectional=True), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.rnn(x)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x[None])


class OtherEntry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(16, 16), mlp()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.first(x)) @ self.first.weight


class BatchNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Mixture(nn.Module):
    """Which experts run depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(16, 4), nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best = self.router(x).argmax(-1)
        return torch.stack([self.experts[int(i)](row[None])[0] for i, row in zip(best, x, strict=True)])


def old_norms() -> nn.Module:
    first = torch.nn.utils.weight_norm(nn.Linear(16, 16))
    second = torch.nn.utils.spectral_norm(nn.Linear(16, 16))
    return nn.Sequential(first, second, mlp())


def parametrized() -> nn.Module:
    first = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    second = torch.nn.utils.parametrizations.orthogonal(nn.Linear(16, 16))
    third = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
    return nn.Sequential(first, second, third, mlp())


MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "mlp": (mlp, X),
    "tied": (Tied, torch.arange(12).reshape(3, 4)),
    "uses_child": (UsesChild, X),
    "lists": (Lists, X),
    "shapes": (Shapes, X),
    "recursive": (Recursive, X),
    "lstm": (lambda: Recurrent(nn.LSTM), X),
    "gru": (lambda: Recurrent(nn.GRU), X),
    "rnn": (lambda: Recurrent(nn.RNN), X),
    "attention": (Attention, X),
    "batch_norm": (BatchNorms, X),
    "mixture": (Mixture, X),
    "old_norms": (old_norms, X),
    "parametrized": (parametrized, X),
    "convolutions": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.ConvTranspose1d(8, 4, 3), nn.GroupNorm(2, 4)), X[None, :, :]),
}


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_plain(name: str, mode: str, scratch: Path) -> None:
    make, x = MODELS[name]

    def step(model: nn.Module) -> Any:
        model.train(mode == "train")
        if mode == "inference":
            with torch.inference_mode():
                return [model(x).clone() for _ in range(2)]
        return [run(x)(model) for _ in range(2)]

    session = compare(make, step, scratch, grad=mode in ("train", "eval"))
    assert session.stats().misses > 0


def test_other_entry_points(scratch: Path) -> None:
    compare(OtherEntry, lambda model: model.encode(X), scratch, grad=False)
    compare(OtherEntry, lambda model: backward(model.encode(X)), scratch)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, scratch: Path) -> None:
    def step(model: nn.Module) -> torch.Tensor:
        x = X.clone().requires_grad_()
        for block in model:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return backward(x)

    compare(mlp, step, scratch)


def test_autocast(scratch: Path) -> None:
    def step(model: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(X)
        return backward(y.float())

    compare(mlp, step, scratch)
    compare(lambda: Recurrent(nn.LSTM), step, scratch)


def test_weights_changed_between_forward_and_backward_under_autocast(scratch: Path) -> None:
    """The graph saved the cast copy, not the weight: an update in between must not be seen by backward."""

    def step(model: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(X)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.add_(1)
        return backward(y.float())

    compare(mlp, step, scratch)


def test_version_check_survives(scratch: Path) -> None:
    model = mlp()
    with under_pressure(model, scratch):
        y = model(X)
        with torch.no_grad():
            model[3].down.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_double_backward(scratch: Path) -> None:
    def step(model: nn.Module) -> torch.Tensor:
        x = X.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return backward(g.square())

    compare(mlp, step, scratch)


def test_saved_tensor_hooks(scratch: Path) -> None:
    def step(model: nn.Module) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            y = model(X)
        return backward(y)

    compare(mlp, step, scratch)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop], ids=lambda o: o.__name__)
@pytest.mark.parametrize("foreach", [False, True])
def test_ordinary_training(make: Any, foreach: bool, scratch: Path) -> None:
    def step(model: nn.Module) -> list[torch.Tensor]:
        optimizer = make(model.parameters(), lr=0.01, foreach=foreach)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            losses.append(loss.detach())
        return losses

    compare(mlp, step, scratch)
    compare(BatchNorms, step, scratch)


def test_fused_optimizer(scratch: Path) -> None:
    def step(model: nn.Module) -> torch.Tensor:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        for _ in range(2):
            backward(model(X))
            optimizer.step()
        return model(X).detach()

    compare(mlp, step, scratch)


def test_manual_sgd_and_writes_through_data(scratch: Path) -> None:
    def step(model: nn.Module) -> torch.Tensor:
        backward(model(X))
        with torch.no_grad():
            model[0].up.weight -= 0.1 * model[0].up.weight.grad
            model[1].up.weight.sub_(model[1].up.weight.grad, alpha=0.1)
        model[2].up.weight.data.mul_(0.5)
        model[3].up.weight.data = torch.ones_like(model[3].up.weight.data)
        model[3].down.weight.data[0, :3] = 7
        nn.init.normal_(model[0].down.weight)
        return model(X).detach()

    compare(mlp, step, scratch)


def test_update_bn_without_grad(scratch: Path) -> None:
    compare(BatchNorms, lambda model: [model.train()(X) for _ in range(2)], scratch, grad=False)


class FunctionalNorm(nn.Module):
    """Updates statistics in eval mode, through an operator whose schema does not say that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))
        self.body = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(F.batch_norm(x, self.mean, self.var, training=True))


class WritesData(nn.Module):
    """Changes its own weight inside forward, through `.data`, which no version counter sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(16, 16), mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.first(x))


@pytest.mark.parametrize("grad", [False, True])
def test_hidden_writes(grad: bool, scratch: Path) -> None:
    def step(model: nn.Module) -> torch.Tensor:
        model.eval()
        return torch.stack([model(X).detach() for _ in range(3)])

    compare(FunctionalNorm, step, scratch, grad=grad)

    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.weight.data.mul_(0.9)
            with torch.no_grad():
                self.bias.add_(0.1)
            return super().forward(x)

    compare(lambda: nn.Sequential(Scaled(16, 16), mlp()), step, scratch, grad=grad)


def test_state_dict_inside(scratch: Path) -> None:
    model = Tied()
    expected = copy.deepcopy(model.state_dict())
    buffer = io.BytesIO()
    with under_pressure(model, scratch):
        saved = model.state_dict()
        assert list(saved) == list(expected)
        assert same({k: v.clone() for k, v in saved.items()}, dict(expected))
        torch.save(model.state_dict(), buffer)
        assert saved["embed.weight"].numpy().tolist() == expected["embed.weight"].tolist()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert same(dict(loaded), dict(expected))
    assert all(type(value) is torch.Tensor for value in loaded.values())
    assert loaded["embed.weight"].untyped_storage().data_ptr() == loaded["head.weight"].untyped_storage().data_ptr()
    assert same({k: v.clone() for k, v in saved.items()}, dict(expected)), "a state dict taken inside lives on"


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_inside(assign: bool, scratch: Path) -> None:
    model, other = mlp(), mlp()
    with under_pressure(model, scratch) as session:
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        with torch.no_grad():
            assert torch.equal(model(X), other(X))
            assert torch.equal(model(X), other(X))
        assert session.stats().tiers["gpu"].peak_bytes <= (session.stats().tiers["gpu"].budget_bytes or 0)
    assert same(state(model), state(other))
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_deepcopy_and_pickle_inside(scratch: Path) -> None:
    model = Tied()
    ids = torch.arange(6)
    expected = model(ids).detach()
    with under_pressure(model, scratch):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in copies:
            assert all(type(p) is nn.Parameter for p in other.parameters())
            assert all(type(m._parameters) is dict for m in other.modules())
            assert other.head.weight is other.embed.weight
            assert torch.equal(other(ids), expected)
        with torch.no_grad():
            copies[0].embed.weight.zero_()
        assert torch.equal(model(ids), expected)


def test_functional_call_and_func(scratch: Path) -> None:
    def step(model: nn.Module) -> Any:
        parameters = dict(model.named_parameters())
        doubled = {name: 2 * p for name, p in parameters.items()}
        called = torch.func.functional_call(model, doubled, (X,))

        def loss(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, p, (x,)).square().sum()

        detached = {name: p.detach() for name, p in parameters.items()}
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(detached, X[:, None])
        return called.detach(), torch.func.grad(loss)(detached, X), each

    compare(mlp, step, scratch)


def test_modules_added_and_replaced_inside(scratch: Path) -> None:
    torch.manual_seed(0)
    model = mlp()
    with under_pressure(model, scratch) as session:
        torch.manual_seed(1)
        new, extra = nn.Linear(32, 16), Block()
        reference = copy.deepcopy(model)
        reference[1].down, reference.extra = copy.deepcopy(new), copy.deepcopy(extra)
        model[1].down = new
        model.add_module("extra", extra)
        model[0].up.bias = nn.Parameter(torch.full((32,), 0.25))
        reference[0].up.bias = nn.Parameter(torch.full((32,), 0.25))
        assert isinstance(new.weight, TieredTensor)
        assert torch.equal(model(X), reference(X))
        with torch.no_grad():
            assert torch.equal(model(X), reference(X))
        assert "extra.up.weight" in session.tier_map
    assert same(state(model), state(reference))
    assert type(new.weight) is nn.Parameter
    assert torch.equal(model(X), reference(X))


def test_dtype_conversion_inside(scratch: Path) -> None:
    model = mlp()
    reference = copy.deepcopy(model).bfloat16()
    with under_pressure(model, scratch):
        model.bfloat16()
        assert model[0].up.weight.dtype is torch.bfloat16
        with torch.no_grad():
            assert torch.equal(model(X.bfloat16()), reference(X.bfloat16()))
        assert torch.equal(model(X.bfloat16()), reference(X.bfloat16()))
    assert same(state(model), state(reference))


def test_moving_the_model_inside_is_refused(scratch: Path) -> None:
    model = mlp()
    with under_pressure(model, scratch), pytest.raises(ValueError, match="cannot be moved"):
        model.to("meta")


def test_freezing_inside(scratch: Path) -> None:
    def step(model: nn.Module) -> torch.Tensor:
        model[0].requires_grad_(False)
        model[1].up.weight.requires_grad = False
        return backward(model(X))

    compare(mlp, step, scratch)


def test_hooks_stay(scratch: Path) -> None:
    model = mlp()
    seen: list[str] = []
    before = model[0].up.weight.register_hook(lambda g: seen.append("tensor") or g * 2)
    model[0].up.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    model[1].register_forward_hook(lambda m, a, out: seen.append("forward"))
    with under_pressure(model, scratch):
        model(X).sum().backward()
        assert seen == ["forward", "tensor", "accumulated"]
        inside = model[2].up.weight.register_hook(lambda g: seen.append("inside"))
    model.zero_grad()
    seen.clear()
    model(X).sum().backward()
    assert seen == ["forward", "inside", "tensor", "accumulated"]
    before.remove()
    inside.remove()
    seen.clear()
    model(X).sum().backward()
    assert seen == ["forward", "accumulated"]


def test_leaving_with_a_live_graph(scratch: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(3)
        return mlp()

    plain, model = make(), make()
    backward(plain(X))
    with under_pressure(model, scratch):
        y = model(X)
    backward(y)
    assert same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_entering_with_a_live_graph(scratch: Path) -> None:
    plain = mlp()
    model = copy.deepcopy(plain)
    backward(plain(X))
    y = model(X)
    with under_pressure(model, scratch):
        backward(y)
        assert same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_exception_inside_a_forward(scratch: Path) -> None:
    class Fails(nn.Linear):
        armed = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            if self.armed:
                raise ArithmeticError("planted")
            return y

    model = nn.Sequential(mlp(), Fails(16, 16), mlp())
    objects = dict(model.named_parameters())
    model[1].armed = False
    expected = model(X).detach()
    with under_pressure(model, scratch) as session, torch.no_grad():
        model[1].armed = True
        with pytest.raises(ArithmeticError):
            model(X)
        assert nothing_leased(session)
        model[1].armed = False
        assert torch.equal(model(X), expected)
    model[1].armed = True
    with pytest.raises(ArithmeticError), under_pressure(model, scratch):
        model(X)
    model[1].armed = False
    assert torch.equal(model(X), expected)
    assert restored(model, objects)


def test_repeated_and_nested_use(scratch: Path) -> None:
    first, second = mlp(), mlp()
    expected = [first(X).detach(), second(X).detach()]
    for _ in range(3):
        with under_pressure(first, scratch), under_pressure(second, scratch):
            assert torch.equal(first(X), expected[0])
            assert torch.equal(second(X), expected[1])
    assert torch.equal(first(X), expected[0])
    with tiered([first, second], gpu=nbytes(first), cpu=nbytes(first), disk=scratch, device="cpu") as session:
        assert torch.equal(second(X), expected[1])
        assert torch.equal(first(X), expected[0])
        assert "0.0.up.weight" in session.tier_map
        assert "1.3.down.bias" in session.tier_map
    with tiered({"a": first, "b": second}, gpu=nbytes(first), disk=scratch, device="cpu") as session:
        assert torch.equal(second(X), expected[1])
        assert session.tier_of("a.0.up.weight") in ("gpu", "disk")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_blocks(backend: str, grad: bool, scratch: Path) -> None:
    def step(model: nn.Module) -> Any:
        torch._dynamo.reset()
        # with gradients a compiled graph keeps its weights until backward, so only one block may be compiled under pressure
        compiled = model[:1] if grad else model
        blocks = [torch.compile(block, backend=backend, fullgraph=True) for block in compiled] + list(model[len(compiled) :])
        results = []
        for _ in range(2):
            x = X
            for block in blocks:
                x = block(x)
            results.append(backward(x) if grad else x)
        return results

    session = compare(lambda: nn.Sequential(*(Block() for _ in range(6))), step, scratch, grad=grad)
    assert nothing_leased(session)


def test_block_compiled_in_place(scratch: Path) -> None:
    torch._dynamo.reset()
    model = mlp()
    expected = model(X).detach()
    model[0].compile(backend="aot_eager")
    with under_pressure(model, scratch), torch.no_grad():
        assert torch.equal(model(X), expected)
        model[1].compile(backend="aot_eager")
        assert torch.equal(model(X), expected)
    assert torch.equal(model(X), expected)


def test_threads_share_a_model(scratch: Path) -> None:
    model = nn.Sequential(*(Block() for _ in range(4)))
    inputs = [torch.randn(3, 16) for _ in range(8)]
    expected = [model(x).detach() for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for turn in range(125):
            with torch.set_grad_enabled(turn % 5 == 0):
                if not torch.equal(model(inputs[i]), expected[i]):
                    wrong.append(i)

    with under_pressure(model, scratch):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert not wrong


class Tagged(nn.Parameter):
    """A Parameter subclass whose constructor needs an argument."""

    def __new__(cls, data: torch.Tensor, tag: str) -> Tagged:
        made = torch.Tensor._make_subclass(cls, data, True)
        made.tag = tag
        return made


def test_parameter_subclass_and_attributes(scratch: Path) -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.body = Tagged(torch.randn(16, 16), "here"), mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert isinstance(self.weight, Tagged)
            assert self.weight.tag == "here"
            return self.body(x @ self.weight)

    model = Uses()
    model.body[0].up.weight.note = ["kept"]
    expected = model(X).detach()
    with under_pressure(model, scratch):
        assert torch.equal(model(X), expected)
        with torch.no_grad():
            assert torch.equal(model(X), expected)
        assert model.body[0].up.weight.note == ["kept"]
    assert type(model.weight) is Tagged
    assert model.weight.tag == "here"
    assert model.body[0].up.weight.note == ["kept"]
    assert torch.equal(model(X), expected)


def test_traced_graph_module(scratch: Path) -> None:
    compare(lambda: torch.fx.symbolic_trace(mlp()), run(), scratch)


def test_weight_without_address_raises(scratch: Path) -> None:
    model = mlp()
    with under_pressure(model, scratch):
        weight = model[0].up.weight
        with pytest.raises(RuntimeError):
            weight.data_ptr()
        for access in (weight.share_memory_, weight.__dlpack__):
            with pytest.raises(TypeError, match="tiered"):
                access()
        with pytest.raises(TypeError, match="in place"):
            weight.detach().t_()
        assert "0.up.weight" in repr(weight)
        assert weight.detach().numpy().shape == (32, 16)
        assert len(weight.tolist()) == 32
        assert weight.sum().item() == pytest.approx(float(weight.plain().sum()))


def test_everything_fits_means_no_wrapper(scratch: Path) -> None:
    model = mlp()
    expected = model(X).detach()
    memory = {name: p.data_ptr() for name, p in model.named_parameters()}
    with tiered(model, gpu=nbytes(model), disk=scratch, device="cpu") as session:
        assert all(type(p) is nn.Parameter for p in model.parameters())
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == memory
        assert torch.equal(model(X), expected)
        assert session.stats().tiers["gpu"].used_bytes == nbytes(model)
        assert set(session.tier_map.values()) == {"gpu"}
        session.offload(model[0])
        assert session.tier_of("0.up.weight") == "disk"
        assert torch.equal(model(X), expected)
        session.resize(gpu=nbytes(model) // 2)
        assert torch.equal(model(X), expected)
        assert session.stats().tiers["gpu"].used_bytes <= nbytes(model) // 2
        session.prefetch(model[0])
    assert same(state(model), state(copy.deepcopy(model)))
    assert torch.equal(model(X), expected)


def test_joining_more_than_fits(scratch: Path) -> None:
    def step(model: nn.Module) -> Any:
        vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        torch.nn.utils.vector_to_parameters(vector * 0.5, model.parameters())
        stacked = torch.stack([block.up.weight for block in model], dim=1).detach()
        mixed = torch.cat([model[0].up.bias.detach().double(), torch.empty(0), *(b.down.bias.detach() for b in model)])
        return vector, stacked, mixed, model(X).detach()

    compare(mlp, step, scratch)
    compare(mlp, step, scratch, grad=False)


def test_formatting_a_buffer(scratch: Path) -> None:
    model = mlp()
    model.register_buffer("scale", torch.tensor(2.5))
    with under_pressure(model, scratch):
        assert f"{model.scale:.2f} {model.scale}" == "2.50 2.5"
        assert bool(model.scale > 2)
        assert float(model.scale) == 2.5


class Tagger(nn.Module):
    """A large table of which each call needs a few rows, beside weights that are used whole."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(4096, 128)
        self.body = nn.Linear(128, 128)
        self.head = nn.Linear(128, 4096, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.table(ids)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_lookup_of_few_rows_fetches_no_table(tied: bool, grad: bool, scratch: Path) -> None:
    torch.manual_seed(0)
    model, ids = Tagger(tied=tied), torch.tensor([[3, 77, 4095]])
    with torch.set_grad_enabled(grad):
        expected = model(ids)
        rows = 3 * 128 * 4
        with tiered(model, cpu="2200KiB", disk=scratch) as session:
            session.offload(model)
            before = session.stats()
            table = model.table(ids)
            after = session.stats()
            assert after.links["disk->cpu"].bytes - before.links["disk->cpu"].bytes == rows
            assert after.tiers["cpu"].used_bytes == before.tiers["cpu"].used_bytes
            assert torch.equal(model.head(model.body(table)), expected)
            assert torch.equal(model(ids), expected)
            with torch.no_grad():
                model.table.weight[3] += 1.0
            assert torch.equal(model.table(ids)[0, 0], model.table.weight[3])


def test_a_lookup_of_many_rows_fetches_the_table(scratch: Path) -> None:
    model, ids = Tagger(tied=False), torch.arange(1024)
    with torch.no_grad(), tiered(model, cpu="2200KiB", disk=scratch) as session:
        session.offload(model)
        model.table(ids)
        assert session.tier_of("table.weight") == "cpu"
