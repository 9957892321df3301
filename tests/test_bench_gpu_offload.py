"""bench/gpu_offload.py without a GPU: arithmetic, verdicts, tables, the order of things, and tiny runs on CPU tensors."""

from __future__ import annotations

import io
import json
import math
import sys
from collections import deque
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu_child
import gpu_models
import gpu_study
import gpu_three
from gpu_ceilings import Ceilings, measure_links
from gpu_child import ACTIONS, LATER_WARM_UPS, MOST_PASSES, passes_of, told_of
from gpu_contenders import CONTENDERS, PEERS, QUICK, Contender, FlexTensor, Mmgp, Task, Way
from gpu_device import CpuDevice, CudaDevice, copied_bytes, device_called, driver_facts
from gpu_models import DecoderShape, DenoiserShape, Shape, fill, layer_by_layer, made, pool_on, shape_from
from gpu_offload import main, parse_options
from gpu_results import Results
from gpu_rows import Row, TierRow
from gpu_study import MARGIN, Deadline, Plan, Study
from gpu_tables import model_table, tier_table
from gpu_three import Tiers, run_tiers
from offload_children import Fate
from offload_contenders import UnableError
from rich.console import Console
from turns import turned

CPU = torch.device("cpu")
TINY = DecoderShape(3, 256, 4, 512)
TINY_DIT = DenoiserShape(2, 256, 4)
GB = 10**9
LINKS = {"h2d": [(1, 1.0), (2, 2.0 * GB)], "d2h": [(1, 1.0), (2, 1.0)], "both": [(1, 1.0), (2, 1.0)]}
NAMES = ["plain", "tierstore", "mmgp", "flextensor"]


def told(seconds: float, digest: str = "a", beside: str = "", **more: Any) -> dict[str, Any]:
    return {"seconds": seconds, "digest": digest, "beside": beside, "links": {}, "rings": [], "peaks": {}} | more


def row(**changes: Any) -> Row:
    """16 GB, of which half may stay: 8 GB at 2 GB/s are 4 s; tierstore moves 8.5 GB through a ring of 1 GB in 4.2 s."""
    ours = {"links": {"cpu->gpu": 8.5 * GB, "gpu->cpu": 5.0}, "rings": [GB], "peaks": {"allocated": 8 * GB}}
    passes = {
        "plain": [told(s) for s in (0.9, 1.0, 5.0)],
        "tierstore": [told(4.2, **ours), told(4.0, beside="mmgp", **ours), told(4.4, beside="flextensor", **ours)],
        "mmgp": [told(8.0, beside="mmgp", peaks={"allocated": 9 * GB})],
        "flextensor": [told(5.5, beside="flextensor", digest="b")],
    }
    given = {"passes": passes, "fates": {"diffusers-leaf": "OOM"}, "differences": {"flextensor": 1e-3}, "digest": "a"}
    sizes = {"budget": 8 * GB, "cap": 9 * GB, "touched": 16 * GB, "pair": 2 * GB, "rate": 2.0 * GB}
    return Row(model="decoder", percent=50, tokens=1, **(sizes | given | changes))


def tier_row(**changes: Any) -> TierRow:
    """40 GB over 8 and 16: 32 GB at 50 GB/s, 16 GB at 4 GB/s."""
    moved = told(4.4, links={"cpu->gpu": 30.0 * GB, "disk->gpu": 4.0 * GB, "disk->cpu": 14.0 * GB}, rings=[GB, 2 * GB])
    sizes = {"touched": 40 * GB, "gpu": 8 * GB, "cpu": 16 * GB, "total": 41 * GB, "pair": 2 * GB}
    rates = {"rate": 50.0 * GB, "disk_rate": 4.0 * GB}
    rest = {"tokens": 1, "compute": 0.02, "digest": "a", "told": [moved]}
    return TierRow(**(rest | sizes | rates | changes))


def text_of(*things: Any) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(*things)
    return console.export_text()


class LocalChild:
    """Does a child's work in this process, and breaks where `failing` says."""

    failing: ClassVar[dict[tuple[str, str], Fate]] = {}  # by contender (and way) and wish
    started: ClassVar[list[Task]] = []

    def __init__(self, task: Task, patience: float = 0.0) -> None:
        self.task = Task.loads(task.dumps())
        LocalChild.started.append(self.task)
        self._wishes: deque[str] = deque()
        self._answers: Iterator[dict[str, Any]] = ACTIONS[task.action](self.task, CpuDevice(), iter(self._wishes.popleft, None))

    def ask(self, wish: str) -> dict[str, Any]:
        for name in (self.task.contender, f"{self.task.contender}/{self.task.way}"):
            if (name, wish.split()[0]) in self.failing:
                raise self.failing[name, wish.split()[0]]
        self._wishes.append(wish)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(json.dumps(next(self._answers)))
        except Exception as error:
            failure = told_of(error)
            raise Fate(failure["short"], failure["error"]) from error
        return answer

    def close(self) -> None:
        self._answers.close()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_models, "POOL", 1_000_003)  # made in a moment; a prime as well


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> type[LocalChild]:
    """Children without processes, and turns of two passes."""
    monkeypatch.setattr(LocalChild, "failing", {})
    monkeypatch.setattr(LocalChild, "started", [])
    for module in (gpu_study, gpu_three):
        monkeypatch.setattr(module, "GpuChild", LocalChild)
    monkeypatch.setattr(gpu_child, "TURN_SECONDS", 0.0)
    return LocalChild


def study(place: Path, peers: tuple[str, ...] = (), deadline: Deadline | None = None, shape: Shape = TINY) -> tuple[Study, list[str]]:
    plan = Plan(shape, (1, 8), (50,), 2, "cpu", str(place), peers)
    results, said = Results(["plain", "tierstore", *peers], ceilings=Ceilings(**LINKS)), []
    return Study(plan, results, deadline or Deadline(None), said.append, lambda: None), said


# -- models -------------------------------------------------------------------------------------------------------------


def test_sizes_are_those_asked_for() -> None:
    full = parse_options([])
    decoder, denoiser = DecoderShape(*full.decoder), DenoiserShape(*full.dit)
    assert 15.5 * GB < decoder.bytes < 16.5 * GB
    assert 8 * GB < denoiser.bytes < 8.5 * GB
    assert abs(decoder.of_bytes(full.tiers_size).bytes - 40 * GB) < 0.3 * GB
    smallest = decoder.bytes * 10 // 100
    assert decoder.pair < smallest / 2
    assert denoiser.pair < denoiser.bytes * 10 // 100 / 2


def test_a_pass_touches_the_rows_of_its_ids_only() -> None:
    table = TINY.vocabulary * TINY.width * 2
    assert TINY.touched(8) == TINY.bytes - table + 8 * TINY.width * 2
    assert TINY_DIT.touched(8) == TINY_DIT.bytes


def test_the_largest_pair_leaves_out_tables() -> None:
    assert TINY.pair == 2 * TINY.hidden * TINY.width * 2  # up and down
    wide = DecoderShape(1, 256, 4, 2048)
    assert wide.pair == (wide.hidden + wide.vocabulary) * wide.width * 2  # down and the head


@pytest.mark.parametrize("shape", [TINY, TINY_DIT])
def test_a_shape_survives_json(shape: Shape) -> None:
    assert shape_from(json.loads(json.dumps(shape.told()))) == shape
    assert sum(p.nbytes for p in made(shape, CPU).parameters()) == shape.bytes


def test_weights_are_always_the_same_and_all_different() -> None:
    model, again = made(TINY, CPU), made(TINY, CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    heads = {p.flatten()[:64].float().numpy().tobytes() for p in model.parameters()}
    assert len(heads) == len(list(model.parameters()))
    rows = model.get_submodule("lm_head").weight
    assert len({r.float().numpy().tobytes() for r in rows}) == len(rows)


def test_a_block_alone_has_its_weights() -> None:
    model, block = made(TINY, CPU), TINY.skeleton().get_submodule("model.layers.1").to_empty(device="cpu")
    fill(block, pool_on(CPU), "model.layers.1")
    assert torch.equal(block.get_parameter("mlp.up_proj.weight"), model.get_parameter("model.layers.1.mlp.up_proj.weight"))
    assert block.get_parameter("input_layernorm.weight").mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("tokens", [1, 8])
def test_layer_by_layer_is_the_whole_model(tokens: int) -> None:
    with torch.no_grad():
        whole = TINY.run(made(TINY, CPU), TINY.given(tokens, CPU))
    output, seconds = layer_by_layer(TINY, tokens, CPU, lambda: None)
    assert torch.equal(output, whole)
    assert seconds > 0


def test_the_denoiser_takes_steps() -> None:
    given = TINY_DIT.given(8, CPU)
    calls = []
    output = TINY_DIT.run(lambda x, moment: calls.append(moment.item()) or torch.zeros_like(x), given)
    assert calls == [512.0, 384.0, 256.0, 128.0]
    assert torch.equal(output, given)
    with torch.no_grad():
        assert TINY_DIT.run(made(TINY_DIT, CPU), given).isfinite().all()


# -- arithmetic ---------------------------------------------------------------------------------------------------------


def test_the_bound_is_the_longer_of_computing_and_the_link() -> None:
    assert row().missing == 8 * GB
    assert row().resident == 1.0
    assert (row().link, row().bound, row().limit) == (4.0, 4.0, "link")
    fast = row(rate=80.0 * GB)
    assert (fast.link, fast.bound, fast.limit) == (0.1, 1.0, "compute")
    assert row(budget=17 * GB).missing == 0


def test_the_ring_is_the_plans_but_no_excuse() -> None:
    assert row().ring == GB
    assert row(pair=GB // 2).ring == GB // 2
    assert row(budget=GB // 4).ring == GB // 4
    assert row(passes={}).ring == 2 * GB


def test_bytes_are_counted_by_whom_there_is() -> None:
    assert row().moved("tierstore") == 8.5 * GB
    assert math.isnan(row().moved("mmgp"))
    assert row(traffic={"mmgp": {"h2d": 9.0}}).moved("mmgp") == 9.0
    assert row().byte_ratio("tierstore") == pytest.approx(8.5 / 9)
    assert row().bytes_met("tierstore")  # 8.5 <= 1.05 * 8 + 1
    assert not row(budget=9 * GB).bytes_met("tierstore")  # 8.5 > 1.05 * 7 + 1
    assert not row().bytes_met("mmgp")  # nobody knows


def test_time_is_judged_by_what_sets_the_bound() -> None:
    assert row().time_met("tierstore")  # 4.2 <= 1.1 * 4
    assert not row(rate=2.2 * GB).time_met("tierstore")
    assert not row(rate=80.0 * GB).time_met("tierstore")
    hidden = row(rate=80.0 * GB)
    hidden.passes["tierstore"] = [told(1.019)]
    assert hidden.time_met("tierstore")
    assert not row(passes={"plain": [told(1.0)]}).time_met("tierstore")


def test_rivals_are_compared_in_the_turns_they_shared() -> None:
    assert row().rivals() == {"mmgp": 2.0, "flextensor": 1.25}
    assert row().best_rival() == ("flextensor", 1.25)
    assert row(differences={"flextensor": 0.5}).best_rival() == ("mmgp", 2.0)
    assert row(cap=8 * GB).best_rival() == ("flextensor", 1.25)  # mmgp took more memory
    assert row(passes={"plain": [told(1.0)]}).best_rival() is None


def test_outputs_are_equal_close_or_wrong() -> None:
    assert row().output("tierstore") == "equal"
    assert row().output("flextensor") == "within 1e-03"
    assert row(differences={"flextensor": 0.25}).output("flextensor") == "WRONG by 0.25"
    assert row(differences={"flextensor": None}).output("flextensor") == "WRONG"
    assert row().output("accelerate-cpu") == "-"


def test_three_tiers_are_bound_by_their_slowest_link() -> None:
    assert tier_row().parts == {"compute": 0.02, "cpu->gpu": 0.64, "disk->cpu": 4.0}
    assert (tier_row().bound, tier_row().limit) == (4.0, "disk->cpu")
    assert tier_row(disk_rate=None).limit == "cpu->gpu"
    assert tier_row().byte_ratio("cpu->gpu") == pytest.approx(34 / 33)  # what skips the RAM counts for both
    assert tier_row().byte_ratio("disk->cpu") == pytest.approx(18 / 18)
    assert tier_row().equal
    assert not tier_row(digest="b").equal
    assert not tier_row(told=[]).equal


def test_turns_alternate() -> None:
    assert [turned(["a", "b", "c"], r) for r in range(3)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_short_passes_are_repeated() -> None:
    assert [passes_of(s) for s in (0.001, 0.1, 0.3, 0.9, 2.0)] == [MOST_PASSES, 4, 2, 2, 1]


def test_caps_are_budget_and_allowance() -> None:
    task = Task("run", "tierstore", TINY, "cpu", "/x", (1, 8), budget=1000, allowances={1: 5, 8: 70})
    assert (task.cap(1), task.cap(8), task.cap()) == (1005, 1070, 1070)
    assert Task.loads(task.dumps()) == task


def test_the_profilers_copies_are_added_up() -> None:
    events = [
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "args": {"bytes": 100}},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "args": {"bytes": 20}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)", "args": {"bytes": 3}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "args": {"bytes": 1000}},
        {"cat": "kernel", "name": "gemm"},
        {"name": "process_name"},
    ]
    assert copied_bytes({"traceEvents": events}) == {"h2d": 120, "d2h": 3}
    assert copied_bytes({"traceEvents": events[4:]}) == {}


def test_a_cap_is_a_share_of_the_devices_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    device = object.__new__(CudaDevice)
    device.limit(20 * GB)
    device.limit(100 * GB)
    assert shares == [0.25, 1.0]


def test_the_driver_is_asked_for_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.1, 5, 16, 5, 16'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert driver_facts(0) == {"driver": "580.1", "PCIe": "generation 5 x16 (at most 5 x16)"}
    program.write_text("#!/bin/sh\nexit 9\n")
    assert driver_facts(0) == {"driver": "unknown"}
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_facts(0) == {"driver": "unknown"}


def test_links_are_measured_each_way() -> None:
    found = measure_links(device_called("cpu"), 4 << 20)
    assert [chunk for chunk, _ in found.h2d] == [1 << 20, 4 << 20]
    assert all(rate > 0 for pairs in (found.h2d, found.d2h, found.both) for _, rate in pairs)
    assert found.best == max(rate for _, rate in found.h2d)
    assert "torch" in found.facts


# -- tables and files ---------------------------------------------------------------------------------------------------


def test_the_table_has_every_contender_and_every_verdict() -> None:
    text = text_of(model_table("decoder", [row()], [*NAMES, "diffusers-leaf"]))
    assert "bound 4.0000 s: link" in text
    assert "1.05 ok" in text  # 4.2 s over the bound
    assert "0.94 ok" in text  # bytes
    assert "1.25x flextensor ok" in text
    assert "OOM" in text
    assert "within 1e-03" in text
    worse = text_of(model_table("decoder", [row(rate=4.0 * GB, digest="b")], NAMES))
    assert "2.10 missed" in worse
    assert "WRONG missed" in worse


def test_the_table_of_three_tiers() -> None:
    text = text_of(tier_table([tier_row(), tier_row(tokens=2048, told=[], fate="OOM")]))
    assert "1.10" in text
    assert "disk->cpu" in text
    assert "equal ok" in text
    assert "OOM" in text


def test_results_survive_json(tmp_path: Path) -> None:
    results = Results(NAMES, {"decoder, 1 tokens": 5}, Ceilings(disk=[1.0], **LINKS), [row()], [tier_row()], ["a [note]"])
    results.write(tmp_path / "r.json")
    back = Results.read(tmp_path / "r.json")
    assert back == results
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    console = Console(width=250, record=True, file=io.StringIO())
    back.show(console)
    text = console.export_text()
    assert "1.25x flextensor" in text
    assert "a [note]" in text


def test_presets_fill_in_what_is_not_given() -> None:
    full, quick = parse_options([]), parse_options(["--quick", "--budgets", "25"])
    tiny = parse_options(["--tiny", "--device", "cpu"])
    assert full.budgets == [10, 25, 50, 75, 90]
    assert full.contenders == list(PEERS)
    assert (quick.budgets, quick.tokens, quick.minutes, quick.contenders) == ([25], [1, 2048], 9.0, list(QUICK))
    assert quick.only == ["decoder", "tiers"]
    assert DecoderShape(*tiny.decoder).bytes < 20 << 20
    assert tiny.tiers_gpu + tiny.tiers_cpu < DecoderShape(*tiny.decoder).of_bytes(tiny.tiers_size).bytes


# -- contenders ---------------------------------------------------------------------------------------------------------


def test_who_cannot_run_is_named_with_the_way_out() -> None:
    class Absent(CONTENDERS["mmgp"]):
        modules, install = ("no_such_module_here",), "no-such-package"

    assert Absent.missing("cuda") == "not installed: pip install no-such-package"
    for kind in (Mmgp, FlexTensor):
        assert kind.missing("cpu")
    assert not CONTENDERS["tierstore"].missing("cpu")
    assert set(QUICK) <= set(PEERS) == set(CONTENDERS) - {"plain", "tierstore"}


def test_less_is_told_after_the_whole_budget() -> None:
    ways = CONTENDERS["mmgp"].ways
    assert [way.share for way in ways] == sorted((way.share for way in ways), reverse=True)
    assert ways[0].share == 1.0
    assert Way(0.9, "x").story == "told 90% of the budget, x"


def test_failures_get_a_short_name() -> None:
    assert told_of(torch.OutOfMemoryError("CUDA out of memory.\nmore"))["short"] == "OOM"
    assert told_of(MemoryError("no"))["short"] == "OOM"
    assert told_of(UnableError("keeps none", "a story"))["short"] == "keeps none"
    assert told_of(ValueError("bad")) == {"error": "ValueError: bad", "short": "error"}


# -- studies, with children in this process -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, TINY_DIT])
def test_a_study_measures_every_row(shape: Shape, local: type[LocalChild], tmp_path: Path) -> None:
    peers = ("accelerate-cpu", "accelerate-max") if find_spec("accelerate") else ()
    work, said = study(tmp_path, peers, shape=shape)
    work.run()
    assert [(r.percent, r.tokens) for r in work.results.rows] == [(50, 1), (50, 8)]
    for r in work.results.rows:
        assert r.budget == shape.bytes // 2
        assert r.cap == r.budget + MARGIN
        assert not r.fates
        assert all(r.output(name) == "equal" for name in ("plain", "tierstore", *peers))
        assert {t["beside"] for t in r.passes["tierstore"]} == {"", *peers}
        assert 0 < r.moved("tierstore") <= shape.bytes + r.ring
        assert r.seconds("tierstore") > 0
        assert set(r.rivals()) == set(peers)
    assert len(said) >= 4
    assert not work.living


def test_a_contender_without_room_is_told_less(local: type[LocalChild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twin(CONTENDERS["plain"]):
        capped, ways = True, (Way(), Way(0.5))

    monkeypatch.setitem(CONTENDERS, "mmgp", Twin)
    local.failing["mmgp/0", "warm"] = Fate("OOM", "out of memory")
    work, _ = study(tmp_path, ("mmgp",))
    work.run()
    assert all(r.output("mmgp") == "equal" for r in work.results.rows)
    assert work.results.rows[0].ways["mmgp"] == "told 50% of the budget"
    assert any("out of memory when told 100%" in note for note in work.results.notes)


def test_a_crash_costs_one_contender(local: type[LocalChild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Contender):
        def start(self, task: Task, device: Any) -> Any:
            raise RuntimeError("it broke")

    monkeypatch.setitem(CONTENDERS, "mmgp", Broken)
    monkeypatch.setitem(CONTENDERS, "flextensor", CONTENDERS["plain"])
    local.failing["flextensor", "turn"] = Fate("killed", "killed by the kernel")
    work, said = study(tmp_path, ("mmgp", "flextensor"))
    work.run()
    first, second = work.results.rows
    assert (first.fates, second.fates) == ({"mmgp": "error", "flextensor": "killed"}, {"mmgp": "error", "flextensor": "failed before"})
    assert first.output("tierstore") == second.output("tierstore") == "equal"
    assert any("it broke" in note for note in work.results.notes)
    assert any("killed by the kernel" in note for note in work.results.notes)
    assert any("mmgp: error" in line for line in said)
    assert "killed" in text_of(model_table("decoder", work.results.rows, work.results.contenders))


def test_rows_go_on_without_tierstore(local: type[LocalChild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "mmgp", CONTENDERS["plain"])
    local.failing["tierstore", "warm"] = Fate("OOM", "out of memory")
    work, _ = study(tmp_path, ("mmgp",))
    work.run()
    assert all(r.fates == {"tierstore": "OOM"} and r.output("mmgp") == "equal" for r in work.results.rows)
    assert "OOM" in text_of(model_table("decoder", work.results.rows, work.results.contenders))


def test_wrong_outputs_are_found_out(local: type[LocalChild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(CONTENDERS["plain"]):
        def start(self, task: Task, device: Any) -> Any:
            model = super().start(task, device)
            return lambda ids: 2 * model(ids)

    monkeypatch.setitem(CONTENDERS, "mmgp", Wrong)
    work, _ = study(tmp_path, ("mmgp",))
    work.run()
    assert all(r.output("mmgp") == "WRONG by 1" and not r.rivals() for r in work.results.rows)


def test_a_plan_for_one_number_of_tokens_gets_a_process_for_each(
    local: type[LocalChild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lone(CONTENDERS["plain"]):
        lone = True

    monkeypatch.setitem(CONTENDERS, "flextensor", Lone)
    work, _ = study(tmp_path, ("flextensor",))
    work.run()
    assert [task.tokens for task in local.started if task.contender == "flextensor"] == [(1,), (8,)]


def test_nothing_new_begins_after_the_deadline(local: type[LocalChild], tmp_path: Path) -> None:
    work, _ = study(tmp_path, ("accelerate-cpu",), Deadline(0.0))
    work.run()
    assert not work.results.rows
    assert any("time was up" in note for note in work.results.notes)
    assert Deadline(1.0).passed(reserve=61.0)
    assert not Deadline(1.0).passed()


def test_plain_leaves_when_the_device_is_small(local: type[LocalChild], tmp_path: Path) -> None:
    work, _ = study(tmp_path)
    work.results.ceilings.free = 1 << 30
    work.run()
    assert any("alone" in note for note in work.results.notes)
    assert all(r.resident > 0 and r.output("tierstore") == "equal" for r in work.results.rows)


def test_later_warm_ups_are_few(local: type[LocalChild], tmp_path: Path) -> None:
    runner = gpu_child.Runner(CONTENDERS["plain"](), Task("run", "plain", TINY, "cpu", str(tmp_path), (1,)), CpuDevice())
    runner.contender.warm_ups, calls = 5, []
    runner.answer = lambda ids: calls.append(1) or torch.zeros(1)
    runner.warm(1)
    runner.warm(1)
    assert len(calls) == 5 + LATER_WARM_UPS


def test_three_tiers_answer_what_layers_alone_do(local: type[LocalChild], tmp_path: Path) -> None:
    results, said = Results(["tierstore"], ceilings=Ceilings(disk=[1.0 * GB], **LINKS)), []
    shape = DecoderShape(4, 256, 4, 512)
    tiers = Tiers(shape, shape.bytes * 3 // 10, shape.bytes * 3 // 10, (1, 8), 1, "cpu", str(tmp_path), Deadline(None))
    run_tiers(tiers, results, said.append, lambda: None)
    assert [r.tokens for r in results.tiers] == [1, 8]
    for r in results.tiers:
        assert not r.fate
        assert r.equal
        assert r.moved("cpu->gpu") > 0
        assert r.moved("disk->cpu") > 0
    assert "equal ok" in text_of(tier_table(results.tiers))


def test_three_tiers_that_fail_say_so(local: type[LocalChild], tmp_path: Path) -> None:
    local.failing["tierstore", "turn"] = Fate("OOM", "out of memory")
    results = Results(["tierstore"], ceilings=Ceilings(**LINKS))
    run_tiers(Tiers(TINY, TINY.bytes // 2, TINY.bytes // 4, (1,), 1, "cpu", str(tmp_path), Deadline(None)), results, print, lambda: None)
    assert results.tiers[0].fate == "OOM"
    assert "OOM" in text_of(tier_table(results.tiers))


# -- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--only", "decoder", "--budgets", "50", "--tokens", "1", "--rounds", "1", "--contenders", "mmgp"]
    file = tmp_path / "out.json"
    assert main(["--device", "cpu", "--tiny", *wanted, "--scratch", str(tmp_path), "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "ceilings" in text
    assert "needs CUDA" in text or "not installed" in text
    results = Results.read(file)
    assert results.rows[0].output("tierstore") == "equal"
    assert results.rows[0].moved("tierstore") > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert main(["--show", str(file)]) == 0
    assert "bytes / ((N-C)+ring)" in capsys.readouterr().out
