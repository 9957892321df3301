"""Values in pieces: memory that moves under fixed addresses, pieces that stream by themselves, and that nobody sees it."""

from __future__ import annotations

import copy
import gc
import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from safetensors.torch import save_file
from torch import nn

from tests.plainly import nbytes, nothing_leased, restored, within_budget
from tierstore import FileExtent, Tier, TieredStore, on_meta, open_backend, pieces, tiered
from tierstore.backends import _spans
from tierstore.backends._spans import UNIT, Place, Spans, reserve
from tierstore.backends._units import Units
from tierstore.backends.ram import RamBackend
from tierstore.patch.stored import DividedSource
from tierstore.patch.tensor import TieredTensor
from tierstore.pieces import piece_bytes
from tierstore.planning import plan as planning
from tierstore.planning.schedule import FROM_FILES
from tierstore.running import Tiered
from tierstore.spec import TensorSpec

MIB = 1 << 20


# -- memory that moves ----------------------------------------------------------------------------------------------------


class UnitsAgainstSets(RuleBasedStateMachine):
    """Each address is live, warm or cold; whatever has memory got it by a move or by a touch, and never twice."""

    def __init__(self) -> None:
        super().__init__()
        self.units = Units(1)
        self.live: dict[int, int] = {}
        self.backed: set[int] = set()

    @rule(start=st.integers(0, 20), size=st.integers(1, 5))
    def take(self, start: int, size: int) -> None:
        wanted = range(start * 5, start * 5 + size)
        if start * 5 in self.live:
            return
        warm = self.backed - self.in_use()
        moves = self.units.take(wanted.start, wanted.stop)
        moved = [(move.source + i, move.target + i) for move in moves for i in range(move.nbytes)]
        cold = [address for address in wanted if address not in warm]
        assert len(moved) == min(len(cold), len(warm - set(wanted))), "memory was left lying about while pages were fetched anew"
        for source, target in moved:
            assert source in warm
            assert target in cold
            self.backed.remove(source)
            self.backed.add(target)
        self.live[start * 5] = size
        self.backed |= set(wanted)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(sorted(self.live)))
        self.units.give(start, start + self.live.pop(start), None)

    @rule(excess=st.integers(-1, 8))
    def cool(self, excess: int) -> None:
        warm = self.backed - self.in_use()
        for move in self.units.cool(excess):
            assert move.source == move.target
            self.backed -= set(range(move.source, move.source + move.nbytes))
        assert len(warm) - len(self.backed - self.in_use()) == min(len(warm), max(0, excess))

    @invariant()
    def it_counts(self) -> None:
        assert self.units.live == len(self.in_use())
        assert self.units.warm == len(self.backed - self.in_use())

    def in_use(self) -> set[int]:
        return {start + i for start, size in self.live.items() for i in range(size)}


TestUnits = UnitsAgainstSets.TestCase
TestUnits.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def resident_bytes(start: int, size: int) -> int:
    """Bytes of memory that the system has behind addresses of this process."""
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(start // 4096 * 8)
        entries = pages.read(size // 4096 * 8)
    return sum(entry >> 7 for entry in entries[7::8]) * 4096


@pytest.mark.parametrize("can_move", [True, False])
def test_memory_goes_where_it_is_needed_and_nothing_live_is_touched(can_move: bool) -> None:
    rng, spans = random.Random(0), Spans()
    if not can_move:
        spans._system._mremap = None
    memories = [reserve(8 * UNIT) for _ in range(3)]
    places = [Place(memory.numpy(), start * UNIT, 2 * UNIT) for memory in memories for start in (0, 2, 4, 6)]
    there: dict[int, torch.Tensor] = {}
    for step in range(200):
        number = rng.randrange(len(places))
        if number in there:
            del there[number]
        elif len(there) < 3:
            there[number] = spans.fill(places[number]).fill_(number + step)
            there[number][0] = number
        spans.cool(spans.held - 3 * 2 * UNIT)
        for other, tensor in there.items():
            assert tensor[0] == other
            assert (tensor[1:] == tensor[1]).all()
            place = places[other]
            assert torch.equal(torch.from_numpy(place.memory)[place.start : place.start + place.nbytes], tensor), "the whole shows it"
    assert spans.live == len(there) * 2 * UNIT
    assert sum(resident_bytes(memory.data_ptr(), 8 * UNIT) for memory in memories) <= 3 * 2 * UNIT
    if can_move:
        assert spans._system._mremap is not None, "this kernel should be able to move memory"


def test_addresses_stay_while_free_memory_is_left_in_them() -> None:
    spans, memory = Spans(), reserve(UNIT)
    spans.fill(Place(memory.numpy(), 0, UNIT)).fill_(7)
    del memory
    gc.collect()
    other = reserve(UNIT)
    assert (spans.live, spans.held) == (UNIT, UNIT)  # seen by the next call
    tensor = spans.fill(Place(other.numpy(), 0, UNIT))
    assert (spans.live, spans.held) == (UNIT, UNIT), "the memory of what is gone was not used again"
    assert tensor.fill_(1).sum() == UNIT


def test_so_many_addresses_that_the_system_refuses() -> None:
    with pytest.raises(MemoryError, match="refuses"):
        reserve(1 << 60)


def test_a_backend_holds_no_more_than_its_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divided values and others share what is kept for later."""
    backend = RamBackend()
    memory = backend.reserve(16 * MIB)
    backend.place(memory, {"a": 8 * MIB, "b": 8 * MIB})
    spec = TensorSpec(torch.uint8, (8 * MIB,), (1,))
    for _ in range(3):
        for keys in (("a", "b"), ("c", "d"), ("a", "d")):
            for key in keys:
                backend.adopt(key, backend.allocate(key, spec).fill_(1))
            assert backend._arena.held_bytes + backend._spans.held <= 16 * MIB + 8 * MIB
            for key in keys:
                backend.delete(key)
    assert memory.data_ptr() == backend._places["a"].address
    backend.trim()
    assert backend._arena.held_bytes + backend._spans.held == 0


def test_what_has_gone_unseen_makes_the_most_of_a_backend_no_larger() -> None:
    backend = RamBackend()
    memory = backend.reserve(16 * MIB)
    backend.place(memory, {"a": 8 * MIB, "b": 8 * MIB})
    small = [backend.allocate(str(number), TensorSpec(torch.uint8, (MIB,), (1,))).fill_(1) for number in range(16)]
    del small
    large = [backend.allocate(key, TensorSpec(torch.uint8, (8 * MIB,), (1,))).fill_(1) for key in ("a", "b")]
    assert backend._arena.held_bytes + backend._spans.held == 16 * MIB
    del large


def test_what_is_adopted_from_elsewhere_is_copied_into_its_place() -> None:
    backend = RamBackend()
    memory = backend.reserve(16 * MIB)
    backend.place(memory, {"a": 8 * MIB, "b": 8 * MIB})
    for key, fill in (("a", 3), ("b", 5)):
        backend.adopt(key, torch.full((8 * MIB,), fill, dtype=torch.uint8))
    assert (memory[: 8 * MIB] == 3).all()
    assert (memory[8 * MIB :] == 5).all()
    backend.close()


def test_completing_maps_files_and_copies_tensors(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4096) + bytes([9]) * 8 * MIB)
    backend = RamBackend()
    memory = backend.reserve(32 * MIB)
    backend.place(memory, dict.fromkeys("abcd", 8 * MIB))
    backend.adopt("a", backend.allocate("a", TensorSpec(torch.uint8, (8 * MIB,), (1,))).fill_(1))
    backend.adopt("b", backend.allocate("b", TensorSpec(torch.uint8, (8 * MIB,), (1,))).fill_(2))
    backend.delete("b")  # leaves free memory where something else is put now
    here = torch.full((8 * MIB,), 4, dtype=torch.uint8)
    unaligned = FileExtent(str(file), 4097, 8 * MIB - 1)
    backend.complete(memory, {8 * MIB: FileExtent(str(file), 4096, 8 * MIB), 16 * MIB: here, 24 * MIB: unaligned})
    assert [int(memory[i * 8 * MIB]) for i in range(4)] == [1, 9, 4, 9]
    assert int(memory[16 * MIB - 1]) == 9
    backend.close()
    file.unlink()
    assert [int(memory[i * 8 * MIB + 5]) for i in range(4)] == [1, 9, 4, 9], "it is the caller's now, for good"


# -- models ---------------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """A few layers of 8 to 10 MiB and an embedding of 8 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4096, 512)
        self.layers = nn.Sequential(nn.Linear(512, 5120), nn.ReLU(), nn.Linear(5120, 512), nn.Tanh(), nn.Linear(512, 4096))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embed(ids))


IDS = torch.arange(6).reshape(2, 3)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RamBackend, "piece_bytes", UNIT)
    monkeypatch.setattr("tierstore.patch.lookup.LARGE", 1 << 40)


def sources(model: nn.Module) -> list[DividedSource]:
    found = [getattr(tensor, "_source", None) for tensor in model.parameters()]
    return [source for source in found if isinstance(source, DividedSource)]


@pytest.mark.parametrize("policy", ["lru", "auto"])
@pytest.mark.parametrize("share", [0.45, 0.6, 0.9])
@pytest.mark.parametrize("middle", [None, "6MiB"])
@pytest.mark.usefixtures("small_pieces")
def test_a_model_in_pieces_equals_the_plain_one(policy: str, share: float, middle: str | None, scratch: Path) -> None:
    torch.manual_seed(0)
    plain = Wide()
    model = copy.deepcopy(plain)
    objects = dict(model.named_parameters())
    budget = int(nbytes(model) * share)
    tiers = {"cpu": budget} if middle is None else {"gpu": budget, "cpu": middle}
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, model)]
    with tiered(model, disk=scratch, device="cpu", policy=policy, **tiers) as session:  # type: ignore[arg-type]
        assert len(sources(model)) == 4
        with torch.no_grad():
            for _ in range(6):
                assert torch.equal(model(IDS), plain(IDS))
        partly = [len({entry.resident for entry in source.stored}) == 2 for source in sources(model)]
        assert any(partly), "no value is resident in part"
        for _ in range(2):
            for m, optimizer in zip((plain, model), optimizers, strict=True):
                optimizer.zero_grad()
                m(IDS).square().sum().backward()
                optimizer.step()
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(model(IDS), plain(IDS))
        for name, value in model.state_dict().items():
            assert torch.equal(torch.as_tensor(value), plain.state_dict()[name]), name
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        within_budget(session)
        session.offload(model.layers[2])
        assert session.tier_of("layers.2.weight") != next(iter(tiers))
        held = session.store.tiers[0].backend
        assert isinstance(held, RamBackend)
        assert held._arena.held_bytes + held._spans.held <= budget + 4 * UNIT, "a huge page at the end of each value"
    assert nothing_leased(session)
    assert restored(model, objects)
    file.seek(0)
    assert all(torch.equal(a, b) for a, b in zip(torch.load(file).values(), plain.state_dict().values(), strict=True))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    with torch.no_grad():
        model.layers[0].weight.mul_(2)  # writable, and its own memory
        assert torch.equal(model.layers[0].weight, plain.layers[0].weight * 2)


@pytest.mark.parametrize(
    ("budget", "mebibytes"), [(None, 8), (0, 8), (100 * MIB, 8), (128 * MIB, 16), (150 * MIB, 16), (256 * MIB, 32), (1 << 40, 32)]
)
def test_pieces_are_large_where_there_is_room(budget: int | None, mebibytes: int) -> None:
    """Twice as large at most where most of each value streams."""
    assert piece_bytes(RamBackend(), budget, 2 * (budget or 0) + 1) == mebibytes * MIB
    assert piece_bytes(RamBackend(), budget, 2 * (budget or 0)) == min(mebibytes, 16) * MIB


def test_a_piece_is_as_large_as_what_may_be_on_its_way() -> None:
    """Smaller ones need more transfers and no smaller ring, larger ones a larger ring."""
    assert pieces._SHARE == planning._AHEAD_SHARE
    assert FROM_FILES.ahead_bytes == pieces._LARGEST


def layers_in_pieces(scratch: Path, checkpoint: Path | None, share: float) -> tuple[nn.Sequential, Tiered]:
    """Return eight layers of two pieces each, and a session over them that has room for a share of their bytes."""
    model = nn.Sequential(*(nn.Linear(*width, bias=False) for width in ((1024, 1000), (1000, 1024)) * 4))
    budget = int(nbytes(model) * share)
    if checkpoint is None:
        session = tiered(model, cpu=budget, disk=scratch, device="cpu")
    else:
        save_file(model.state_dict(), checkpoint)
        with on_meta():
            model = nn.Sequential(*(nn.Linear(*width, bias=False) for width in ((1024, 1000), (1000, 1024)) * 4))
        session = tiered(model, checkpoint=checkpoint, cpu=budget, device="cpu")
    assert [len(source.stored) for source in sources(model)] == [2] * 8
    return model, session


@torch.no_grad()
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_what_stays_is_handed_out_in_however_many_pieces_it_lies(scratch: Path, tmp_path: Path, checkpoint: bool) -> None:
    """They count as one reference to the memory of the whole, or it would look as if somebody used it all the time."""
    model, session = layers_in_pieces(scratch, None if not checkpoint else tmp_path / "model.safetensors", 0.8)
    with session:
        for _ in range(8):
            model(torch.ones(1, 1024))
        kept = [dict.__getitem__(layer._parameters, "weight")._kept for layer in model]
        assert sum(plain is not None for plain in kept) >= 2


@torch.no_grad()
@pytest.mark.usefixtures("small_pieces")
def test_large_pieces(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Wide()
    model = copy.deepcopy(plain)
    budget = int(nbytes(model) * 0.6)
    monkeypatch.setattr("tierstore.pieces._SHARE", budget // (3 * UNIT))
    with tiered(model, cpu=budget, disk=scratch, device="cpu") as session:
        assert [[entry.nbytes // UNIT for entry in source.stored] for source in sources(model)] == [[3, 1], [3, 2], [3, 2], [3, 1]]
        for _ in range(6):
            assert torch.equal(model(IDS), plain(IDS))
        within_budget(session)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


@torch.no_grad()
@pytest.mark.usefixtures("small_pieces")
def test_what_is_referred_to_stays_where_it_is(scratch: Path) -> None:
    """Pieces that leave take the memory out from under the whole: never while somebody can look at it."""
    model, kept = Wide(), []
    expected = model.layers[0].weight.detach().clone()
    model.layers[0].register_forward_pre_hook(lambda module, args: kept.append(module.weight.t()[3:5]))
    with tiered(model, cpu=int(nbytes(model) * 0.6), disk=scratch, device="cpu") as session:
        for _ in range(4):
            model(IDS)
        session.offload(model)
        assert session.tier_of("layers.0.weight") == "cpu"
        assert all(torch.equal(view, expected.t()[3:5]) for view in kept)
        kept.clear()
        model.layers[0]._forward_pre_hooks.clear()
        model(IDS)
        session.offload(model)
        assert session.tier_of("layers.0.weight") == "disk"


@torch.no_grad()
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("take", [lambda weight: weight, lambda weight: weight.t()[3:5]], ids=["weight", "view"])
def test_one_reference_is_enough_to_keep_pieces_where_they_are(
    scratch: Path, tmp_path: Path, checkpoint: bool, take: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model, session = layers_in_pieces(scratch, None if not checkpoint else tmp_path / "model.safetensors", 0.6)
    kept: list[torch.Tensor] = []
    with session:
        model(torch.ones(1, 1024))
        hook = model[0].register_forward_pre_hook(lambda module, args: kept.append(take(module.weight)))
        model(torch.ones(1, 1024))
        hook.remove()
        assert type(kept[0]) is not TieredTensor
        expected = kept[0].clone()
        session.offload(model)
        assert session.tier_of("0.weight") == "cpu"
        assert {session.tier_of(f"{number}.weight") for number in range(1, 8)} == {"disk"}
        for _ in range(3):
            model[1:](torch.ones(1, 1000))
        assert torch.equal(kept[0], expected)
        kept.clear()
        session.offload(model)
        assert session.tier_of("0.weight") != "cpu"


@torch.no_grad()
@pytest.mark.usefixtures("small_pieces")
def test_a_write_to_the_whole_reaches_every_piece(scratch: Path) -> None:
    model = Wide()
    with tiered(model, cpu=int(nbytes(model) * 0.6), disk=scratch, device="cpu") as session:
        model.layers[2].weight.fill_(0.5)
        session.offload(model)
        assert (model.layers[2].weight == 0.5).all()
        hook = model.layers[2].register_forward_pre_hook(lambda module, args: (module.weight.add_(0.5), None)[1])
        for _ in range(3):
            model(IDS)
        hook.remove()
        session.offload(model)
        assert (model.layers[2].weight == 2.0).all()
    assert (model.layers[2].weight == 2.0).all()


@torch.no_grad()
def test_rows_of_a_divided_value_are_read_where_they_lie(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RamBackend, "piece_bytes", UNIT)
    table, other = nn.Embedding(4096, 512), nn.Linear(1024, 1024)
    rows = torch.tensor([[0, 1023, 1024], [4095, 0, 2048]])
    expected = table(rows)
    with tiered([other, table], cpu=9 * MIB, disk=scratch, device="cpu") as session:
        assert isinstance(table.weight._source, DividedSource)
        assert {entry.resident for entry in table.weight._source.stored} == {True, False}, "some rows are in RAM, others on the disk"
        moved = session.stats().links["disk->cpu"].bytes
        for _ in range(3):
            assert torch.equal(table(rows), expected)
            assert torch.equal(table.weight.index_select(0, rows[1]), expected[1])
        assert session.stats().links["disk->cpu"].bytes - moved == 3 * (2 + 2) * 2048
        table.weight[1023] = 7
        assert (table(rows)[0, 1] == 7).all()
        with pytest.raises(IndexError):
            table(torch.tensor([4096]))


def test_a_deleted_value_gives_its_places_back(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RamBackend, "piece_bytes", UNIT)
    model = Wide()
    with tiered(model, cpu=int(nbytes(model) * 0.6), disk=scratch, device="cpu") as session:
        backend = session.store.tiers[0].backend
        assert isinstance(backend, RamBackend)
        places, keys = len(backend._places), len(session.store)
        for fill in range(3):
            model.layers[0].weight.data = torch.full((5120, 512), float(fill))
            gc.collect()
            assert torch.equal(model.layers[0](torch.ones(1, 512)), torch.full((1, 5120), 512.0 * fill) + model.layers[0].bias)
        assert (len(backend._places), len(session.store)) == (places, keys)


def test_a_store_alone_divides_nothing() -> None:
    with TieredStore([Tier("ram", open_backend("ram"), 64 * MIB)]) as store:
        store.put("k", torch.ones(32 * MIB, dtype=torch.uint8))
        assert list(store) == ["k"]
        assert (store.get("k") == 1).all()


def test_without_a_kernel_that_moves_memory_it_still_works(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_spans.sys, "platform", "other")
    monkeypatch.setattr(RamBackend, "piece_bytes", UNIT)
    model = Wide()
    with torch.no_grad():
        expected = model(IDS)
        with tiered(model, cpu=int(nbytes(model) * 0.6), disk=scratch, device="cpu"):
            for _ in range(4):
                assert torch.equal(model(IDS), expected)


@torch.no_grad()
def test_a_table_of_which_only_rows_are_used_does_not_stay(scratch: Path) -> None:
    """Counted as a whole it would displace what is computed with on every pass."""
    table, body = nn.Embedding(2048, 1024), nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4)))
    ids = torch.tensor([[5, 9]])
    expected = body(table(ids))
    with tiered([table, body], cpu=22 * MIB, disk=scratch, device="cpu") as session:
        for _ in range(8):
            assert torch.equal(body(table(ids)), expected)
        session.store.moves.settle()
        assert {session.tier_of(f"1.{i}.weight") for i in range(4)} == {"cpu"}
        assert session.tier_of("0.weight") == "disk", "not all of it fits beside what is computed with"
        before = session.stats().links["disk->cpu"].bytes
        body(table(ids))
        assert session.stats().links["disk->cpu"].bytes - before <= 2 * 4096
