"""Bad input: a clear error that names the thing and the way out, and model and disk as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.plainly import nbytes, restored, same, state, under_pressure
from tierstore import BackendError, BudgetError, ClosedError, ModelError, Tier, TieredStore, TierStoreError, open_backend, tiered
from tierstore.backends.scratch import ScratchBackend
from tierstore.devices import working_accelerator


def model_of(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width))


@contextmanager
def untouched(model: nn.Module, place: Path) -> Iterator[None]:
    """The block must leave parameters, their objects and the directory as they were."""
    objects, values, files = dict(model.named_parameters()), state(model), sorted(place.rglob("*"))
    yield
    assert restored(model, objects)
    assert same(state(model), values)
    assert [f for f in sorted(place.rglob("*")) if not f.name.startswith(".")] == files


@pytest.mark.parametrize("size", ["8 gigs", "", "GiB", "-1", "1e3", "1,5GB", -5, 1.5, True, None.__class__, [1]])
@pytest.mark.parametrize("tier", ["gpu", "cpu"])
def test_size_that_does_not_parse(tier: str, size: object, scratch: Path) -> None:
    model = model_of()
    with untouched(model, scratch), pytest.raises(ValueError, match="8GiB"):
        tiered(model, **{tier: size}, disk=scratch, device="cpu")  # type: ignore[arg-type]


def test_disk_size_that_does_not_parse(scratch: Path) -> None:
    model = model_of()
    with untouched(model, scratch), pytest.raises(ValueError, match="8GiB"):
        tiered(model, gpu=5000, disk=(scratch, "lots"), device="cpu")


def test_one_tensor_larger_than_the_budget(scratch: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Embedding(100, 16))
    with untouched(model, scratch), pytest.raises(BudgetError) as caught:
        tiered(model, gpu=3000, disk=scratch, device="cpu")
    error = caught.value
    assert isinstance(error, MemoryError)
    assert isinstance(error, TierStoreError)
    assert "1.weight" in str(error)
    assert (error.required_bytes, error.budget_bytes, error.tier) == (6400, 3000, "gpu")


def test_one_operation_larger_than_the_budget(scratch: Path) -> None:
    """Each tensor fits, but `addmm` needs weight and bias together: nothing has moved when it raises."""
    model = model_of()
    x = torch.ones(1, 16)
    with untouched(model, scratch), tiered(model, gpu=16 * 16 * 4 + 10, disk=scratch, device="cpu") as session:
        for grad in (True, False):
            before = session.stats().links
            with torch.set_grad_enabled(grad), pytest.raises(BudgetError) as caught:
                model(x)
            assert caught.value.required_bytes == (16 * 16 + 16) * 4
            assert "addmm" in str(caught.value)
            assert "'0.weight'" in str(caught.value)
            if grad:
                assert session.stats().links == before
        session.resize(gpu=caught.value.required_bytes)
        model(x)


def test_model_larger_than_all_tiers(scratch: Path) -> None:
    model = model_of()
    with untouched(model, scratch), pytest.raises(BudgetError, match="disk"):
        tiered(model, gpu=1200, cpu=1200, device="cpu")
    with untouched(model, scratch), pytest.raises(BudgetError, match="disk"):
        tiered(model, gpu=1200, cpu=500, disk=(scratch, 500), device="cpu")


@pytest.mark.skipif(working_accelerator() is not None, reason="here an accelerator works")
def test_gpu_without_an_accelerator(scratch: Path) -> None:
    model = model_of()
    with untouched(model, scratch), pytest.raises(BackendError, match='device="cpu"'):
        tiered(model, gpu="1GiB", disk=scratch)
    with untouched(model, scratch), pytest.raises(BackendError, match="cuda"):
        tiered(model, gpu="1GiB", disk=scratch, device="cuda")


def test_disk_path_is_a_file(scratch: Path) -> None:
    place = scratch / "file"
    place.write_text("data")
    model = model_of()
    with untouched(model, scratch), pytest.raises(BackendError, match="file"):
        tiered(model, gpu=2000, disk=place, device="cpu")
    assert place.read_text() == "data"
    place.unlink()


def test_disk_path_is_not_writable() -> None:
    model = model_of()
    with pytest.raises(BackendError, match="/proc/nowhere"):
        tiered(model, gpu=2000, disk="/proc/nowhere", device="cpu")
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_disk_path_belongs_to_another_store(tmp_path: Path) -> None:
    model = model_of()
    with TieredStore([Tier("disk", open_backend("disk", tmp_path / "kept"))]) as store:
        store.put("a", torch.ones(3))
        with pytest.raises(BackendError, match="another store"):
            tiered(model, gpu=2000, disk=tmp_path / "kept", device="cpu")
        with pytest.raises(BackendError, match="open"):
            open_backend("disk", tmp_path / "kept")
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_unknown_backend_or_policy(scratch: Path) -> None:
    model = model_of()
    with pytest.raises(BackendError, match=r"installed: .*disk.*zarr"):
        open_backend("tape")
    with untouched(model, scratch), pytest.raises(BackendError, match="installed"):
        tiered(model, gpu=2000, disk="tape://somewhere", device="cpu")
    with untouched(model, scratch), pytest.raises(TierStoreError, match="lru"):
        tiered(model, gpu=2000, disk=scratch, device="cpu", policy="clairvoyant")


def test_model_already_tiered(scratch: Path) -> None:
    model = model_of()
    with untouched(model, scratch), under_pressure(model, scratch):
        with pytest.raises(ModelError, match="already under tiered"):
            tiered(model, gpu=2000, disk=scratch, device="cpu")
        with pytest.raises(ModelError, match="already under tiered"):
            tiered([nn.Linear(2, 2), model[0]], gpu=2000, disk=scratch, device="cpu")
        model(torch.ones(1, 16))


def test_model_held_by_another_session(scratch: Path) -> None:
    model = model_of()
    with tiered(model, gpu="1MiB", device="cpu"), pytest.raises(ModelError, match="already under tiered"):
        tiered(model, gpu=2000, disk=scratch, device="cpu")


def test_model_with_accelerate_hooks(scratch: Path) -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    model = model_of()
    expected = model(torch.ones(1, 16)).detach()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match="remove_hook_from_module"):
        tiered(model, gpu=2000, disk=scratch, device="cpu")
    assert torch.equal(model(torch.ones(1, 16)), expected)
    remove_hook_from_module(model, recurse=True)


def test_model_with_diffusers_hooks(scratch: Path) -> None:
    model = model_of()
    model[1]._diffusers_hook = object()
    with pytest.raises(ModelError, match=r"'1' carries diffusers"):
        tiered(model, gpu=2000, disk=scratch, device="cpu")


def test_model_without_data(scratch: Path) -> None:
    with torch.device("meta"):
        model = model_of()
    with pytest.raises(ModelError, match=r"'0.weight' is on the meta device"):
        tiered(model, gpu=2000, disk=scratch, device="cpu")
    half = model_of()
    half[2] = model[2]
    values = state(half[0])
    with pytest.raises(ModelError, match=r"'2.weight'"):
        tiered(half, gpu=2000, disk=scratch, device="cpu")
    assert same(state(half[0]), values)


def test_uninitialised_lazy_module(scratch: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    with pytest.raises(ModelError, match=r"'1\.(weight|bias)' is not initialised"):
        tiered(model, gpu=2000, disk=scratch, device="cpu")
    model(torch.ones(1, 4))


def test_tensors_that_cannot_be_tiered(scratch: Path) -> None:
    sparse = model_of()
    sparse.register_buffer("pattern", torch.eye(4).to_sparse())
    with pytest.raises(ModelError, match="'pattern' cannot be tiered"):
        tiered(sparse, gpu=2000, disk=scratch, device="cpu")
    scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(ModelError, match="TorchScript"):
        tiered(nn.Sequential(scripted), gpu=2000, disk=scratch, device="cpu")


@pytest.mark.parametrize("thing", [None, "model", 3, [nn.Linear(2, 2), "x"], {"a": 1}])
def test_what_is_not_a_model(thing: object, scratch: Path) -> None:
    with pytest.raises(TierStoreError, match=r"torch\.nn\.Module"):
        tiered(thing, gpu=2000, disk=scratch, device="cpu")  # type: ignore[arg-type]


def test_closed_store_and_session(scratch: Path) -> None:
    store = TieredStore([Tier("cpu", open_backend("device", "cpu"))])
    store.put("a", torch.ones(2))
    store.close()
    store.close()
    for use in (lambda: store.get("a"), lambda: store.put("a", torch.ones(2)), lambda: "a" in store, lambda: len(store), store.flush):
        with pytest.raises(ClosedError):
            use()
    model = model_of()
    session = under_pressure(model, scratch)
    session.close()
    session.close()
    with pytest.raises(ClosedError), session:
        pass
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_failing_setup_restores_the_model(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full half way through: the model comes back whole."""
    backend = ScratchBackend(scratch / "own")
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    objects, values = dict(model.named_parameters()), state(model)
    written = []
    put = backend.put

    def failing(key: str, tensor: torch.Tensor) -> None:
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        written.append(key)
        put(key, tensor)

    monkeypatch.setattr(backend, "put", failing)
    with pytest.raises(OSError, match="No space"):
        tiered(model, gpu=2000, disk=backend, device="cpu")
    assert restored(model, objects)
    assert same(state(model), values)


def test_options_that_do_not_exist_yet_say_so(scratch: Path) -> None:
    for options, message in (({"train": True}, "not available yet"), ({"dtype": torch.bfloat16}, "checkpoint=")):
        with pytest.raises(TierStoreError, match=message):
            tiered(model_of(), gpu=2000, disk=scratch, device="cpu", **options)  # type: ignore[arg-type]


def test_two_sessions_in_one_directory(scratch: Path) -> None:
    """The same directory serves two models at once, and a second run never sees the first one's weights."""
    first, second = model_of(), model_of()
    x = torch.ones(1, 16)
    expected = [first(x).detach(), second(x).detach()]
    with under_pressure(first, scratch), under_pressure(second, scratch):
        assert torch.equal(first(x), expected[0])
        assert torch.equal(second(x), expected[1])
    other = copy.deepcopy(first)
    with torch.no_grad():
        other[0].weight.add_(1)
    plain = other(x).detach()
    with under_pressure(other, scratch):
        assert torch.equal(other(x), plain)


def test_unlimited_without_sizes() -> None:
    model = model_of()
    with tiered(model, device="cpu") as session:
        assert session.stats().tiers["cpu"].budget_bytes is None
        assert session.stats().tiers["cpu"].used_bytes == nbytes(model)


def test_device_that_does_not_exist(scratch: Path) -> None:
    model = model_of()
    for device in ("nonsense", "meta"):
        with untouched(model, scratch), pytest.raises(BackendError, match='device="cpu"'):
            tiered(model, gpu=2000, disk=scratch, device=device)


def test_leaving_when_a_weight_cannot_be_brought_back(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost: the weight stays tiered and works, the others are plain, and closing again brings it back."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    objects, values, x = dict(model.named_parameters()), state(model), torch.ones(1, 16)
    expected = model(x).detach()
    session = under_pressure(model, scratch)
    assert torch.equal(model(x), expected)
    disk = session.store.tiers[-1].backend
    lost = next(key for key, _ in disk.entries() if session.tier_of(key) == "disk")
    get = type(disk).get

    def failing(backend: object, key: str) -> torch.Tensor:
        if key == lost:
            raise OSError(12, "Cannot allocate memory")
        return get(backend, key)  # type: ignore[arg-type]

    monkeypatch.setattr(type(disk), "get", failing)
    with pytest.raises(TierStoreError, match=r"close\(\) again"):
        session.close()
    monkeypatch.undo()
    assert type(objects[lost]) is not nn.Parameter
    assert all(type(p) is nn.Parameter for name, p in objects.items() if name != lost)
    assert torch.equal(model(x), expected)
    session.close()
    assert restored(model, objects)
    assert same(state(model), values)
