"""What a run takes beside its weights: the store's part of a budget follows it, and makes way when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.plainly import nbytes, nothing_leased, same, within_budget
from tests.test_stream_models import session_on
from tierstore import Tiered, tiered
from tierstore.patch.pressure import _EVERY, _PATIENCE, Pressure
from tierstore.registry import open_backend
from tierstore.store import TieredStore
from tierstore.testing import DictBackend
from tierstore.testing.fake_device import FakeDevice
from tierstore.tier import Tier

BUDGET = 3200
STEP = BUDGET // 32


class Run:
    """A store of 40 values of 100 bytes whose budget holds 32, and a device on which a run takes `taken` bytes beside it."""

    def __init__(self, budget: int | None = BUDGET, floor: int = 400) -> None:
        slow = DictBackend()
        for number in range(40):
            slow.put(str(number), torch.full((100,), number, dtype=torch.uint8))
        self.store = TieredStore([Tier("gpu", open_backend("device", "cpu"), budget), Tier("slow", slow)])
        self.taken = 0
        self.released = 0
        self.measured = 0
        self.pressure = Pressure(self.store.moves, self.allocated, self.release, lambda: floor)
        self.ledger = self.store.tiers[0].ledger
        self.pressure.begin()
        for number in range(40):
            self.store.get(str(number))

    def allocated(self) -> int:
        self.measured += 1
        return 5000 + self.ledger.used + self.taken

    def release(self) -> None:
        self.released += 1

    def look(self, taken: int, times: int = 1) -> None:
        self.taken = taken
        for _ in range(times):
            self.pressure.look()

    def check(self) -> None:
        assert self.ledger.used + self.taken <= BUDGET
        for number in range(40):
            assert torch.equal(self.store.get(str(number)), torch.full((100,), number, dtype=torch.uint8))


@pytest.fixture
def run() -> Iterator[Run]:
    made = Run()
    yield made
    made.store.close()


@pytest.mark.parametrize("taken", [1, STEP, STEP + 1, 1000, 2800])
def test_weights_leave_room_for_what_the_run_takes(run: Run, taken: int) -> None:
    assert run.ledger.used == BUDGET
    run.look(taken)
    assert taken <= run.ledger.aside < taken + STEP
    assert run.ledger.used <= BUDGET - taken
    run.check()
    stats = run.store.stats().tiers["gpu"]
    assert (stats.budget_bytes, stats.aside_bytes) == (BUDGET, run.ledger.aside)


def test_what_was_allocated_before_is_not_the_runs(run: Run) -> None:
    run.look(0, times=3)
    assert run.ledger.aside == 0


def test_it_grows_at_once_and_shrinks_slowly(run: Run) -> None:
    run.look(1000)
    for taken in (0, 500, 0) * 20:
        run.look(taken)
        assert run.ledger.aside == 1000
    run.look(1500)
    assert run.ledger.aside == 1500
    run.look(200, times=2 * _PATIENCE)
    assert run.ledger.aside == 200
    run.check()


def test_what_comes_in_every_pass_stays_left_free(run: Run) -> None:
    run.look(1000)
    for _ in range(4 * _PATIENCE // 50):
        run.look(100, times=49)
        run.look(1000)
        assert run.ledger.aside == 1000


def test_one_operation_can_always_run_and_it_is_said_that_the_budget_is_exceeded(run: Run) -> None:
    with pytest.warns(UserWarning, match=r"activations take .* it is exceeded"):
        run.look(BUDGET)
    assert run.ledger.limit == 400
    run.look(2 * BUDGET)  # said once
    for number in range(40):
        with run.store.lease(str(number)):
            assert run.ledger.used <= 400


@pytest.mark.parametrize("floor", [BUDGET, 2 * BUDGET])
@pytest.mark.filterwarnings("error")
def test_a_tier_that_only_one_operation_fits_into_is_left_alone_as_long_as_nothing_else_is_there(floor: int) -> None:
    run = Run(floor=floor)
    run.look(0, times=3)
    assert run.ledger.aside == 0
    run.store.close()


def test_what_is_in_use_leaves_when_it_can(run: Run) -> None:
    with run.store.lease(*map(str, range(8, 40))):
        run.look(1000)
        assert run.ledger.used == BUDGET
    run.look(1000)
    assert run.ledger.used <= BUDGET - 1000


def test_it_measures_now_and_then(run: Run) -> None:
    before = run.measured
    for _ in range(10 * _EVERY):
        run.pressure.tick()
    assert run.measured == before + 10


def test_an_unlimited_tier_is_left_alone() -> None:
    run = Run(budget=None)
    run.look(10**12, times=2)
    assert run.ledger.limit is None
    run.store.close()


def test_a_new_budget_begins_anew(run: Run) -> None:
    run.look(1000)
    run.store.resize("gpu", 2000)
    assert (run.ledger.aside, run.ledger.limit) == (0, 2000)
    run.look(1000)
    assert run.ledger.used <= 1000


def test_a_quarter_makes_way_when_memory_runs_out_and_does_not_come_back_at_once(run: Run) -> None:
    run.pressure.relieve(10, [])
    assert run.ledger.used == BUDGET - 800
    assert run.released == 1
    for number in range(40):
        run.store.get(str(number))
        run.look(0)
    assert run.ledger.used <= BUDGET - 800
    run.look(0, times=2 * _PATIENCE)
    assert run.ledger.aside == 0


def test_more_makes_way_where_more_is_asked_for_but_not_what_is_needed(run: Run) -> None:
    keep = [run.store.moves.entries[str(number)] for number in (8, 9, 20)]
    run.pressure.relieve(2000, keep)
    assert run.ledger.used == BUDGET - 2000
    run.pressure.relieve(10**9, keep)
    assert {key for key in run.store if run.store.tier_of(key) == "gpu"} == {"8", "9", "20"}


def test_a_tier_without_limit_gets_one_when_memory_runs_out() -> None:
    run = Run(budget=None)
    run.pressure.relieve(10, [])
    assert (run.ledger.budget, run.ledger.used) == (4000, 3000)
    assert run.ledger.limit is not None
    assert run.ledger.limit <= 3000
    run.store.close()


# -- operations that find no memory -----------------------------------------------------------------------------------

calls: list[str] = []
failures = [0]


def act(name: str) -> None:
    calls.append(name)
    if failures[0]:
        failures[0] -= 1
        raise torch.OutOfMemoryError("Tried to allocate more than there is")


@torch.library.custom_op("tierstore_tests::doubled", mutates_args=())
def doubled(weight: torch.Tensor) -> torch.Tensor:
    act("doubled")
    return weight * 2


@torch.library.custom_op("tierstore_tests::double_", mutates_args=("weight",))
def double_(weight: torch.Tensor) -> None:
    act("double_")
    weight.mul_(2)


@pytest.fixture(autouse=True)
def nothing_fails() -> Iterator[None]:
    calls.clear()
    failures[0] = 0
    yield
    failures[0] = 0


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(12))).requires_grad_(False)


def full(model: nn.Sequential, scratch: Path) -> Tiered:
    """A session whose fast tier is full."""
    session = tiered(model, gpu=8 * 4096, disk=scratch, device="cpu", policy="lru")
    for layer in model:
        layer.weight.sum()
    return session


def test_an_operation_without_memory_runs_again_after_weights_made_way(model: nn.Sequential, scratch: Path) -> None:
    expected = model[3].weight.detach() * 2
    with full(model, scratch) as session:
        ledger = session.store.tiers[0].ledger
        assert ledger.used == 8 * 4096
        failures[0] = 1
        assert torch.equal(doubled(model[3].weight), expected)
        assert calls == ["doubled", "doubled"]
        assert ledger.used <= 6 * 4096
        for layer in model:
            layer.weight.sum()
        assert ledger.used <= 6 * 4096, "it was filled again at once"
        assert nothing_leased(session)
        within_budget(session)


def test_an_operation_that_never_finds_memory_fails_like_a_plain_one(model: nn.Sequential, scratch: Path) -> None:
    with full(model, scratch) as session:
        failures[0] = 5
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            doubled(model[3].weight)
        assert calls == ["doubled", "doubled"]
        assert nothing_leased(session)
        failures[0] = 0
        assert doubled(model[3].weight).shape == (32, 32)


def test_an_operation_that_writes_is_not_run_again(model: nn.Sequential, scratch: Path) -> None:
    with full(model, scratch) as session:
        failures[0] = 1
        with pytest.raises(torch.OutOfMemoryError):
            double_(model[3].weight)
        assert calls == ["double_"]
        assert nothing_leased(session)


def test_the_memory_of_a_failed_attempt_is_free_before_the_next_one(model: nn.Sequential, scratch: Path) -> None:
    """A traceback that lives on would keep the first attempt's tensors, which have to leave."""
    gc.disable()
    try:
        with full(model, scratch) as session:
            failures[0] = 1
            doubled(model[3].weight)
            held = sum(tensor.nbytes for tensor in session.store.tiers[0].backend._tensors.values())  # type: ignore[attr-defined]
            assert held == session.store.tiers[0].ledger.used
    finally:
        gc.enable()


@pytest.mark.parametrize("grad", [True, False])
def test_fetches_without_memory_make_way_too(model: nn.Sequential, scratch: Path, grad: bool) -> None:
    """A budget beyond what the device has: found out, and lived with."""
    x = torch.ones(1, 32)
    expected = model(x)
    fake = FakeDevice(capacity=5 * 4096)
    with session_on(fake, model, scratch, gpu=nbytes(model) - 4096, cpu=False) as session, torch.set_grad_enabled(grad):
        for _ in range(4):
            assert same(model(x), expected)
        limit = session.store.tiers[0].ledger.limit
        assert limit is not None
        assert limit <= 5 * 4096
        assert nothing_leased(session)
    fake.accesses.check()
