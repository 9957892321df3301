"""`cpu_offload`, `disk_offload` and `cpu_offload_with_hook` of tierstore.compat.accelerate, with what accelerate promises of them."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import accelerate.hooks
import pytest
import torch
from torch import nn

import tierstore.compat.accelerate as compat
from tests.offloadable import KINDS, WIDTH, X, largest, make
from tests.plainly import nbytes
from tierstore import BackendError, ModelError, TierStoreError
from tierstore.compat.accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, remove_hook_from_module
from tierstore.compat.hooks import AlignInputs, AlignOutputs, NotingInputs

Offload = Callable[..., nn.Module]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def collected(no_thread_left: None) -> Iterator[None]:
    """Sessions end with their models, once these are collected."""
    yield
    gc.collect()


@pytest.fixture(params=["RAM", "disk"])
def offload(request: pytest.FixtureRequest, scratch: Path) -> Offload:
    if request.param == "RAM":
        return cpu_offload
    return lambda model, **options: disk_offload(model, scratch, **options)


def below(model: nn.Module) -> set[str]:
    """Names of what is not in the fast tier."""
    return {name for name, tier in model.tiered.tier_map.items() if tier != "gpu"}


def is_plain(model: nn.Module) -> bool:
    tensors = all(type(t) in (nn.Parameter, torch.Tensor) and t.device == CPU for t in (*model.parameters(), *model.buffers()))
    dicts = all(type(m._parameters) is dict and not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    return tensors and dicts and not hasattr(model, "tiered") and not hasattr(model, "hf_device_map")


@pytest.mark.parametrize("name", compat.__all__)
def test_signatures_are_accelerates(name: str) -> None:
    theirs, ours = getattr(accelerate, name, None) or getattr(accelerate.hooks, name, None), getattr(compat, name)
    if name == "get_balanced_memory":
        theirs = accelerate.utils.get_balanced_memory
    if inspect.isclass(ours):
        assert {"offload", "remove"} <= set(dir(ours))
        return
    expected, found = (list(inspect.signature(function).parameters.values()) for function in (theirs, ours))
    for a, b in zip(expected, found, strict=False):
        assert (a.name, a.default, a.kind) == (b.name, b.default, b.kind)
    assert len(found) >= len(expected)
    assert all(extra.kind is inspect.Parameter.KEYWORD_ONLY for extra in found[len(expected) :])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"offload_buffers": True}, {"execution_device": CPU, "preload_module_classes": ["Direct"]}])
@pytest.mark.parametrize("grad", [True, False])
def test_outputs_are_those_of_the_plain_model(kind: str, options: dict[str, Any], grad: bool, offload: Offload) -> None:
    plain, model = make(kind), make(kind)
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert offload(model, **options) is model
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            assert torch.equal(model(X), plain(X))
    for tier in model.tiered.stats().tiers.values():
        assert tier.budget_bytes is None or tier.peak_bytes <= tier.budget_bytes
    assert remove_hook_from_module(model, recurse=True) is model
    assert is_plain(model)
    for name, (tensor, value) in before.items():
        found = model.state_dict(keep_vars=True)[name]
        assert found is tensor
        assert torch.equal(found, value)
    assert torch.equal(model(X), plain(X))


def test_training_mode_changes_buffers_as_ever(offload: Offload) -> None:
    plain, model = make().train(), make().train()
    offload(model)
    for _ in range(3):
        assert torch.equal(model(X), plain(X))
    assert torch.equal(model[6].running_mean, plain[6].running_mean)
    remove_hook_from_module(model)
    assert torch.equal(model[6].running_var, plain[6].running_var)
    assert model[6].num_batches_tracked.item() == 3


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_not_resident_before_the_first_call(kind: str, offload: Offload) -> None:
    model = make(kind)
    large = {name for name, tensor in model.state_dict().items() if tensor.nbytes >= largest(model) // 4}
    offload(model, offload_buffers=True)
    assert large <= below(model)
    model(X)
    assert large & below(model), "all of it became resident: nothing is offloaded"
    fast = model.tiered.stats().tiers["gpu"]
    assert fast.budget_bytes < nbytes(model)
    for name, tensor in model.state_dict(keep_vars=True).items():  # it looks like any tensor of the device that computes
        assert tensor.device == CPU, name
        assert torch.isfinite(tensor).all(), name
    remove_hook_from_module(model)


def test_buffers_that_are_not_to_be_offloaded_have_room() -> None:
    def budget(kind: str, **options: bool) -> int:
        return cpu_offload(make(kind), **options).tiered.stats().tiers["gpu"].budget_bytes

    buffers = sum(buffer.nbytes for buffer in make().buffers())
    assert budget("layers") - budget("layers", offload_buffers=True) == buffers > 0
    assert budget("buffers") == nbytes(make("buffers"))


def test_ties_stay_ties(offload: Offload) -> None:
    model = make("ties")
    offload(model)
    assert model.head.weight is model.embed.weight
    assert model.second.weight is model.first.weight
    copies = model.tiered.stats()
    assert sum(tier.used_bytes for tier in copies.tiers.values()) <= 2 * nbytes(model)
    remove_hook_from_module(model)
    assert model.head.weight is model.embed.weight


def test_values_come_from_a_state_dict() -> None:
    expected = make("ties")(X)
    torch.manual_seed(9)
    other = KINDS["ties"]().eval()
    cpu_offload(other, state_dict=make("ties").state_dict())
    assert torch.equal(other(X), expected)
    with compat.init_empty_weights():
        empty = KINDS["ties"]().eval()
    cpu_offload(empty, CPU, False, make("ties").state_dict())
    assert torch.equal(empty(X), expected)
    assert empty.head.weight is empty.embed.weight


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [({}, "'0.weight' is on the meta device"), ({**make().state_dict(), "5.bias": torch.zeros(3)}, r"'5.bias' of shape \(3,\)")],
)
def test_a_state_dict_that_does_not_fit(state_dict: dict[str, torch.Tensor], message: str) -> None:
    with compat.init_empty_weights():
        model = KINDS["layers"]()
    with pytest.raises(ModelError, match=message):
        cpu_offload(model, state_dict=state_dict)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_parts_of_a_model_by_themselves() -> None:
    plain, model = make(), make()
    for number in (0, 3, 6):
        cpu_offload(model[number], execution_device="cpu")
    assert torch.equal(model(X), plain(X))
    assert type(model[1].weight) is nn.Parameter
    remove_hook_from_module(model[3])
    assert not hasattr(model[3], "tiered")
    assert hasattr(model[0], "tiered")
    remove_hook_from_module(model)  # has none itself
    assert hasattr(model[0], "tiered")
    compat.remove_hook_from_submodules(model)
    assert is_plain(model)
    assert torch.equal(model(X), plain(X))


def test_a_part_of_an_offloaded_model_cannot_leave_alone(offload: Offload) -> None:
    model = make()
    offload(model)
    with pytest.raises(ModelError, match=r"part of a model.*model\.tiered\.close"):
        remove_hook_from_module(model[2])
    assert torch.equal(model(X), make()(X))
    with pytest.raises(ModelError, match="already under tiered"):
        offload(model)
    remove_hook_from_module(model)
    offload(model)  # and again
    assert torch.equal(model(X), make()(X))
    model.tiered.close()
    remove_hook_from_module(model)
    assert is_plain(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_is_plain(copied: Callable[[nn.Module], nn.Module], offload: Offload) -> None:
    model = make()
    offload(model)
    other = copied(model)
    assert other.tiered is None
    assert type(other[0].weight) is nn.Parameter
    assert torch.equal(other(X), model(X))
    with torch.no_grad():
        other[0].weight.zero_()
    assert torch.equal(model(X), make()(X))
    remove_hook_from_module(model)


def test_the_model_goes_with_its_last_reference(offload: Offload) -> None:
    model = make()
    offload(model)
    model(X)
    gone = weakref.ref(model), weakref.ref(model.tiered.store)
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_moving_and_casting(offload: Offload) -> None:
    model = make()
    offload(model)
    with pytest.raises(ModelError, match="cannot be moved to meta as a whole"):
        model.to("meta")
    model.to("cpu")
    assert torch.equal(model(X), make()(X))
    model.half()
    assert model[0].weight.dtype == torch.float16
    model.double()
    assert torch.equal(model(X.double()), make().half().double()(X.double()))
    remove_hook_from_module(model)
    assert torch.equal(model(X.double()), make().half().double()(X.double()))


def test_models_that_are_nothing_or_one_layer() -> None:
    assert torch.equal(cpu_offload(nn.ReLU())(X), X.relu())
    layer = nn.Linear(WIDTH, WIDTH)
    expected = layer(X)
    assert torch.equal(cpu_offload(layer)(X), expected)
    assert layer.tiered.tier_of("weight") == "gpu"  # two layers are the least that may be there, and this is one


def test_training_through_an_offloaded_model(offload: Offload) -> None:
    plain, model = make(), make()
    offload(model)
    for one in (plain, model):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            one(X).square().mean().backward()
            optimizer.step()
    remove_hook_from_module(model)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_device_that_does_not_work() -> None:
    model = make()
    for device, message in (("disk", "nothing computes"), ("gpu", "no place for weights"), (True, "no place"), ("meta", "no place")):
        with pytest.raises(BackendError, match=message):
            cpu_offload(model, execution_device=device)
    if not torch.accelerator.is_available():
        with pytest.raises(BackendError, match="cannot be used here"):
            cpu_offload(model, 0)
    assert is_plain(model)


# -- cpu_offload_with_hook --------------------------------------------------------------------------------------------


def test_a_model_stays_until_its_hook_says_so() -> None:
    plain = make()
    model, hook = cpu_offload_with_hook(make(), "cpu")
    assert set(model.tiered.tier_map.values()) == {"cpu"}
    assert model.tiered.stats().tiers["gpu"].used_bytes == 0
    for _ in range(3):
        assert torch.equal(model(X), plain(X))
    assert below(model) == {"6.num_batches_tracked"}  # which only training reads
    assert model.tiered.stats().links["cpu->gpu"].bytes == nbytes(plain) - 8
    hook.offload()
    assert set(model.tiered.tier_map.values()) == {"cpu"}
    assert model.tiered.stats().tiers["gpu"].used_bytes == 0
    assert torch.equal(model(X), plain(X))
    hook.remove()
    assert is_plain(model)
    hook.offload()
    hook.remove()
    assert torch.equal(model(X), plain(X))


def test_the_model_before_is_offloaded_by_the_next_call() -> None:
    first, hook_1 = cpu_offload_with_hook(make("uncalled layers"), CPU)
    second, hook_2 = cpu_offload_with_hook(make("nested"), CPU, prev_module_hook=hook_1)
    middle = first(X)
    assert below(first) == set()
    assert below(second) == set(second.tiered.tier_map)
    for _ in range(2):
        output = second(middle)
        assert below(first) == set(first.tiered.tier_map)
        assert below(second) == set()
    assert torch.equal(output, make("nested")(make("uncalled layers")(X)))
    hook_2.offload()
    assert below(second) == set(second.tiered.tier_map)
    copied = copy.deepcopy(second)
    first(X)
    copied(middle)  # is plain, and tells nobody
    assert below(first) == set()


def test_the_hook_must_be_ours() -> None:
    _, theirs = accelerate.cpu_offload_with_hook(make(), CPU)
    model = make()
    with pytest.raises(ModelError, match="second value that cpu_offload_with_hook"):
        cpu_offload_with_hook(model, CPU, theirs)
    assert is_plain(model)


def test_an_offload_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    first, hook = cpu_offload_with_hook(make(), CPU)
    second, _ = cpu_offload_with_hook(make(), CPU, hook)
    first(X)

    def refuse(module: nn.Module) -> None:
        raise TierStoreError("no room")

    monkeypatch.setattr(first.tiered, "offload", refuse)
    with pytest.raises(TierStoreError, match="no room"):
        second(X)
    monkeypatch.undo()
    assert torch.equal(second(X), make()(X))


# -- inputs and outputs on other devices ------------------------------------------------------------------------------


def test_inputs_go_to_the_device_and_outputs_back() -> None:
    """On the meta device in the place of an accelerator."""
    meta = torch.device("meta")
    model = nn.Linear(WIDTH, WIDTH, device=meta)
    seen: list[torch.device] = []
    inputs = NotingInputs(meta, ["cache"])
    model.register_forward_pre_hook(inputs, with_kwargs=True)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0].device), with_kwargs=True)
    model.register_forward_hook(lambda module, args, output: torch.empty_like(output, device=meta))
    model.register_forward_hook(AlignOutputs(inputs), always_call=True)
    with pytest.raises((NotImplementedError, RuntimeError)):  # a meta tensor has no values to bring back: it was tried
        model(X)
    assert seen == [meta]
    assert inputs.entered() == []
    assert model(torch.empty(2, WIDTH, device=meta)).device == meta
    with pytest.raises(TypeError):
        model(X, 1, 2)
    assert inputs.entered() == []


def test_which_inputs_are_moved() -> None:
    meta = torch.device("meta")
    args, kwargs = AlignInputs(meta, ["cache"])(nn.ReLU(), ([X, {"a": X}], 3), {"mask": X, "cache": X})
    assert args[0][0].device == meta
    assert args[0][1]["a"].device == meta
    assert args[1] == 3
    assert kwargs["mask"].device == meta
    assert kwargs["cache"] is X
    (same,), _ = AlignInputs(CPU, [])(nn.ReLU(), (X,), {})
    assert same is X
