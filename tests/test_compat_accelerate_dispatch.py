"""`dispatch_model`, `load_checkpoint_and_dispatch`, `infer_auto_device_map` and `init_empty_weights` of tierstore.compat.accelerate."""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from tests.checkpoints import contents, write_shards
from tests.offloadable import KINDS, WIDTH, X, make
from tests.plainly import nbytes
from tierstore import BackendError, CheckpointError, CorruptionError, ModelError, SizeError, TierStoreError, UnsupportedTensorError
from tierstore.compat.accelerate import (
    dispatch_model,
    get_balanced_memory,
    infer_auto_device_map,
    init_empty_weights,
    init_on_device,
    load_checkpoint_and_dispatch,
    remove_hook_from_module,
)
from tierstore.compat.device_map import Casts, Sizes, bytes_by_place, check_device_map
from tierstore.machine.limits import available_ram

LAYER = (WIDTH + 1) * WIDTH * 4  # bytes of one linear layer
TOTAL = nbytes(make())
THREE = {"0": 0, "1": 0, "2": "cpu", "3": "cpu", "4": "disk", "5": "disk", "6": "cpu"}


@pytest.fixture(autouse=True)
def collected(no_thread_left: None) -> Iterator[None]:
    """Sessions end with their models, once these are collected."""
    yield
    gc.collect()


def budgets(model: nn.Module) -> dict[str, int | None]:
    return {name: tier.budget_bytes for name, tier in model.tiered.stats().tiers.items()}


def empty(kind: str = "layers") -> nn.Module:
    with init_empty_weights():
        return KINDS[kind]().eval()


def within(model: nn.Module) -> bool:
    return all(tier.budget_bytes is None or tier.peak_bytes <= tier.budget_bytes for tier in model.tiered.stats().tiers.values())


# -- dispatch_model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        (THREE, {"gpu": 2 * LAYER, "cpu": 2 * LAYER + 776, "disk": None}),
        ({"": "cpu", "0": 0, "1": "cuda:0", "4": "disk"}, {"gpu": 2 * LAYER, "cpu": 3 * LAYER + 776, "disk": None}),
        ({"": "disk", "3": torch.device("cuda", 0)}, {"gpu": LAYER, "disk": None}),
        ({"": "cpu", "3": 0}, {"gpu": LAYER, "cpu": available_ram}),
    ],
    ids=["three places", "the longest key counts", "two places", "no disk"],
)
def test_a_map_gives_the_budgets(device_map: dict[str, Any], expected: dict[str, Any], scratch: Path) -> None:
    plain, model = make(), make()
    assert dispatch_model(model, device_map, main_device="cpu", offload_dir=scratch) is model
    assert model.hf_device_map == device_map
    found = budgets(model)
    assert found.keys() == expected.keys()
    passing = 2 * LAYER + sum(buffer.nbytes for buffer in plain.buffers())
    assert found["gpu"] == min(expected["gpu"] + passing, TOTAL)
    if expected.get("cpu") is available_ram:
        assert found["cpu"] >= TOTAL
    else:
        assert found.get("cpu") == expected.get("cpu")
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                assert torch.equal(model(X), plain(X))
    assert within(model)
    assert set(model.tiered.tier_map.values()) <= expected.keys()
    assert len(set(model.tiered.tier_map.values())) > 1
    remove_hook_from_module(model, recurse=True)
    assert not hasattr(model, "hf_device_map")
    assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_model_over_three_places(kind: str, scratch: Path) -> None:
    plain, model = make(kind), make(kind)
    names = [name for name, module in model.named_children() if module is not None]
    device_map = {name: (0, "cpu", "disk")[number % 3] for number, name in enumerate(names)}
    device_map |= {name: 0 for name, _ in model.named_parameters(recurse=False)}
    dispatch_model(model, device_map, "cpu", offload_dir=scratch, preload_module_classes=["Direct"], skip_keys="nothing")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(X), plain(X))
    assert within(model)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), plain(X))
    if kind == "ties":
        assert model.head.weight is model.embed.weight


def test_everything_on_disk_computes_on_the_cpu(scratch: Path) -> None:
    model = dispatch_model(make(), dict.fromkeys(map(str, range(7)), "disk"), offload_dir=scratch)
    assert budgets(model).keys() == {"cpu", "disk"}
    assert budgets(model)["cpu"] < TOTAL
    assert torch.equal(model(X), make()(X))
    assert "disk" in model.tiered.tier_map.values()


def test_one_place_needs_no_session() -> None:
    model = dispatch_model(make(), {"": "cpu"})
    assert model.hf_device_map == {"": "cpu"}
    assert not hasattr(model, "tiered")
    assert torch.equal(model(X), make()(X))
    model.to(torch.float64)
    forced = dispatch_model(make(), {"": "cpu"}, force_hooks=True)
    assert torch.equal(forced(X), make()(X))
    assert set(forced.tiered.tier_map.values()) == {"cpu"}


def test_moving_a_dispatched_model(scratch: Path) -> None:
    model = dispatch_model(make(), THREE, "cpu", offload_dir=scratch)
    with pytest.raises(ModelError, match="cannot be moved"):
        model.to("meta")
    model.to("cpu")
    assert torch.equal(model(X), make()(X))


@pytest.mark.parametrize(
    ("device_map", "error", "message"),
    [
        ({"0": 0, "9": "cpu"}, ModelError, "names what is not in Layers: 9"),
        ({"": 0, "0.wight": "cpu"}, ModelError, "names what is not in Layers: 0.wight"),
        ({"0": 0, "1": "cpu"}, ModelError, "gives no device for 2.weight, 2.bias"),
        ({}, ModelError, "gives no device for 0.weight"),
        ("auto", ModelError, "infer_auto_device_map"),
        ({"": "cpu", "3": "disk"}, ModelError, "puts 3 on disk; give offload_dir"),
        ({"": "cpu", "3": "cuda:0", "4": "xpu:1"}, TierStoreError, "accelerators of several types .*cannot share a model"),
        ({"": "gpu"}, BackendError, "'gpu' is no place for weights"),
        ({"": -1}, BackendError, "no place"),
        ({"": "meta"}, BackendError, "no place"),
    ],
)
def test_bad_maps(device_map: Any, error: type[Exception], message: str) -> None:
    model = make()
    with pytest.raises(error, match=message):
        dispatch_model(model, device_map)
    assert not hasattr(model, "hf_device_map")
    assert type(model[0].weight) is nn.Parameter
    assert not model._forward_pre_hooks


def test_an_accelerator_that_is_not_there(scratch: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    with pytest.raises(BackendError, match="cannot be used here"):
        dispatch_model(make(), THREE, offload_dir=scratch)
    with pytest.raises(BackendError, match="cannot be used here"):
        load_checkpoint_and_dispatch(make(), write_shards(scratch.parent / "c", make().state_dict()), "auto", {0: "1MB"})


# -- load_checkpoint_and_dispatch -------------------------------------------------------------------------------------


@pytest.fixture(params=["one file", "shards", "torch.save", "index"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    state, folder = make().state_dict(), tmp_path / "checkpoint"
    if request.param == "shards":
        return write_shards(folder, state)
    if request.param == "index":
        return write_shards(folder, state) / "model.safetensors.index.json"
    if request.param == "one file":
        return next(write_shards(folder, state, 1).glob("*.safetensors"))
    folder.mkdir()
    torch.save(state, folder / "weights.bin")
    return folder / "weights.bin"


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential", THREE, {"": "disk"}, {"": "cpu"}])
@pytest.mark.parametrize("build", [make, empty], ids=["real", "meta"])
def test_a_checkpoint_is_the_disk_tier(checkpoint: Path, device_map: Any, build: Callable[[], nn.Module]) -> None:
    before, model = contents(checkpoint.parent), build()
    if build is make:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    memory = {0: 3 * LAYER, "cpu": 2 * LAYER} if isinstance(device_map, str) else None
    options = {"no_split_module_classes": ["Linear"], "force_hooks": True, "offload_state_dict": True}
    assert load_checkpoint_and_dispatch(model, checkpoint, device_map, memory, main_device="cpu", **options) is model
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(X), make()(X))
    assert within(model)
    if memory is not None:
        assert budgets(model) == {"gpu": 3 * LAYER, "cpu": 2 * LAYER, "disk": None}
        assert model.hf_device_map == infer_auto_device_map(make(), memory)
        assert set(model.hf_device_map.values()) <= {0, "cpu", "disk"}
    else:
        assert model.hf_device_map == device_map
    assert contents(checkpoint.parent) == before
    remove_hook_from_module(model)
    assert torch.equal(model(X), make()(X))
    assert contents(checkpoint.parent) == before


def test_without_a_map_the_weights_are_loaded(checkpoint: Path) -> None:
    for model in (empty(), make()):
        assert load_checkpoint_and_dispatch(model, checkpoint) is model
        assert not hasattr(model, "tiered")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, make().state_dict()[name])
        assert torch.equal(model(X), make()(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_cast_on_the_way_up(dtype: Any, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "c", make().state_dict())
    model = load_checkpoint_and_dispatch(empty(), folder, "auto", {"cpu": 2 * LAYER}, dtype=dtype)
    assert budgets(model) == {"cpu": 2 * LAYER, "disk": None}
    assert torch.equal(model(X.bfloat16()), make().bfloat16()(X.bfloat16()))
    assert model.hf_device_map == infer_auto_device_map(make().bfloat16(), {"cpu": 2 * LAYER})


def test_what_is_written_goes_to_the_folder(tmp_path: Path, scratch: Path) -> None:
    folder = write_shards(tmp_path / "c", make().state_dict())
    before = contents(folder)
    model = load_checkpoint_and_dispatch(empty(), folder, "auto", {"cpu": 3 * LAYER}, offload_folder=scratch)
    with torch.no_grad():
        for layer in list(model)[:6]:
            layer.weight.mul_(2)
    expected = make()
    with torch.no_grad():
        for layer in list(expected)[:6]:
            layer.weight.mul_(2)
    assert torch.equal(model(X), expected(X))
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path not in (folder, scratch)] == []
    remove_hook_from_module(model)
    assert torch.equal(model(X), expected(X))


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    state = make().state_dict()
    lacking = write_shards(tmp_path / "lacking", {name: tensor for name, tensor in state.items() if name != "2.bias"})
    more = write_shards(tmp_path / "more", {**state, "stranger": torch.zeros(3)})
    wrong = write_shards(tmp_path / "wrong", {**state, "2.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"missing .1.: 2\.bias"):
        load_checkpoint_and_dispatch(empty(), lacking, "auto")
    with pytest.raises(CheckpointError, match=r"2\.bias: \(3,\) in the checkpoint"):
        load_checkpoint_and_dispatch(empty(), wrong, "auto")
    with pytest.warns(UserWarning, match="stranger"):
        load_checkpoint_and_dispatch(empty(), more, "auto")
    for folder, names in ((lacking, (("2.bias",), ())), (more, ((), ("stranger",)))):
        model = make()
        with pytest.raises(CheckpointError, match="strict=True") as caught:
            load_checkpoint_and_dispatch(model, folder, "auto", strict=True)
        assert (caught.value.missing, caught.value.unexpected) == names
        assert type(model[0].weight) is nn.Parameter
    load_checkpoint_and_dispatch(empty(), write_shards(tmp_path / "good", state), "auto", strict=True)


def test_a_checkpoint_has_to_stay(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "c", make().state_dict())
    model = load_checkpoint_and_dispatch(empty(), folder, "auto", {"cpu": 2 * LAYER})
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(CorruptionError, match="the file is missing"):
        model(X)
    del model
    gc.collect()  # the frames of the error, and then the session


def test_bad_requests(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "c", make().state_dict())
    model = empty()
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"device_map": "best"}, ModelError, "give one of auto, balanced, balanced_low_0, sequential"),
        ({"device_map": {"0": "cpu"}}, ModelError, "gives no device for"),
        ({"device_map": "auto", "max_memory": {"cuda:0": "1MB", "xpu:1": "1MB"}}, TierStoreError, "accelerators of several types"),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, SizeError, "'much' is not a size"),
        ({"device_map": "auto", "max_memory": {"ram": 3}}, BackendError, "'ram' is no place"),
        ({"device_map": "auto", "max_memory": {0: "1MB"}, "main_device": "cuda:1"}, TierStoreError, "not among the accelerators"),
        ({"device_map": "auto", "dtype": "flot16"}, UnsupportedTensorError, "'flot16' is no dtype"),
        ({"broadcast_from_rank0": True}, ModelError, "needs several processes"),
    ]
    for options, error, message in bad:
        with pytest.raises(error, match=message):
            load_checkpoint_and_dispatch(model, folder, **options)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint_and_dispatch(model, tmp_path / "nowhere", "auto")
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert not model._forward_pre_hooks


# -- infer_auto_device_map --------------------------------------------------------------------------------------------


def test_a_map_fills_places_in_order() -> None:
    model = make()
    everything = infer_auto_device_map(model, {0: TOTAL})
    assert everything == {"": 0}
    found = infer_auto_device_map(model, {0: TOTAL - 1, "cpu": LAYER})
    places = list(found.values())
    assert list(found) == [str(number) for number in range(7)]
    assert places == sorted(places, key=[0, "cpu", "disk"].index)
    given = bytes_by_place_of(model, found)
    assert 0 < given[0] <= TOTAL - 1 - 2 * LAYER
    assert given["cpu"] == LAYER
    assert sum(given.values()) == TOTAL
    assert infer_auto_device_map(model, {"cpu": TOTAL}) == {"": "cpu"}
    assert infer_auto_device_map(model, {"disk": 10, "cpu": 0, 0: TOTAL}) == {"": 0}
    with pytest.warns(UserWarning, match="nothing stays in the 10 B of 0"):
        assert infer_auto_device_map(model, {0: 10}) == {"": "disk"}


def bytes_by_place_of(model: nn.Module, device_map: dict[str, Any]) -> dict[Any, int]:
    owned = {name: sum(t.nbytes for t in (*module.parameters(), *module.buffers())) for name, module in model.named_modules()}
    found: dict[Any, int] = {}
    for name, place in device_map.items():
        found[place] = found.get(place, 0) + owned[name]
    return found


def test_a_map_never_promises_more_than_there_is(scratch: Path) -> None:
    """What infer gives to the accelerator, with what passes through it, is what dispatch takes: not more than max_memory."""
    for kind in KINDS:
        model = make(kind)
        total = nbytes(model)
        for share in (6, 7, 8, 9):
            limit = total * share // 10
            device_map = infer_auto_device_map(model, {0: limit, "cpu": total // 4}, offload_buffers=True)
            dispatched = dispatch_model(make(kind), device_map, "cpu", offload_dir=scratch, offload_buffers=True)
            least = 2 * max(sum(t.nbytes for t in m._parameters.values() if t is not None) for m in model.modules())
            found = budgets(dispatched)
            if "gpu" in found:
                assert found["gpu"] <= max(limit, least), (kind, share)
            if "disk" in found and "gpu" in found:
                assert found.get("cpu", 0) <= total // 4, (kind, share)


def test_ties_count_once_and_stay_together() -> None:
    model = make("ties")
    first = infer_auto_device_map(model, {0: nbytes(model)})
    assert first == {"": 0}
    found = infer_auto_device_map(model, {0: 0, "cpu": 12_000}, clean_result=False)
    assert set(found.values()) == {"cpu", "disk"}
    assert found["head"] == found["embed"]
    assert found["second"] == found["first"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_covers_the_model(kind: str) -> None:
    model = empty(kind)
    for limit in (0.0, 0.3, 0.6, 0.9):
        memory = {0: int(nbytes(model) * limit), "cpu": nbytes(model) // 4}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = infer_auto_device_map(model, memory)
        assert not caught or 0 not in found.values()
        places = check_device_map(model, found)
        assert set(places) == set(found)
        finer = infer_auto_device_map(model, {0: nbytes(model) - 1, "cpu": 100}, clean_result=False)
        assert check_device_map(model, finer)


def test_casts_count() -> None:
    model = make()
    half = infer_auto_device_map(model, {0: TOTAL // 2 + 8}, dtype="float16")
    assert half == {"": 0}
    assert infer_auto_device_map(model, {0: TOTAL // 2 + 8}) != {"": 0}
    special = dict.fromkeys(model.state_dict(), torch.float16)
    assert infer_auto_device_map(model, {0: TOTAL // 2 + 8}, special_dtypes=special) == {"": 0}


def test_verbose_and_words_without_effect(caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    with caplog.at_level(logging.INFO):
        found = infer_auto_device_map(model, {0: TOTAL - 1}, no_split_module_classes=["Linear"], verbose=True, fallback_allocation=True)
    assert found == infer_auto_device_map(model, {0: TOTAL - 1})
    assert "0 goes to 0" in caplog.text


def test_memory_that_nobody_names() -> None:
    found = get_balanced_memory(make())
    assert found["cpu"] == pytest.approx(available_ram(), rel=0.3)
    assert get_balanced_memory(make(), {"cpu": "1KiB", 0: "2KiB"}) == {0: 2048, "cpu": 1024}
    if not torch.accelerator.is_available():
        assert infer_auto_device_map(make()) == {"": "cpu"}
    assert get_balanced_memory(make(), {"cpu": 3, 1: 1, 0: 2}) == {1: 1, 0: 2, "cpu": 3}


def test_sizes_are_those_of_accelerate() -> None:
    """Where everything fits, or nothing is split, both give the same answer."""
    for kind in ("layers", "uncalled layers", "stacked weights"):
        model = make(kind)
        total = nbytes(model)
        assert infer_auto_device_map(model, {"cpu": 2 * total}) == accelerate.infer_auto_device_map(model, {"cpu": 2 * total})
    places = check_device_map(make(), THREE)
    assert sum(bytes_by_place(Sizes(make(), Casts()), places).values()) == TOTAL


# -- building ---------------------------------------------------------------------------------------------------------


def test_empty_weights() -> None:
    with init_empty_weights():
        huge = nn.Sequential(*(nn.Linear(10_000, 10_000) for _ in range(100)))  # 40 GB
        norm = nn.BatchNorm1d(4)
    assert {parameter.device.type for parameter in huge.parameters()} == {"meta"}
    assert norm.weight.device.type == "meta"
    assert norm.running_mean.device.type == "cpu"
    with init_empty_weights(include_buffers=True):
        norm = nn.BatchNorm1d(4)
    assert norm.running_mean.device.type == "meta"
    with init_on_device(torch.device("meta")):
        assert nn.Linear(2, 2).weight.device.type == "meta"
    assert nn.BatchNorm1d(4).weight.device.type == "cpu"


def test_a_variable_says_what_of_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("true", "meta"), ("1", "meta"), ("0", "cpu"), ("", "cpu")):
        monkeypatch.setenv("ACCELERATE_INIT_INCLUDE_BUFFERS", value)
        with init_empty_weights():
            assert nn.BatchNorm1d(4).running_mean.device.type == expected


# -- several accelerators -----------------------------------------------------------------------------------------------


def test_a_map_with_two_accelerators(scratch: Path) -> None:
    """On the CPU both are RAM: each gets the bytes of its part of the map, and room for what passes through."""
    device_map = {"0": 0, "1": 1, "2": 1, "3": "cpu", "4": "disk", "5": "disk", "6": "cpu"}
    model = dispatch_model(make(), device_map, "cpu", offload_dir=scratch)
    assert model.hf_device_map == device_map
    sizes = Sizes(make(), Casts())
    passing = sizes.passing(offload_buffers=False)
    norm = TOTAL - 6 * LAYER
    assert budgets(model) == {"gpu:0": LAYER + passing, "gpu:1": 2 * LAYER + passing, "cpu": LAYER + norm, "disk": None}
    assert {model.tiered.tier_of("0.weight"), model.tiered.tier_of("5.weight")} <= {"gpu:0", "gpu:1", "cpu", "disk"}
    for _ in range(3):
        assert torch.equal(model(X), make()(X))
    assert within(model)
    remove_hook_from_module(model)
    assert same_weights(model)


def same_weights(model: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), make().parameters(), strict=True))


def test_a_map_with_accelerators_only() -> None:
    model = dispatch_model(make(), {"": 0, "3": 1, "4": 1, "5": 1}, "cpu")
    assert list(budgets(model)) == ["gpu:0", "gpu:1"]
    assert torch.equal(model(X), make()(X))
    assert set(model.tiered.tier_map.values()) == {"gpu:0", "gpu:1"}


def test_a_checkpoint_on_two_accelerators(tmp_path: Path, scratch: Path) -> None:
    folder = write_shards(tmp_path / "c", make().state_dict())
    memory = {1: LAYER + 2000, 0: 2 * LAYER, "cpu": LAYER}
    model = load_checkpoint_and_dispatch(empty(), folder, "auto", memory, main_device="cpu", offload_folder=scratch)
    assert budgets(model) == {"gpu:1": LAYER + 2000, "gpu:0": 2 * LAYER, "cpu": LAYER, "disk": None}
    assert model.hf_device_map == infer_auto_device_map(make(), memory)
    for _ in range(3):
        assert torch.equal(model(X), make()(X))
    assert within(model)
    assert model.tiered.tier_of("0.weight") != "gpu:0"
    remove_hook_from_module(model)
    assert same_weights(model)
