"""Reads without a lease: what stays is handed out, never leaves while somebody has it, and writes to it are seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.plainly import nbytes, within_budget
from tierstore import Tiered, tiered
from tierstore.patch.attach import SMALL
from tierstore.patch.buffers import ScopedBuffers
from tierstore.patch.handout import ResidentParameter
from tierstore.planning.predictor import Predictor

WIDTH = 32
X = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)


class Layer(nn.Linear):
    """Does with its weight what the test asks for, inside its own call."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, bias=False)
        self.act: Callable[[Layer], Any] = lambda layer: None
        self.given: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given[:] = [self.act(self)]
        return super().forward(x)


class Stack(nn.Module):
    """Five layers that are used, and two that are not, so that not all fits."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Sequential(*(Layer() for _ in range(5))), nn.Sequential(*(Layer() for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def settled(model: Stack, disk: Path, policy: str = "lru") -> Tiered:
    """Return a session in which the first three layers are read without a lease."""
    session = tiered(model, cpu=nbytes(model) - 1, disk=disk, device="cpu", policy=policy)
    with torch.no_grad():
        for _ in range(3):
            model(X)
    return session


def handed_out(model: Stack) -> list[bool]:
    return [dict.__getitem__(layer._parameters, "weight")._kept is not None for layer in model.used]


@torch.no_grad()
@pytest.mark.parametrize("policy", ["lru", "auto"])
def test_reads_soon_need_no_lease_and_are_counted(scratch: Path, policy: str) -> None:
    model = Stack()
    expected = model(X)
    with settled(model, scratch, policy) as session:
        assert any(handed_out(model))
        hits = session.stats().hits
        assert torch.equal(model(X), expected)
        assert session.stats().hits == hits + 5, "uses without a lease must be counted, and told to the policy"
        assert session.store.moves.leased_bytes == 0
        within_budget(session)


@torch.no_grad()
def test_two_operations_always_find_room(scratch: Path) -> None:
    model = Stack()
    with settled(model, scratch) as session:
        budget = session.stats().tiers["cpu"].budget_bytes or 0
        assert session.store.moves.handed_out <= budget - 2 * 4 * WIDTH * WIDTH


HOLD: dict[str, Callable[[Layer], Any]] = {
    "itself": lambda layer: layer.weight,
    "a view": lambda layer: layer.weight.t()[1:],
    "numpy": lambda layer: layer.weight.detach().numpy(),
    "its storage": lambda layer: layer.weight.untyped_storage(),
}


@torch.no_grad()
@pytest.mark.parametrize("what", HOLD)
def test_what_somebody_has_does_not_leave(what: str, scratch: Path) -> None:
    model = Stack()
    layer = model.used[0]
    assert isinstance(layer, Layer)
    with settled(model, scratch) as session:
        layer.act = HOLD[what]
        model(X)
        layer.act = lambda layer: layer.given[0]
        session.offload(model)
        assert session.tier_of("used.0.weight") == "cpu"
        assert session.tier_of("used.1.weight") == "disk"
        layer.act = lambda layer: None
        model(X)
        session.offload(model)
        assert session.tier_of("used.0.weight") == "disk"


def test_what_a_graph_has_does_not_leave(scratch: Path) -> None:
    """Autograd refers to a tensor without Python or another tensor knowing."""
    model, x = Stack(), X.clone().requires_grad_()
    layer = model.used[0]
    assert isinstance(layer, Layer)
    plain = []
    with settled(model, scratch) as session:
        with torch.no_grad():
            layer.act = lambda layer: plain.append(layer.weight)
            model(X)
            layer.act = lambda layer: None
        graph = x @ plain.pop().detach().requires_grad_(False)
        session.offload(model)
        assert session.tier_of("used.0.weight") == "cpu"
        del graph
        session.offload(model)
        assert session.tier_of("used.0.weight") == "disk"


WRITE: dict[str, Callable[[Layer], Any]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "a view": lambda layer: layer.weight.t()[1:].fill_(3),
    "data": lambda layer: layer.weight.data.add_(1),
    "setting data": lambda layer: setattr(layer.weight, "data", torch.ones(WIDTH, WIDTH)),
    "under another name": lambda layer: setattr(layer, "again", layer.weight.add_(1)),
    "setting the attribute to itself": lambda layer: setattr(layer, "weight", layer.weight.add_(1)),
}


@torch.no_grad()
@pytest.mark.parametrize("when", ["offload", "flush", "state_dict", "exit"])
@pytest.mark.parametrize("what", WRITE)
def test_a_write_without_a_lease_is_seen(what: str, when: str, scratch: Path) -> None:
    model, plain = Stack(), Stack()
    plain.load_state_dict(model.state_dict())
    objects = dict(model.named_parameters())
    with settled(model, scratch) as session:
        session.store.flush()  # so that an equal copy lies below, which a write must outdate
        for target in (model, plain):
            target.used[0].act = WRITE[what]  # type: ignore[assignment]
            target(X)
            target.used[0].act = lambda layer: None  # type: ignore[assignment]
            target(X)
        if when == "offload":
            session.offload(model)
        elif when == "flush":
            session.store.flush()
            session.offload(model)
        elif when == "state_dict":
            assert torch.equal(model.state_dict()["used.0.weight"], plain.used[0].weight)  # type: ignore[arg-type]
            assert torch.equal(copy.deepcopy(model.used[0]).weight, plain.used[0].weight)  # type: ignore[arg-type]
        assert torch.equal(model(X), plain(X))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())


@torch.no_grad()
def test_a_copy_that_waits_keeps_the_value_from_before_a_write(scratch: Path) -> None:
    model = Stack()
    with settled(model, scratch):
        before = model.used[0].weight.detach().to(torch.float64)
        waiting = next(iter(model.used[0].parameters())).to(torch.float64)  # computed when it is read
        model.used[0].act = lambda layer: layer.weight.zero_()  # type: ignore[assignment]
        model(X)
        assert torch.equal(waiting, before)
        assert waiting.count_nonzero()


@torch.no_grad()
def test_another_flag_gets_another_tensor(scratch: Path) -> None:
    """`matmul` folds by `requires_grad`, also without gradients."""
    model = Stack()
    layer = model.used[0]
    assert isinstance(layer, Layer)
    with settled(model, scratch):
        layer.act = lambda layer: layer.weight.requires_grad
        for flag in (False, True):
            model.requires_grad_(flag)
            for _ in range(3):
                model(X)
                assert layer.given == [flag]
        assert handed_out(model)[0]


@torch.no_grad()
def test_outside_a_call_the_parameter_itself_is_read(scratch: Path) -> None:
    model = Stack()
    parameter = model.used[0].weight
    parameter.grad = torch.ones(WIDTH, WIDTH)
    with settled(model, scratch):
        assert model.used[0].weight is parameter
        assert not isinstance(model.used[0].weight, ResidentParameter)
        model.used[0].weight -= 0.1 * model.used[0].weight.grad  # type: ignore[assignment, operator]
    assert model.used[0].weight is parameter


# -- small tensors --------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Large weights beside small ones, among them buffers that torch's kernels write to without saying so."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.body = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(width, width), nn.BatchNorm1d(width))))
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.body(x)


def test_small_tensors_stay_plain_where_they_take_little(scratch: Path) -> None:
    model = Normed()
    small = {name for name, tensor in model.state_dict().items() if tensor.nbytes <= SMALL}
    with tiered(model, cpu=nbytes(model) * 3 // 4, disk=scratch, device="cpu") as session:
        assert {name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if not hasattr(tensor, "_source")} == small
        model(torch.randn(5, 192)).sum().backward()
        within_budget(session)
        counted = sum(entry.nbytes for entry in session.store.moves.entries.values())
        assert counted == nbytes(model), "what is held is counted too"
        session.offload(model.body[1])
        assert session.tier_of("body.1.bias") == "disk"
        assert session.tier_of("body.3.bias") == "cpu"
    assert type(model.body[1]._buffers) is dict


def test_small_tensors_of_a_mapped_model_lie_in_memory_and_not_in_a_file(scratch: Path, tmp_path: Path) -> None:
    """The system drops the pages of files first, and would read them again in every pass."""
    model = Normed()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", mmap=True, weights_only=True)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.data = state[name]
    small = {name: tensor.data_ptr() for name, tensor in model.state_dict().items() if 0 < tensor.nbytes <= SMALL}
    assert all(file_at(address) == str(tmp_path / "model.pt") for address in small.values())
    parameters = dict(model.named_parameters())
    with tiered(model, cpu=nbytes(model) * 3 // 4, disk=scratch, device="cpu"):
        held = {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if name in small}
        assert len(held) == len(small) > 3
        assert not any(file_at(tensor.data_ptr()).startswith("/") for tensor in held.values())
        assert all(torch.equal(tensor, state[name]) for name, tensor in held.items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def file_at(address: int) -> str:
    """Return the path of the file that is mapped at an address of this process, "" if none is."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= address < stop:
            return rest[4] if len(rest) == 5 else ""
    return ""


def test_small_tensors_give_way_to_an_operation_that_needs_all_of_the_budget(scratch: Path) -> None:
    class Sum(Normed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("ab,bc,cd->ad", self.body[0].weight, self.body[2].weight, self.body[4].weight)

    model = Sum()
    expected = model(X)
    with tiered(model, cpu=nbytes(model) * 3 // 4, disk=scratch, device="cpu") as session:
        assert session._attachment._held
        session.resize(cpu=3 * 4 * 192 * 192)
        assert torch.equal(model(X), expected)
        within_budget(session)


@pytest.mark.parametrize("grad", [True, False])
def test_a_call_has_plain_buffers_and_its_writes_last(grad: bool, scratch: Path) -> None:
    """With as small a budget as can be, so that no buffer stays plain."""
    model = Normed()
    plain = copy.deepcopy(model)
    budget = max(sum(t.nbytes for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))) for m in model.modules())
    with tiered(model, cpu=budget, disk=scratch, device="cpu"), torch.set_grad_enabled(grad):
        assert isinstance(model._buffers, ScopedBuffers)
        assert hasattr(model.count, "_source"), "outside of a call it is the tiered one"
        for _ in range(2):
            x = torch.randn(5, 192)
            assert torch.equal(model(x), plain(x))
        assert torch.equal(model.count, torch.full((3,), 2.0))
        for failing in (model, plain):
            with pytest.raises(ValueError, match="more than 1 value"):
                failing(torch.randn(1, 192))
        assert torch.equal(model.count, torch.full((3,), 3.0)), "also what a call wrote that then failed"
    assert all(torch.equal(b, plain.get_buffer(name)) for name, b in model.named_buffers())


def test_a_buffer_under_two_names_is_not_copied(scratch: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.zeros(8))
            self.inner, self.wide = nn.Module(), nn.Linear(64, 64)
            self.inner.register_buffer("state", self.state)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.state += 1
            return x + self.inner.state.sum()

    model = Shared()
    with tiered(model, cpu=4 * 64 * 64 + 256, disk=scratch, device="cpu"), torch.no_grad():
        assert torch.equal(model(torch.zeros(1)), torch.tensor([8.0]))


# -- many uses at once ----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from("abcdef"), max_size=120),
    st.lists(st.integers(1, 9), max_size=30),
    st.sets(st.sampled_from("abcdef"), max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_seeing_many_expected_uses_is_seeing_each(trace: list[str], cuts: list[int], erratic: set[str]) -> None:
    one, many = Predictor(limit=64), Predictor(limit=64)
    one.erratic, many.erratic = set(erratic), set(erratic)
    cut = iter([*cuts, *[3] * 120])
    while trace:
        some, trace = trace[: (size := next(cut))], trace[size:]
        for key in some:
            one.see(key)
        if not many.see_expected([key for key in some if key not in many.erratic]):
            for key in some:
                many.see(key)
        assert (one.history, one.pointer, one.matched, one.erratic) == (many.history, many.pointer, many.matched, many.erratic)
