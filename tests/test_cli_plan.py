"""`tierstore plan`: its numbers against other ways to get them, and against what a run moves."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

import tierstore
from tests.checkpoints import contents, entry, plain_model, write_raw, write_shards
from tierstore.__main__ import main
from tierstore.backends.checkpoint import CheckpointBackend
from tierstore.errors import BudgetError
from tierstore.machine import disks, memory
from tierstore.outlook import forecast as forecasts
from tierstore.outlook.reading import read_weights
from tierstore.planning.offline import lower_bound

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2000}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2)
TIED = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
MIXTRAL = MixtralConfig(**{**SIZES, "num_hidden_layers": 3}, num_key_value_heads=2, num_local_experts=4)
GPT2 = GPT2Config(n_embd=256, n_layer=4, n_head=4, vocab_size=300, n_positions=32)
TOKEN = torch.tensor([[5]])
GIVEN = ("--disk-bandwidth", "1GB", "--json")


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_NBYTES", 1 << 20)
    monkeypatch.setattr(memory, "_SECONDS", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def save(folder: Path, config: Any, *, shard: str = "5MB") -> Path:
    """Save a random model of this config, once for each."""
    place = folder / f"{config.model_type}-{config.tie_word_embeddings}-{shard}"
    if not place.exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(place, max_shard_size=shard)
    return place


def plan(capsys: pytest.CaptureFixture[str], place: Path, *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", str(place), *GIVEN, *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line on stderr with which a command gives up."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith("tierstore: ")
    assert errors.count("\n") == 1
    return errors


def bytes_in_files(place: Path) -> dict[str, int]:
    """Return the bytes of each tensor, as safetensors itself tells them."""
    found = {}
    for file in place.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118  (it is no dict)
    return found


def moved(place: Path, **options: Any) -> tuple[int, int]:
    """Run one token at a time, and return the bytes that a pass brought into the fast tier, and from the disk."""
    model = tierstore.from_pretrained(AutoModelForCausalLM, place, device="cpu", **options)
    fast = model.tiered.store.tiers[0].name
    try:
        with torch.no_grad():
            links = []
            for count in (8, 2):
                for _ in range(count):
                    model(TOKEN, use_cache=False)
                links.append({name: link.bytes for name, link in model.tiered.stats().links.items()})
    finally:
        model.tiered.close()
    each = {name: (nbytes - links[0].get(name, 0)) // 2 for name, nbytes in links[1].items()}
    into = sum(nbytes for name, nbytes in each.items() if name.endswith(f"->{fast}"))
    return into, sum(nbytes for name, nbytes in each.items() if name.startswith("disk->"))


def as_planned(moved: int, planned: int) -> bool:
    """How long each part computed decides where a run keeps what; one weight of so small a model is a tenth or more of what it moves."""
    return 0.75 * planned <= moved <= 1.25 * planned


@pytest.mark.parametrize(
    ("config", "share"),
    [(LLAMA, 0.35), (LLAMA, 0.7), (TIED, 0.35), (MIXTRAL, 0.35), (GPT2, 0.7)],
    ids=["llama, a third", "llama, more", "tied", "mixtral, whose experts are fused", "gpt2"],
)  # fmt: skip
def test_a_run_moves_what_the_plan_says(folder: Path, config: Any, share: float, capsys: Any) -> None:
    place = save(folder, config)
    before = contents(place)
    cpu = int(sum(bytes_in_files(place).values()) * share)
    link = plan(capsys, place, "--cpu", str(cpu))["plan"]["links"]["disk->cpu"]
    into, read = moved(place, cpu=cpu)
    assert into == read > 0
    assert as_planned(into, link["nbytes"])
    assert contents(place) == before


def test_a_run_over_three_tiers_moves_what_the_plan_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = save(folder, LLAMA)
    total = sum(bytes_in_files(place).values())
    gpu, cpu = total // 4, total // 3
    made = plan(capsys, place, "--gpu", str(gpu), "--cpu", str(cpu), "--device", "cpu")["plan"]
    into, read = moved(place, gpu=gpu, cpu=cpu)
    assert as_planned(into, made["links"]["cpu->gpu"]["nbytes"])
    assert as_planned(read, made["links"]["disk->cpu"]["nbytes"])
    assert read < into


def test_a_cast_reads_other_bytes_than_it_keeps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = save(folder, LLAMA)
    wide, narrow = (plan(capsys, place, "--cpu", "4MB", "--dtype", dtype) for dtype in ("float32", "bfloat16"))
    buffers = sum(group["bytes"]["cpu"] for group in narrow["groups"] if group["name"] == "model.rotary_emb")
    assert narrow["weights"]["bytes"] - buffers == (wide["weights"]["bytes"] - buffers) / 2
    link = narrow["plan"]["links"]["disk->cpu"]
    assert link["file_bytes"] == 2 * link["nbytes"]
    assert link["seconds"] == link["file_bytes"] / 1e9
    assert as_planned(moved(place, cpu="4MB", dtype=torch.bfloat16)[0], link["nbytes"])


def test_numbers_against_files_and_what_no_schedule_can_go_below(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table adds up to the files; the bytes of a pass are between what every schedule moves and what the plan's ring adds."""
    place = save(folder, LLAMA)
    files, budget = bytes_in_files(place), 5_000_000
    found = plan(capsys, place, "--cpu", str(budget), "--by", "tensor")
    rows = {row["name"]: row["bytes"] for row in found["groups"]}
    assert {name: sum(rows[name].values()) for name in files} == files
    made = found["plan"]
    assert sum(made["tiers"].values()) == found["weights"]["bytes"] == sum(sum(row.values()) for row in rows.values())
    assert made["tiers"]["cpu"] + made["rings"]["cpu"] <= budget
    trace = [name for name in read_weights(place).trace if name in files]  # in which the embedding is not, which is looked up
    assert sorted(trace) == sorted(files.keys() - {"model.embed_tokens.weight"})
    least = lower_bound(trace * 6, files, budget) - lower_bound(trace * 5, files, budget)
    streamed = made["links"]["disk->cpu"]["nbytes"]
    assert least <= streamed <= least + 3 * made["rings"]["cpu"]
    assert streamed == sum(files[name] for name in trace) - sum(rows[name]["cpu"] for name in trace)
    assert made["row_bytes"] == files["model.embed_tokens.weight"] // 2000
    assert made["seconds"] == max(streamed / 1e9, made["computing_seconds"])
    assert made["limit"] == ("disk->cpu" if streamed / 1e9 > made["computing_seconds"] else "computing")


def test_groups_and_blocks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = save(folder, LLAMA)
    groups, blocks = (plan(capsys, place, "--cpu", "5MB", "--by", by)["groups"] for by in ("group", "block"))
    assert [row["name"] for row in groups][:2] == ["model.embed_tokens", "model.layers.* (4 blocks)"]
    each = [row for row in blocks if row["name"].startswith("model.layers.")]
    assert [row["name"] for row in each] == [f"model.layers.{i}" for i in range(4)]
    for tier in ("cpu", "disk"):
        assert sum(row["bytes"][tier] for row in each) == groups[1]["bytes"][tier]
    resident = [row["bytes"]["cpu"] for row in each]
    assert max(resident) < 3 * min(resident), "what stays is spread over the blocks"


def test_more_memory_moves_less_until_all_of_it_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = save(folder, LLAMA)
    found = plan(capsys, place, "--gpu", "6MB", "--cpu", "6MB", "--gpu-bandwidth", "2GB")
    fast = [choice for choice in found["choices"] if choice["budgets"]["cpu"] == 6_000_000]
    into = [choice["links"]["cpu->gpu"]["nbytes"] for choice in fast]
    assert [choice["budgets"]["gpu"] for choice in fast] == sorted(choice["budgets"]["gpu"] for choice in fast)
    assert into == sorted(into, reverse=True)
    assert (into[-1], fast[-1]["budgets"]["gpu"]) == (0, found["weights"]["bytes"])
    assert found["plan"] in found["choices"]
    middle = [choice for choice in found["choices"] if choice["budgets"]["cpu"] != 6_000_000]
    read = [choice["links"]["disk->cpu"]["nbytes"] for choice in middle]
    assert read == sorted(read, reverse=True)
    assert read[-1] == 0 < middle[-1]["links"]["cpu->gpu"]["nbytes"]
    for choice in found["choices"]:
        links = choice["links"]
        assert choice["seconds"] == max(links["cpu->gpu"]["nbytes"] / 2e9, links["disk->cpu"]["nbytes"] / 1e9)
    assert any("no accelerator" in note for note in found["notes"]) or torch.accelerator.is_available()


def test_the_smallest_budgets_are_what_they_are_called(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused below the first, by the plan and by a session; right with the second, of weight and bias that are used at once."""
    place = save(folder, GPT2)
    least = plan(capsys, place, "--cpu", "4MB")["smallest"]
    weight, bias = 256 * 4 * 256 * 4, 256 * 4 * 4
    assert (least["starts"], least["runs"]) == (weight, weight + bias)
    assert least["module"] == "transformer.h.0.mlp.c_fc"
    assert f"at least {weight} bytes" in refused(capsys, "plan", place, "--cpu", weight - 1, *GIVEN)
    with pytest.raises(BudgetError) as caught:
        tierstore.from_pretrained(AutoModelForCausalLM, place, cpu=weight - 1, device="cpu")
    assert caught.value.required_bytes == weight
    between = plan(capsys, place, "--cpu", str(weight))
    assert any("transformer.h.0.mlp.c_fc" in note and "BudgetError" in note for note in between["notes"])
    with pytest.raises(BudgetError) as caught:
        moved(place, cpu=weight)
    assert caught.value.required_bytes == weight + bias
    plain = copy.deepcopy(AutoModelForCausalLM.from_pretrained(place))  # whose maps of a file lie at odd addresses: other last bits
    model = tierstore.from_pretrained(AutoModelForCausalLM, place, cpu=least["runs"], device="cpu")
    try:
        with torch.no_grad():
            assert torch.equal(model(TOKEN).logits, plain(TOKEN).logits)
    finally:
        model.tiered.close()
    assert not any("BudgetError" in note for note in plan(capsys, place, "--cpu", str(least["runs"]))["notes"])
    waiting = plan(capsys, place, "--cpu", str(least["ahead"] - 1))["notes"]
    assert any("waits for each" in note for note in waiting)
    assert not any("waits for each" in note for note in plan(capsys, place, "--cpu", str(least["ahead"]))["notes"])


def test_everything_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, save(folder, LLAMA), "--cpu", "1GiB")
    assert found["plan"]["tiers"] == {"cpu": found["weights"]["bytes"], "disk": 0}
    assert found["plan"]["links"]["disk->cpu"] == {"nbytes": 0, "file_bytes": 0, "copies": 0, "seconds": 0.0}
    assert (found["plan"]["limit"], found["plan"]["row_bytes"]) == ("computing", 0)


def test_without_transformers_the_files_tell_the_order(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    place = save(folder, LLAMA)
    full = plan(capsys, place, "--cpu", "5MB")
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = plan(capsys, place, "--cpu", "5MB")
    assert found["order"] == "the files"
    (note,) = found["notes"]
    assert "pip install 'transformers>=5'" in note
    assert "order in the files" in note
    assert found["weights"]["bytes"] == sum(bytes_in_files(place).values())
    assert full["order"] == "the modules of LlamaForCausalLM"
    assert found["plan"]["links"]["disk->cpu"]["nbytes"] > full["plan"]["links"]["disk->cpu"]["nbytes"], "the embedding counts as used"


def test_a_checkpoint_of_any_other_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: tensor for name, tensor in plain_model().state_dict().items() if name != "head.weight"}  # tied
    found = plan(capsys, write_shards(tmp_path / "c", state), "--cpu", "40KB")
    assert found["weights"] == {"count": len(state), "bytes": sum(t.nbytes for t in state.values()), "dtype": "float32"}
    assert "there is no config.json" in found["notes"][0]


def test_no_weight_is_read(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(CheckpointBackend, "read", reading)
    monkeypatch.setattr(CheckpointBackend, "get", reading)
    for config in (LLAMA, TIED, MIXTRAL, GPT2):
        assert plan(capsys, save(folder, config), "--cpu", "4MB", "--dtype", "bfloat16")["plan"]["links"]["disk->cpu"]["nbytes"] > 0


def test_a_checkpoint_larger_than_any_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hole of 1 TiB: 64 layers of 16 GiB, of which 3 fit beside the ring for two."""
    layer = 1 << 34
    header = {f"layers.{i}.w": entry(i * layer, (i + 1) * layer, "U8", [layer]) for i in range(64)}
    file = write_raw(tmp_path / "model.safetensors", header)
    os.truncate(file, file.stat().st_size + 64 * layer)
    found = plan(capsys, tmp_path, "--gpu", str(5 * layer), "--gpu-bandwidth", "32GiB", "--disk-bandwidth", "16GiB")
    assert found["plan"]["tiers"] == {"gpu": 3 * layer, "disk": 61 * layer}
    assert found["plan"]["links"]["disk->gpu"]["nbytes"] == 61 * layer
    assert found["plan"]["links"]["disk->gpu"]["seconds"] == pytest.approx(61 * layer / (16 << 30))
    assert found["smallest"]["ahead"] == 2 * layer


def test_the_order_of_the_files_is_that_of_their_bytes(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"a": entry(8, 16), "c": entry(0, 4), "b": entry(4, 8)}, bytes(16))
    assert read_weights(tmp_path).trace == ("c", "b", "a")


def test_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = save(folder, TIED)
    capsys.readouterr()
    assert main(["plan", str(place), "--gpu", "6MB", "--cpu", "6MB", "--gpu-bandwidth", "2GB", "--disk-bandwidth", "1GB"]) == 0
    out, errors = capsys.readouterr()
    assert errors == ""
    for text in ("model.layers.* (4 blocks)", "cpu->gpu", "disk->cpu", "tokens/s", "smallest budget of gpu", "5.722 MiB *"):
        assert text in out, text


def test_speeds_are_measured_where_none_is_given(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "_LEAST", 8 << 20)
    place = save(folder, LLAMA, shard="50MB")
    assert main(["plan", str(place), "--gpu", "6MB", "--cpu", "6MB", "--device", "cpu", "--disk", str(tmp_path), "--json"]) == 0
    speeds = json.loads(capsys.readouterr().out)["bandwidths"]
    assert speeds.keys() == {"cpu->gpu", "disk->cpu", "computing"}
    assert all(rate > 1e6 for rate in speeds.values())
    assert not list(tmp_path.iterdir())
    assert main(["plan", str(place), "--cpu", "6MB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bandwidths"]["disk->cpu"] > 1e6


def test_without_an_accelerator_it_says_what_it_does_not_know(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("tierstore.outlook.speeds.working_accelerator", lambda: None)
    found = plan(capsys, save(folder, LLAMA), "--gpu", "6MB", "--cpu", "6MB")
    assert found["plan"]["seconds"] is found["plan"]["computing_seconds"] is found["bandwidths"]["cpu->gpu"] is None
    assert any("--gpu-bandwidth" in note for note in found["notes"])
    assert found["plan"]["links"]["disk->cpu"]["seconds"] > 0


# -- what it refuses --------------------------------------------------------------------------------------------------------


def test_bad_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = save(folder, LLAMA)
    assert str(tmp_path / "no") in refused(capsys, "plan", tmp_path / "no", "--cpu", "1GB")
    assert "neither a checkpoint nor a store" in refused(capsys, "plan", tmp_path, "--cpu", "1GB")
    assert "give --gpu SIZE, --cpu SIZE, or both" in refused(capsys, "plan", place)
    assert "give --gpu SIZE as well" in refused(capsys, "plan", place, "--cpu", "1GB", "--device", "cuda")
    assert "is elsewhere" in refused(capsys, "plan", "s3://bucket/model", "--cpu", "1GB")
    assert "is no directory" in refused(capsys, "plan", place, "--cpu", "1GB", "--disk", tmp_path / "no")
    for wrong in (["--cpu", "much"], ["--cpu", "1GB", "--dtype", "int3"], ["--cpu", "1GB", "--disk-bandwidth", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(["plan", str(place), *wrong])
        assert stopped.value.code == 2
        assert wrong[-2] in capsys.readouterr().err


def test_damaged_checkpoints(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = shutil.copytree(save(folder, LLAMA), tmp_path / "copy")
    first, second = sorted(place.glob("*.safetensors"))[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[:100])
    assert f"{first} is damaged" in refused(capsys, "plan", place, "--cpu", "5MB")
    first.write_bytes(whole)
    second.unlink()
    assert second.name in refused(capsys, "plan", place, "--cpu", "5MB")
    shutil.copy(save(folder, LLAMA) / second.name, second)
    (place / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(capsys, "plan", place, "--cpu", "5MB")
    (place / "config.json").write_text('{"model_type": "nobody knows"}')
    assert any("transformers does not know this model" in note for note in plan(capsys, place, "--cpu", "5MB")["notes"])


def test_a_checkpoint_that_lacks_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `from_pretrained` would refuse is not planned for."""
    model = transformers.LlamaForCausalLM(LLAMA)
    model.save_pretrained(tmp_path)
    model.model.norm.weight = None
    transformers.PreTrainedModel.save_pretrained(model, tmp_path)
    assert main(["plan", str(tmp_path), "--cpu", "5MB", *GIVEN]) == 2
    assert "missing (1): model.norm.weight" in capsys.readouterr().err


def test_less_memory_is_not_taken_for_more(monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A planted defect: were the budget misread by half, the run would tell."""
    place, honest = save(folder, LLAMA), forecasts.plan

    def planted(trace: Any, sizes: Any, budgets: Any, *rest: Any, **options: Any) -> Any:
        return honest(trace, sizes, [max(budgets[0] // 2, *sizes.values()), *budgets[1:]], *rest, **options)

    monkeypatch.setattr(forecasts, "plan", planted)
    cpu = sum(bytes_in_files(place).values()) // 2
    link = plan(capsys, place, "--cpu", str(cpu))["plan"]["links"]["disk->cpu"]
    assert not as_planned(moved(place, cpu=cpu)[0], link["nbytes"])
