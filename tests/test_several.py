"""Models on several devices: what holds for one holds for each of them, and for what they share.

On a machine without accelerators both fast tiers are RAM, with ledgers, links and plans of their own; that activations cross
is in `test_crossing`.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import tierstore
from tests.checkpoints import contents
from tests.offloadable import KINDS, WIDTH, X
from tests.plainly import compare, largest, nbytes, nothing_leased, restored, within_budget
from tests.rigs import in_threads
from tierstore import BackendError, BudgetError, ModelError, SizeError, Tiered, TierStoreError, on_meta, open_backend, tiered
from tierstore.building import disk_tier
from tierstore.chain import Chain, ChainTiered
from tierstore.chain_opening import Below, _rows
from tierstore.ledger import PartLedger, Pool
from tierstore.patch.chain import DeviceAttachment
from tierstore.patch.regions import find_regions, named_tensors
from tierstore.patch.shares import share_out
from tierstore.store import TieredStore
from tierstore.testing import DictBackend
from tierstore.testing.fake_backends import FakeMemory
from tierstore.testing.fake_device import FakeDevice
from tierstore.testing.stepped import SteppedEngine, Watch
from tierstore.tier import Tier

IDS = torch.arange(12).reshape(2, 6) + 3
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 60}


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)).eval()


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=60, n_positions=32)).eval()


def t5() -> nn.Module:
    config = T5Config(d_model=32, d_ff=48, num_layers=3, num_heads=4, d_kv=8, vocab_size=60, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(16, 16, batch_first=True) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def lines(count: int = 48, width: int = 64) -> nn.Sequential:
    """Layers of one size, for which bytes can be counted."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count))).eval()


def on_two(model: nn.Module, disk: Path, share: float = 1 / 3) -> Tiered:
    """A third of the bytes in two fast tiers (or what one module needs in each), a third in RAM, the rest on disk."""
    part = max(int(nbytes(model) * share / 2), largest(model))
    return tiered(model, gpu={0: part, 1: part}, cpu=int(nbytes(model) * share), disk=disk, device="cpu")


def stores(session: Tiered) -> list[Any]:
    return list(session.stores.values())


def check(session: Tiered) -> None:
    """Every tier is inside its budget and always was; ledgers agree with what backends hold, common ones in sum."""
    within_budget(session)
    for store in stores(session):
        store.moves.settle()
    tiers = session.stats().tiers
    for store in stores(session):
        assert store.tiers[0].ledger.used == sum(spec.nbytes for _, spec in store.tiers[0].backend.entries())
    for level, name in enumerate(list(stores(session)[0].stats().tiers)[1:], 1):
        rows = [store.tiers[level] for store in stores(session)]
        assert len({id(tier.backend) for tier in rows}) == 1
        assert tiers[name].used_bytes == sum(tier.ledger.used for tier in rows)
        assert tiers[name].used_bytes == sum(spec.nbytes for _, spec in rows[0].backend.entries())
        assert tiers[name].entries + sum(len(tier.stale) for tier in rows) == len(list(rows[0].backend.entries()))
    keys = [set(store) for store in stores(session)]
    assert not keys[0] & keys[1]
    assert all(nothing_leased_by(attachment) for attachment in session.attachments)


def nothing_leased_by(attachment: Any) -> bool:
    return attachment.moves.leased_bytes == sum(entry.nbytes for entry in attachment._held.values())


# -- values -------------------------------------------------------------------------------------------------------------


def forward(model: Any) -> Any:
    return [model(IDS).logits for _ in range(3)]


def generate(model: Any) -> Any:
    return model.generate(IDS, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(IDS))


def learn(model: Any) -> Any:
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), gpt2, t5], ids=["llama", "llama, tied", "gpt2", "t5"])
def test_transformers(make: Callable[[], nn.Module], scratch: Path) -> None:
    steps = [(generate, False), (learn, True)] if make is t5 else [(forward, False), (generate, False), (learn, True)]
    for step, grad in steps:
        compare(make, step, scratch, grad=grad, start=on_two)


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_are_hard_to_offload(kind: str, scratch: Path) -> None:
    compare(KINDS[kind], lambda model: [model(X) for _ in range(3)], scratch, grad=False, start=on_two)
    compare(KINDS[kind], lambda model: model(X).sum().backward(), scratch, start=on_two)


@pytest.mark.parametrize(("make", "shape"), [(Recurrent, (2, 5, 16)), (Convolutions, (2, 8, 6, 6))])
def test_modules_of_torch(make: Callable[[], nn.Module], shape: tuple[int, ...], scratch: Path) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    compare(make, lambda model: [model(x) for _ in range(2)], scratch, grad=False, start=on_two)
    compare(make, lambda model: model(x).sum().backward(), scratch, start=on_two)


def test_training(scratch: Path) -> None:
    """Optimizer states are entries of the devices of their weights."""

    def step(model: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
        return model(X)

    def start(model: nn.Module, disk: Path) -> Tiered:
        return tiered(model, gpu={0: 3 * largest(model), 1: 3 * largest(model)}, cpu=nbytes(model), disk=disk, device="cpu")

    compare(KINDS["layers"], step, scratch, start=start)
    model = KINDS["layers"]()
    with start(model, scratch) as session:
        step(model)
        check(session)


def test_threads(scratch: Path) -> None:
    model, plain = lines(12), lines(12)
    x = torch.ones(2, 64)
    expected = plain(x).detach()
    with tiered(model, gpu={0: 5 << 14, 1: 5 << 14}, cpu=3 << 14, disk=scratch, device="cpu") as session:

        def work() -> None:
            for number in range(20):
                with torch.set_grad_enabled(number % 5 == 4):
                    assert torch.equal(model(x), expected)

        assert in_threads(*[work] * 4) == [None] * 4
        check(session)


def test_weights_of_two_devices_in_one_operation_by_many_threads(scratch: Path) -> None:
    """Both stores are leased in one order, or two threads, each with all of one device, would wait for each other."""
    model, plain = lines(8), lines(8)
    with tiered(model, gpu={0: 1 << 14, 1: 1 << 14}, cpu=2 << 14, disk=scratch, device="cpu") as session, torch.no_grad():

        def work(left: int, right: int) -> None:
            expected = torch.mm(plain[left].weight, plain[right].weight)
            for _ in range(100):
                assert torch.equal(torch.mm(model[left].weight, model[right].weight), expected)

        pairs = [(0, 7), (6, 1), (2, 5), (4, 3)]
        assert in_threads(*[lambda pair=pair: work(*pair) for pair in pairs], timeout=40) == [None] * 4
        check(session)


# -- what lies where, and what moves ------------------------------------------------------------------------------------


def test_each_device_has_its_layers_and_all_share_what_is_below(scratch: Path) -> None:
    model = lines(16)
    size = nbytes(model)
    with tiered(model, gpu={0: size // 8, 1: size // 4}, cpu=size // 4, disk=scratch, device="cpu") as session, torch.no_grad():
        assert list(session.stats().tiers) == ["gpu:0", "gpu:1", "cpu", "disk"]
        links = set(session.stats().links)
        assert {"cpu->gpu:0", "cpu->gpu:1", "disk->cpu", "disk->gpu:0"} <= links
        assert not {"gpu:0->gpu:1", "gpu:1->gpu:0"} & links
        for _ in range(4):
            model(torch.ones(1, 64))
            check(session)
        places = {int(name.split(".")[0]): tier for name, tier in session.tier_map.items()}
        assert list(session.tier_map) == [name for name, _ in model.named_parameters()]
        assert {places[number] for number in range(5)} <= {"gpu:0", "cpu", "disk"}
        assert {places[number] for number in range(6, 16)} <= {"gpu:1", "cpu", "disk"}
        assert session.tier_of("3.weight") == places[3]
        with pytest.raises(KeyError, match="nothing"):
            session.tier_of("nothing")
        stats = session.stats()
        parts = [store.stats() for store in stores(session)]
        assert (stats.hits, stats.misses) == (sum(p.hits for p in parts), sum(p.misses for p in parts))
        assert stats.links["disk->cpu"].bytes == sum(part.links["disk->cpu"].bytes for part in parts)
        assert sum(store.tiers[1].ledger.budget for store in stores(session)) == size // 4


def test_bytes_of_a_pass(scratch: Path) -> None:
    """Tiers are exclusive: the disk is read for what neither the devices nor RAM hold, and what passes through."""
    count, unit = 192, 32 * 32 * 4
    model = lines(count, 32)
    x = torch.ones(1, 32)
    with tiered(model, gpu={0: 48 * unit, 1: 48 * unit}, cpu=48 * unit, disk=scratch, device="cpu") as session, torch.no_grad():
        seen = []
        for _ in range(10):
            model(x)
            for store in stores(session):
                store.moves.settle()
            links = session.stats().links
            up = [sum(links[f"{source}->gpu:{n}"].bytes for source in ("cpu", "disk")) for n in (0, 1)]
            disk = sum(link.bytes for name, link in links.items() if name.startswith("disk->"))
            seen.append([carried / unit for carried in (*up, disk)])
        passes = [[b - a for a, b in pairwise(column)] for column in zip(*seen[4:], strict=True)]
        first, second, disk = (sum(column) / len(column) for column in passes)
        ring, lower = 8, 3 + 24 // 8  # units: slots, and an eighth of a budget, which may be on its way
        assert 48 <= first <= 48 + ring, passes
        assert 48 <= second <= 48 + ring, passes
        assert disk <= sum((first, second)) - 48 + 2 * lower, passes  # 144 without exclusive tiers, 96 without RAM
        both = [entry for store in stores(session) for entry in store.moves.entries.values() if {0, 1} <= entry.tiers]
        assert len(both) <= 2 * ring, "RAM holds what the devices hold"


def test_what_fits_is_held_plain(scratch: Path) -> None:
    model = lines(8)
    with tiered(model, gpu={0: 5 << 14, 1: 5 << 14}, cpu=1 << 14, disk=scratch, device="cpu") as session, torch.no_grad():
        assert type(model[0].weight) is nn.Parameter
        model(torch.ones(1, 64))
        assert set(session.tier_map.values()) == {"gpu:0", "gpu:1"}
        assert "stays there as plain tensors" in session.report()
        assert session.stats().tiers["cpu"].used_bytes == 0
        check(session)
    assert "_compiled_call_impl" not in model.__dict__


def test_a_device_that_holds_all_beside_one_that_does_not() -> None:
    model = lines(8)
    objects = dict(model.named_parameters())
    with tiered(model, gpu={1: 8 << 14, 0: 1 << 14}, cpu=8 << 14, device="cpu") as session, torch.no_grad():
        assert [store.tiers[0].name for store in stores(session)] == ["gpu:1", "gpu:0"]
        assert torch.equal(model(torch.ones(1, 64)), lines(8)(torch.ones(1, 64)))
        check(session)
    assert restored(model, objects)


def test_tied_weights_are_one_entry(scratch: Path) -> None:
    model = llama(tied=True)
    with on_two(model, scratch) as session:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert session.tier_of("lm_head.weight") == session.tier_of("model.embed_tokens.weight")
        assert sum("embed" in key or "lm_head" in key for store in stores(session) for key in store) == 1
        with torch.no_grad():
            model(IDS)
        check(session)


@pytest.mark.parametrize("gpu", [{0: 3 << 14}, {3: 3 << 14}])
def test_one_device_by_its_index(gpu: dict[int, int], scratch: Path) -> None:
    model = lines(8)
    with tiered(model, gpu=gpu, cpu=2 << 14, disk=scratch, device="cpu") as session, torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(torch.ones(1, 64)), lines(8)(torch.ones(1, 64)))
        assert list(session.stores) == list(session.stats().tiers)[:1] == [f"gpu:{next(iter(gpu))}"]


def test_more_devices_than_modules() -> None:
    model = lines(1)
    with tiered(model, gpu=dict.fromkeys(range(3), 2 << 14), device="cpu") as session, torch.no_grad():
        assert torch.equal(model(torch.ones(1, 64)), lines(1)(torch.ones(1, 64)))
        assert sum(tier.entries for tier in session.stats().tiers.values()) == 1


@pytest.mark.parametrize("seed", range(4))
def test_devices_with_streams_of_their_own(seed: int, scratch: Path) -> None:
    """Late copies, memory used again at once, and every access of each device ordered."""
    torch.manual_seed(0)
    model, plain, x = Convolutions(), Convolutions(), torch.ones(2, 8, 6, 6)
    plain.load_state_dict(model.state_dict())
    fakes = [FakeDevice(seed), FakeDevice(seed + 10)]
    regions = find_regions(named_tensors({"": model}))
    half = nbytes(model) // 3
    shares = share_out({"": model}, regions, [half, half])
    tops = [Tier(f"gpu:{number}", FakeMemory(fake), half) for number, fake in enumerate(fakes)]
    rows = _rows(shares, tops, Below(None, disk_tier(scratch), [frozenset[str]().__contains__] * 2))
    made = [TieredStore(row, "auto", SteppedEngine(fake, seed)) for row, fake in zip(rows.tiers, fakes, strict=True)]
    for store, fake in zip(made, fakes, strict=True):
        Watch(store.moves, fake)
    with ChainTiered({"": model}, Chain(made, [torch.device("cpu")] * 2, rows.commons, shares)) as session:
        for turn in range(6):
            with torch.set_grad_enabled(turn % 3 == 2):
                result, expected = model(x), plain(x)
            assert torch.equal(result, expected)
            if turn % 3 == 2:
                result.sum().backward()
                expected.sum().backward()
            for fake in fakes:
                fake.accesses.check()
        assert all(store.stats().misses for store in session.stores.values())
        within_budget(session)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


# -- the session --------------------------------------------------------------------------------------------------------


def test_resize(scratch: Path) -> None:
    model = lines(16)
    unit = 1 << 14
    with tiered(model, gpu={0: 4 * unit, 1: 4 * unit}, cpu=4 * unit, disk=scratch, device="cpu") as session, torch.no_grad():
        budgets = lambda: {name: tier.budget_bytes for name, tier in session.stats().tiers.items()}  # noqa: E731
        session.resize(gpu={1: "112KiB"})
        assert budgets() == {"gpu:0": 4 * unit, "gpu:1": 7 * unit, "cpu": 4 * unit, "disk": None}
        parts = [store.tiers[1].ledger.budget for store in stores(session)]
        assert sum(parts) == 4 * unit
        assert parts[0] > parts[1]
        model(torch.ones(1, 64))
        session.resize(cpu=2 * unit, gpu={0: 2 * unit})
        assert budgets() == {"gpu:0": 2 * unit, "gpu:1": 7 * unit, "cpu": 2 * unit, "disk": None}
        assert all(tier.used_bytes <= tier.budget_bytes for tier in session.stats().tiers.values() if tier.budget_bytes is not None)
        session.resize(cpu=20 * unit)
        assert torch.equal(model(torch.ones(1, 64)), lines(16)(torch.ones(1, 64)))
        with pytest.raises(TierStoreError, match=r"give resize\(gpu=\{0: ...\}\)"):
            session.resize(gpu="1GiB")
        with pytest.raises(TierStoreError, match="no device has the index 2"):
            session.resize(gpu={2: "1GiB"})
        with pytest.raises(SizeError, match="'much' is not a size"):
            session.resize(gpu={1: 1, 0: "much"})
        assert budgets() == {"gpu:0": 2 * unit, "gpu:1": 7 * unit, "cpu": 20 * unit, "disk": None}


def test_ram_that_cannot_shrink_stays_as_it_was() -> None:
    """Without a disk, what is in RAM has nowhere to go."""
    model = lines(16)
    unit = 1 << 14
    with tiered(model, gpu={0: 4 * unit, 1: 4 * unit}, cpu=10 * unit, device="cpu") as session:
        before = [store.tiers[1].ledger.budget for store in stores(session)]
        with pytest.raises(BudgetError, match="shrinking"):
            session.resize(cpu=2 * unit)
        assert [store.tiers[1].ledger.budget for store in stores(session)] == before
        assert session.stats().tiers["cpu"].budget_bytes == 10 * unit
        with torch.no_grad():
            assert torch.equal(model(torch.ones(1, 64)), lines(16)(torch.ones(1, 64)))
        check(session)


def test_a_resize_that_fails_half_way_changes_nothing() -> None:
    model = lines(16)
    unit = 1 << 14
    with tiered(model, gpu={0: 4 * unit, 1: 4 * unit}, cpu=10 * unit, device="cpu") as session:
        before = {name: tier.budget_bytes for name, tier in session.stats().tiers.items()}
        with pytest.raises(BudgetError, match="shrinking"):
            session.resize(gpu={0: 5 * unit, 1: unit})
        assert {name: tier.budget_bytes for name, tier in session.stats().tiers.items()} == before
        check(session)


def test_saving_and_copying_inside(scratch: Path, tmp_path: Path) -> None:
    model, plain = llama(), llama()
    plain.load_state_dict(model.state_dict())
    with on_two(model, scratch) as session:
        model.save_pretrained(tmp_path / "saved")
        clone = copy.deepcopy(model)
        assert type(clone.lm_head.weight) is nn.Parameter
        assert torch.equal(clone(IDS).logits, plain(IDS).logits)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
        del state
        check(session)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))


def test_offload_and_prefetch(scratch: Path) -> None:
    model = lines(8)
    with tiered(model, gpu={0: 3 << 14, 1: 3 << 14}, cpu=3 << 14, disk=scratch, device="cpu") as session:
        session.offload(model)
        assert not {"gpu:0", "gpu:1"} & set(session.tier_map.values())
        session.prefetch(nn.ModuleList([model[0], model[7]]))
        for store in stores(session):
            store._background.submit(int).result()
            store.moves.settle()
        assert (session.tier_of("0.weight"), session.tier_of("7.weight")) == ("gpu:0", "gpu:1")
        check(session)


def test_report_and_timeline(scratch: Path, tmp_path: Path) -> None:
    model = lines(24)
    with tiered(model, gpu={0: 5 << 14, 1: 5 << 14}, cpu=3 << 14, disk=scratch, device="cpu") as session, torch.no_grad():
        for _ in range(6):
            model(torch.ones(1, 64))
        report = session.report()
        for word in ("gpu:0 ", "gpu:1 ", "cpu->gpu:1", "gpu:0: plan: keeps", "gpu:1: plan: keeps", "computing on cpu"):
            assert word in report
        session.timeline(tmp_path / "run.json")
        events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
        names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
        assert names == {1: "gpu:0", 2: "gpu:1"}
        copies = {(event["pid"], event["tid"]) for event in events if event["ph"] == "X" and "->" in event["tid"]}
        assert {(1, "disk->gpu:0"), (2, "disk->gpu:1")} <= copies
        assert all(name in repr(session) for name in ("gpu:0=", "gpu:1=", "cpu=", "disk=None"))


def test_a_picture_for_each_device(scratch: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with on_two(lines(8), scratch) as session:
        session.timeline(tmp_path / "run.png")
    assert {path.name for path in tmp_path.glob("*.png")} == {"run-gpu-0.png", "run-gpu-1.png"}


def test_modules_and_parameters_set_inside(scratch: Path) -> None:
    model, plain = KINDS["layers"](), KINDS["layers"]()
    plain.load_state_dict(model.state_dict())
    objects = dict(model.named_parameters())
    adapter = nn.Linear(WIDTH, WIDTH)
    with on_two(model, scratch) as session, torch.no_grad():
        model[5].adapter = adapter
        assert session.tier_of("5.adapter.weight") in ("gpu:1", "cpu", "disk")
        assert any(key.endswith("@gpu:1") for key in stores(session)[1])
        model[4].weight = model[0].weight  # of the other device
        plain[4].weight = plain[0].weight
        for _ in range(2):
            assert torch.equal(model(X), plain(X))
            assert torch.equal(model[5].adapter(X), nn.functional.linear(X, adapter.weight, adapter.bias))
        check(session)
    assert model[4].weight is model[0].weight is objects["0.weight"]
    assert torch.equal(model(X), plain(X))
    assert all("_compiled_call_impl" not in module.__dict__ for module in model.modules())


def test_several_models(scratch: Path) -> None:
    models = {"first": lines(6), "second": lines(10)}
    with tiered(models, gpu={0: 3 << 14, 1: 3 << 14}, cpu=4 << 14, disk=scratch, device="cpu") as session, torch.no_grad():
        for _ in range(2):
            for model, count in ((models["first"], 6), (models["second"], 10)):
                assert torch.equal(model(torch.ones(1, 64)), lines(count)(torch.ones(1, 64)))
        assert session.tier_map.keys() == {f"{name}.{number}.weight" for name, n in (("first", 6), ("second", 10)) for number in range(n)}
        check(session)


def test_a_backend_with_values_of_others_keeps_them(scratch: Path) -> None:
    model = lines(8)
    disk = DictBackend()
    disk.put("7.weight", torch.ones(3))
    with tiered(model, gpu={0: 1 << 14, 1: 1 << 14}, disk=disk, device="cpu"), torch.no_grad():
        assert torch.equal(model(torch.ones(1, 64)), lines(8)(torch.ones(1, 64)))
        assert torch.equal(disk.get("7.weight"), torch.ones(3))
        assert "7.weight#2" in dict(disk.entries())


# -- checkpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_from_pretrained(tmp_path: Path, scratch: Path, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "c", max_shard_size="20KB")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "c", dtype=dtype or "auto")
    before = contents(tmp_path / "c")
    part = 30_000 if dtype is None else 15_000
    model = tierstore.from_pretrained(
        LlamaForCausalLM, tmp_path / "c", gpu={0: part, 1: part}, cpu=part, disk=scratch, device="cpu", dtype=dtype
    )
    session = model.tiered
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert torch.equal(generate(model), generate(plain))
    within_budget(session)
    assert session.stats().tiers["disk"].entries == len(dict(plain.named_parameters()))
    assert not set(stores(session)[0]) & set(stores(session)[1])
    assert contents(tmp_path / "c") == before
    session.close()
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert type(a) is nn.Parameter


def test_checkpoint_in_place(tmp_path: Path, scratch: Path) -> None:
    model = lines(12)
    (tmp_path / "c").mkdir()
    save_file(model.state_dict(), tmp_path / "c" / "model.safetensors")
    with on_meta():
        empty = lines(12)
    with tiered(empty, gpu={0: 3 << 14, 1: 3 << 14}, checkpoint=tmp_path / "c", disk=scratch, device="cpu") as session, torch.no_grad():
        for _ in range(3):
            assert torch.equal(empty(torch.ones(1, 64)), model(torch.ones(1, 64)))
        empty[11].weight.mul_(2)
        model[11].weight.mul_(2)
        assert torch.equal(empty(torch.ones(1, 64)), model(torch.ones(1, 64)))
        within_budget(session)
    assert torch.equal(empty[11].weight, model[11].weight)


# -- what goes wrong ----------------------------------------------------------------------------------------------------


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    objects, values = dict(model.named_parameters()), {name: p.detach().clone() for name, p in model.named_parameters()}
    threads = set(threading.enumerate())
    yield
    assert restored(model, objects)
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert set(threading.enumerate()) <= threads


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"gpu": {}}, BackendError, r"gpu=\{\} names no device"),
    ({"gpu": {-1: "1MB"}}, BackendError, "-1, which is no index"),
    ({"gpu": {"0": "1MB"}}, BackendError, "'0', which is no index"),
    ({"gpu": {True: "1MB"}}, BackendError, "True, which is no index"),
    ({"gpu": {0: "1MB", 1: "much"}}, SizeError, r"gpu\[1\]: 'much' is not a size"),
    ({"gpu": {0: "1MB", 1: None}}, SizeError, r"gpu\[1\]: None is not a size"),
    ({"gpu": {0: "1MB", 1: 0}}, SizeError, r"gpu\[1\] is 0 bytes"),
    ({"gpu": {0: -1}}, SizeError, "cannot be negative"),
    ({"gpu": {0: "1MB", 1: "1MB"}, "cpu": "lots"}, SizeError, "'lots' is not a size"),
    ({"gpu": {0: "1MB"}, "device": "cuda:1"}, BackendError, "is one device, and gpu= names several"),
    ({"gpu": {0: "1MB"}, "device": "meta"}, BackendError, "meta"),
    ({"gpu": {0: "1MB", 1: "1MB"}, "policy": "best"}, TierStoreError, "no policy is called 'best'"),
    ({"gpu": {0: 10_000, 1: 20_000}}, BudgetError, "any operation on '0.weight' needs 16384 bytes .*'gpu:0'"),
    ({"gpu": {0: 1 << 14, 1: 1 << 14}, "cpu": 1 << 14}, BudgetError, r"from '0.weight' to '3.weight' .*'gpu:0\+cpu'"),
    ({"gpu": {0: 1 << 14, 1: 1 << 14}}, BudgetError, "add disk=PATH"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_changes_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = lines(8)
    with unchanged(model), pytest.raises(error, match=message):
        tiered(model, **{"device": "cpu"} | options)


def test_indices_without_devices() -> None:
    if torch.accelerator.is_available():
        pytest.skip("there are some here")
    with pytest.raises(BackendError, match="needs an accelerator"):
        tiered(lines(2), gpu={0: "1MB"})
    with pytest.raises(BackendError, match=r"device 0|cannot be used here"):
        tiered(lines(2), gpu={0: "1MB"}, device="cuda")


def test_a_mapping_where_there_is_one_device(scratch: Path) -> None:
    with tiered(lines(4), gpu=3 << 14, disk=scratch, device="cpu") as session, pytest.raises(TierStoreError, match="one device"):
        session.resize(gpu={0: "1MB"})


def test_a_second_device_that_fails_leaves_the_model_as_it_was(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = DeviceAttachment.attach

    def failing(self: DeviceAttachment, *args: Any) -> None:
        if self.moves.tiers[0].name == "gpu:1":
            raise OSError("no more")
        attach(self, *args)

    monkeypatch.setattr(DeviceAttachment, "attach", failing)
    model = lines(8)
    with unchanged(model), pytest.raises(OSError, match="no more"):
        tiered(model, gpu={0: 3 << 14, 1: 3 << 14}, cpu=3 << 14, disk=scratch, device="cpu")


class Counting(DictBackend):
    """A backend that counts how often it was closed, and says no to the keys of one device."""

    closed = 0

    def close(self) -> None:
        self.closed += 1
        super().close()


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_common_is_closed_once(fails: bool) -> None:
    backend, model = Counting(), lines(8)
    session = tiered(model, gpu={0: 1 << 14, 1: 1 << 14}, disk=backend, device="cpu")
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), session:
        model(torch.ones(1, 64))
        if fails:
            1 / 0  # noqa: B018
    assert backend.closed == 1
    session.close()
    assert backend.closed == 1
    assert torch.equal(model(torch.ones(1, 64)), lines(8)(torch.ones(1, 64)))


def test_the_disk_has_one_budget() -> None:
    """Six layers have to be on the disk: three of each device, which has no part of its own there."""
    model = lines(8)
    with pytest.raises(BudgetError, match=r"'gpu:0\+disk'") as caught, unchanged(model):
        tiered(model, gpu={0: 1 << 14, 1: 1 << 14}, disk=(DictBackend(), 5 << 14), device="cpu")
    assert caught.value.budget_bytes == 6 << 14
    with tiered(model, gpu={0: 1 << 14, 1: 1 << 14}, disk=(DictBackend(), 8 << 14), device="cpu") as session, torch.no_grad():
        model(torch.ones(1, 64))
        assert session.stats().tiers["disk"].budget_bytes == 8 << 14
        check(session)
        with pytest.raises(BudgetError, match="'disk'") as full:  # noqa: PT012
            for number in range(9):
                setattr(model[0], f"more_{number}", nn.Linear(64, 64, bias=False))
        assert full.value.budget_bytes == 8 << 14


def test_a_module_with_a_call_of_its_own_is_left_to_torch() -> None:
    """What was compiled has no scope; on devices that are all RAM it works as it is."""
    model = lines(4)
    model[1].compile(backend="eager")
    with tiered(model, gpu={0: 3 << 14, 1: 3 << 14}, device="cpu"), torch.no_grad():
        assert torch.equal(model(torch.ones(1, 64)), lines(4)(torch.ones(1, 64)))


def test_a_model_under_a_session_is_refused(scratch: Path) -> None:
    model = lines(8)
    with on_two(model, scratch), pytest.raises(ModelError, match="already under tiered"):
        on_two(model, scratch)


# -- ledgers ------------------------------------------------------------------------------------------------------------


def test_parts_of_a_pool() -> None:
    pool = Pool(10)
    a, b = PartLedger(pool, 6), PartLedger(pool, 6)
    assert a.reserve(6)
    assert not a.reserve(1)
    assert not b.reserve(5)
    assert b.reserve(4)
    assert (pool.used, pool.peak, a.used, b.used) == (10, 10, 6, 4)
    a.release(5)
    assert (pool.used, b.excess(3)) == (5, 1)
    assert not b.reserve(7)
    assert (pool.used, pool.peak) == (5, 10)


def test_a_pool_is_never_exceeded_by_threads() -> None:
    pool = Pool(100)
    ledgers = [PartLedger(pool, None) for _ in range(4)]

    def work(ledger: PartLedger) -> None:
        for number in range(2000):
            if ledger.reserve(number % 50):
                ledger.release(number % 50)

    assert in_threads(*[lambda ledger=ledger: work(ledger) for ledger in ledgers]) == [None] * 4
    assert pool.used == 0
    assert pool.peak <= 100


def test_pinned_memory_is_one_arena(scratch: Path) -> None:
    with on_two(lines(8), scratch) as session:
        backends = {id(store.tiers[1].backend) for store in stores(session)}
        assert len(backends) == 1
        assert type(stores(session)[0].tiers[1].backend) is type(open_backend("pinned"))
        assert nothing_leased(session)
