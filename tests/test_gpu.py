"""What only an accelerator shows: bits, streams, page-locked memory, what the allocator says, and copies beside computations.

python -m pytest -m gpu tests/test_gpu.py
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.plainly import gradients, largest, nbytes, nothing_leased, restored, same, state, within_budget
from tests.samples import all_samples, assert_identical
from tests.test_models import MODELS, mlp
from tierstore import Tier, TieredStore, open_backend, tiered
from tierstore.backends._pinned import cuda_locking
from tierstore.devices import working_accelerator
from tierstore.transfer.streams import StreamEngine

pytestmark = pytest.mark.gpu

MIB = 1 << 20
NAMED = ("default", "side")


@pytest.fixture
def device() -> torch.device:
    found = working_accelerator()
    if found is None:
        pytest.fail("tests marked gpu need an accelerator that works")
    return torch.empty(1, device=found).device


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("asks CUDA itself")
    return device


def on(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """Compute on the default stream, or on another one that begins after it."""
    if name == "default":
        return nullcontext()
    module = torch.get_device_module(device)
    side = module.Stream(device)
    side.wait_stream(module.current_stream(device))
    context: AbstractContextManager[Any] = module.stream(side)
    return context


def peak_of(device: torch.device, before: int) -> int:
    """Return the most bytes that were allocated since the peak was reset, less what was there before."""
    torch.accelerator.synchronize()
    return torch.accelerator.max_memory_allocated(device) - before


def layers(count: int, width: int, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False, **options) for _ in range(count)))


def warm_up(x: torch.Tensor) -> int:
    """Multiply once, so that the workspace of the library that does it is there; return the bytes allocated now."""
    nn.functional.linear(x, torch.ones(x.shape[-1], x.shape[-1], device=x.device))
    torch.accelerator.synchronize()
    return torch.accelerator.memory_allocated(x.device)


# -- bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", NAMED)
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("below", ["cpu and disk", "cpu", "disk"])
@pytest.mark.parametrize("name", MODELS)
def test_model_equals_plain(name: str, below: str, mode: str, stream: str, device: torch.device, scratch: Path) -> None:
    make, x = MODELS[name]
    torch.manual_seed(0)
    model = make().train(mode == "train")
    torch.manual_seed(0)
    plain = make().train(mode == "train").to(device)
    objects, total = dict(model.named_parameters()), nbytes(model)
    tiers: dict[str, Any] = {"disk": scratch} if "disk" in below else {}
    tiers |= {"cpu": total // 3 if "disk" in below else 2 * total} if "cpu" in below else {}

    def step(m: nn.Module, turn: int) -> Any:
        torch.manual_seed(turn)
        with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode in ("train", "eval")):
            y = m(x.to(device))
            if mode in ("train", "eval"):
                y.float().square().sum().backward()
            return y.detach().clone()

    with on(stream, device):
        expected = [step(plain, turn) for turn in range(3)]
        with tiered(model, gpu=max(total // 3, largest(model)), **tiers) as session:
            assert session.device == device
            for turn in range(3):
                assert same(step(model, turn), expected[turn]), f"turn {turn}"
            within_budget(session)
            assert nothing_leased(session)
        torch.accelerator.synchronize()
    plain, model = plain.cpu(), model.cpu()
    assert same(gradients(model), gradients(plain))
    assert same(state(model), state(plain))
    assert restored(model, objects)


@pytest.mark.parametrize("home", ["cpu", "accelerator"])
def test_model_comes_back_to_where_it_was(home: str, device: torch.device, scratch: Path) -> None:
    model = mlp()
    model = model.to(device) if home == "accelerator" else model
    places, values = {n: p.device for n, p in model.named_parameters()}, state(model)
    x = torch.ones(1, 16, device=device)
    with tiered(model, gpu=max(nbytes(model) // 3, largest(model)), cpu=nbytes(model) // 3, disk=scratch), torch.no_grad():
        model(x)
    assert {n: p.device for n, p in model.named_parameters()} == places
    assert same(state(model), values)


@pytest.mark.parametrize("stream", NAMED)
@pytest.mark.parametrize("below", [{"cpu": "64MiB"}, {"cpu": "8MiB", "disk": True}, {"disk": True}])
def test_training_equals_plain(below: dict[str, Any], stream: str, device: torch.device, scratch: Path) -> None:
    """Weights change in every step, so what leaves is written down first."""
    model, plain = layers(12, 512), layers(12, 512).to(device)
    options = {**below, "disk": scratch} if "disk" in below else below
    x = torch.randn(4, 512, device=device)

    def train(m: nn.Module) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = m(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    with on(stream, device):
        expected = train(plain)
        with tiered(model, gpu="5MiB", **options) as session:
            assert same(train(model), expected)
            within_budget(session)
    assert same(state(model), state(plain.cpu()))


@pytest.mark.parametrize("policy", ["auto", "lru"])
@pytest.mark.parametrize("below", [{"cpu": "256MiB"}, {"cpu": "24MiB", "disk": True}, {"disk": True}])
def test_many_passes_that_stream_give_the_same_bits(below: dict[str, Any], policy: str, device: torch.device, scratch: Path) -> None:
    """What a missing order would break, now and then: nothing here waits for the device between passes."""
    model = layers(16, 1024).requires_grad_(False)
    options = {**below, "disk": scratch} if "disk" in below else below
    x = torch.randn(64, 1024, device=device)
    plain = layers(16, 1024).requires_grad_(False).to(device)
    expected = plain(x)
    del plain
    with tiered(model, gpu="18MiB", policy=policy, **options) as session:
        results = [model(x) for _ in range(50)]
        assert all(torch.equal(result, expected) for result in results)
        within_budget(session)
        assert session.stats().links["cpu->gpu" if "cpu" in below else "disk->gpu"].bytes > 0


@pytest.mark.parametrize("below", ["pinned", "disk"])
def test_every_dtype_and_layout_passes_through_the_device(below: str, device: torch.device, tmp_path: Path) -> None:
    bottom = open_backend("pinned") if below == "pinned" else open_backend("disk", tmp_path / "store")
    samples = all_samples() | {f"large {n}": torch.randn(1500 + n, 2000) for n in range(3)}  # two slabs and a bit
    store = TieredStore([Tier("gpu", open_backend("device", device), 40 * MIB), Tier("low", bottom)])
    assert isinstance(store.moves.engine, StreamEngine)
    for key, tensor in samples.items():
        store.put(key, tensor)
    for _ in range(2):
        for key, tensor in samples.items():
            found = store.get(key)
            assert found.device == device
            assert_identical(found.cpu(), tensor)
    store.close()


# -- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [{"cpu": "128MiB"}, {"cpu": "16MiB", "disk": True}, {"disk": True}])
def test_memory_follows_the_budget(below: dict[str, Any], device: torch.device, scratch: Path) -> None:
    """The allocator's own peak stays within budget and activations: nothing hides behind the ledger."""
    model = layers(16, 1024).requires_grad_(False)
    options = {**below, "disk": scratch} if "disk" in below else below
    x = torch.randn(1, 1024, device=device)
    before = warm_up(x)
    with tiered(model, gpu="16MiB", **options):
        model(x)
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats(device)
        for _ in range(5):
            model(x)
        assert peak_of(device, before) <= 16 * MIB + 20 * x.nbytes + 2 * MIB
    torch.accelerator.synchronize()
    assert torch.accelerator.memory_allocated(device) <= before + x.nbytes


def test_the_budget_is_for_activations_too(device: torch.device) -> None:
    """After the first passes, weights and activations together stay within it, but for what one operation takes."""
    model = layers(16, 1024).requires_grad_(False)
    x = torch.randn(2048, 1024, device=device)  # 8 MiB, of which two or three live at a time
    before = warm_up(x)
    with tiered(model, gpu="48MiB", cpu="128MiB") as session:
        for _ in range(8):
            model(x)
        assert session.stats().tiers["gpu"].aside_bytes >= 8 * MIB
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats(device)
        for _ in range(5):
            model(x)
        assert peak_of(device, before) <= 48 * MIB + x.nbytes + 2 * MIB


def test_memory_of_a_closed_session_is_free(device: torch.device) -> None:
    model = layers(8, 1024).requires_grad_(False)
    x = torch.randn(1, 1024, device=device)
    before = warm_up(x)
    with tiered(model, gpu="16MiB", cpu="64MiB") as session:
        model(x)
    torch.accelerator.synchronize()
    assert torch.accelerator.memory_allocated(device) <= before + 1024
    assert session.stats().misses > 0  # the handle is still there


@pytest.fixture
def little_memory(cuda: torch.device) -> Iterator[int]:
    """Let torch have 640 MiB of the device."""
    torch.cuda.empty_cache()
    most = 640 * MIB
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(cuda).total_memory, cuda)
    yield most
    torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    torch.cuda.empty_cache()


def test_an_operation_without_memory_runs_again_after_weights_made_way(little_memory: int, cuda: torch.device) -> None:
    model = nn.Sequential(*(nn.Linear(2048, 4096, bias=False) for _ in range(16)))  # 32 MiB each
    x = torch.randn(12800, 2048, device=cuda)  # 100 MiB; a result takes 200
    expected = nn.functional.linear(x, model[3].weight.to(cuda)).cpu()
    with tiered(model, gpu="384MiB", cpu="1GiB") as session:
        for layer in model:
            layer(x[:1])
        ledger = session.store.tiers[0].ledger
        assert ledger.used > 340 * MIB
        result = nn.functional.linear(x, model[3].weight)
        assert torch.equal(result.cpu(), expected)
        assert ledger.limit is not None
        assert ledger.limit < 384 * MIB
        within_budget(session)


def test_a_budget_beyond_what_the_device_has_is_found_out(little_memory: int, cuda: torch.device) -> None:
    model = layers(48, 2048).requires_grad_(False)  # 16 MiB each
    x = torch.randn(1, 2048, device=cuda)
    expected = x
    for layer in model:
        expected = nn.functional.linear(expected, layer.weight.to(cuda))
    with tiered(model, gpu="760MiB", cpu="1GiB"):
        for _ in range(3):
            assert torch.equal(model(x), expected)


def test_pinned_memory_is_exact_and_locked(cuda: torch.device) -> None:
    backend = open_backend("pinned")
    store = TieredStore([Tier("gpu", open_backend("device", cuda), 64 * MIB), Tier("cpu", backend)])
    values = {str(i): torch.randn(33 * MIB // 4) for i in range(10)}  # a power of two would be 64 MiB
    small = {f"small {i}": torch.randn(100 + i) for i in range(100)}
    for key, value in (values | small).items():
        store.put(key, value)
        store.offload([key])
    assert all(backend.get(key).is_pinned() for key in values | small)
    arena = backend._pinned  # type: ignore[attr-defined]
    live = sum(value.nbytes for value in values.values()) + len(small) * 4096
    assert live <= arena.held_bytes <= live + 256 * MIB
    for key, value in (values | small).items():
        assert torch.equal(store.get(key).cpu(), value)
    for key in list(store):
        del store[key]
    store.moves.settle()
    backend.trim()  # type: ignore[attr-defined]
    assert arena.held_bytes == 0
    store.close()


def test_an_error_of_the_driver_does_not_reach_the_next_kernel(cuda: torch.device) -> None:
    locking = cuda_locking()
    memory = torch.empty(MIB, dtype=torch.uint8)
    address = -(-memory.data_ptr() // 4096) * 4096
    assert locking.lock(address, 4096) == 0
    assert locking.lock(address, 4096) != 0  # locked already
    assert float(torch.ones(8, device=cuda).sum()) == 8
    locking.unlock(address)
    locking.unlock(address)
    assert float(torch.ones(8, device=cuda).sum()) == 8


# -- copies beside computations ---------------------------------------------------------------------------------------------


def seconds_of(work: Any, device: torch.device) -> float:
    """Return the device's seconds for `work`, the best of three."""
    module = torch.get_device_module(device)
    took = []
    for _ in range(3):
        start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 1000)
    return min(took)


def test_copies_overlap_with_computations(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """Where computing takes twice as long as copying, little of the copying is waited for."""
    width, block = 4096, 64 * MIB
    weight = torch.randn(width, width).pin_memory()
    target = torch.empty_like(weight, device=device)
    copying = seconds_of(lambda: target.copy_(weight, non_blocking=True), device)
    tokens = 256
    while seconds_of(lambda n=tokens: torch.mm(torch.empty(n, width, device=device), target), device) < 2 * copying:
        tokens *= 2
    x = torch.randn(tokens, width, device=device)
    budget = 4 * block + 4 * x.nbytes  # for activations too
    count = 2 * budget // block
    model = layers(count, width).requires_grad_(False)
    with tiered(model, gpu=budget, cpu=count * block) as session:
        for _ in range(6):
            model(x)
        torch.accelerator.synchronize()
        before = session.stats()
        for _ in range(4):
            model(x)
        torch.accelerator.synchronize()
        after = session.stats()
    moved = after.links["cpu->gpu"].bytes - before.links["cpu->gpu"].bytes
    waited = (after.stall_seconds - before.stall_seconds) / (moved / block * copying)
    with capsys.disabled():
        print(f"\n{tokens} tokens: {moved / MIB:.0f} MiB copied, {waited:.1%} of the copying was waited for")  # noqa: T201
    assert moved >= 4 * (count * block - budget)
    assert waited < 0.5


def test_streaming_from_ram_never_makes_the_host_wait(cuda: torch.device) -> None:
    model = layers(16, 1024).requires_grad_(False)
    x = torch.randn(8, 1024, device=cuda)
    with tiered(model, gpu="18MiB", cpu="128MiB"):
        for _ in range(3):
            model(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_waits_are_measured_on_the_device(device: torch.device) -> None:
    model = layers(8, 4096).requires_grad_(False)
    x = torch.randn(1, 4096, device=device)
    with tiered(model, gpu="150MiB", cpu="1GiB") as session:
        for _ in range(3):
            model(x)
        torch.accelerator.synchronize()
        stats = session.stats()
        assert stats.stall_seconds > 0
        assert stats.links["cpu->gpu"].seconds > 0


# -- the rest ---------------------------------------------------------------------------------------------------------------


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


def test_two_threads_compute_on_streams_of_their_own(device: torch.device) -> None:
    model = layers(12, 512).requires_grad_(False)
    x = torch.randn(4, 512, device=device)
    plain = layers(12, 512).requires_grad_(False).to(device)
    expected = plain(x)
    torch.accelerator.synchronize()
    wrong = []
    with tiered(model, gpu="5MiB", cpu="64MiB"):

        def work() -> None:
            with on("side", device), torch.no_grad():
                for _ in range(50):
                    wrong.extend([] if torch.equal(model(x), expected) else [1])

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
