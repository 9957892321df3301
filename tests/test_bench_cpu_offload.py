"""The parts of bench/cpu_offload.py that need neither root nor its peers: the model, the bound, the tables, the messages."""

from __future__ import annotations

import io
import sys
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from caps import Cap
from offload_children import Child, Fate
from offload_contenders import CONTENDERS, Task
from offload_model import DTYPE, Decoder, Shape, mapped_decoder, random_decoder, save
from offload_rows import Row, read_table, time_table
from raw_speed import RawReader
from rich.console import Console
from turns import turned

TINY = Shape(layers=1, width=512)


def row(**changes: object) -> Row:
    passes = {
        "plain": [{"seconds": s, "read": 0, "digest": "a"} for s in (0.1, 0.2, 0.9)],
        "tierstore": [{"seconds": s, "read": 1 << 30, "digest": "a"} for s in (1.0, 2.0, 3.0)],
        "mmap": [{"seconds": 4.0, "read": 2 << 30, "digest": "b"}],
    }
    given = {"raw": [1e9, 2e9, 3e9], "passes": passes, "fates": {"airllm": "killed"}}
    return Row(percent=50, tokens=1, budget=10**9, touched=3 * 10**9, digest="a", **(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("mib", [128, 256, 512, 1024, 2048])
def test_a_shape_has_about_the_size_asked_for(mib: int) -> None:
    shape = Shape.of(mib << 20)
    assert abs(shape.bytes / (mib << 20) - 1) < 0.03
    with torch.device("meta"):
        model = Decoder(shape).to(DTYPE)
    assert sum(p.nbytes for p in model.parameters()) == shape.bytes
    assert max(p.nbytes for p in model.parameters()) <= shape.bytes / 14  # so that the smallest budget holds any operation


def test_a_pass_touches_all_but_other_rows_of_the_embedding() -> None:
    embedding = TINY.vocabulary * TINY.width * 2
    assert TINY.touched(1) == TINY.bytes - embedding + TINY.width * 2
    assert TINY.touched(64) == TINY.bytes - embedding + 64 * TINY.width * 2


def test_the_decoder_is_llama(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = random_decoder(TINY)
    save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        peer = LlamaForCausalLM(LlamaConfig(**TINY.config()))
    inverse = peer.model.rotary_emb.compute_default_rope_parameters(peer.config)[0]
    peer.model.rotary_emb.inv_freq = inverse
    peer.load_state_dict(mapped_decoder(TINY, tmp_path / "model.safetensors").state_dict(), assign=True)
    with torch.no_grad():
        for tokens in (1, 16):
            ids = TINY.ids(tokens)
            assert torch.equal(peer(ids, use_cache=False).logits, model(ids))


def test_the_bound_is_the_longer_of_arithmetic_and_disk() -> None:
    assert row().missing == 2 * 10**9
    assert row().disk == 1.0
    assert row().bound == 1.0
    assert row(raw=[1e12]).bound == row().plain == 0.2
    assert Row(90, 1, budget=10, touched=9, digest="").missing == 0


def test_cells_are_medians_over_the_bound_and_say_what_went_wrong() -> None:
    assert row().cell("tierstore") == "2.00"
    assert row().cell("mmap") == "4.00 WRONG"
    assert row().cell("airllm") == "killed"
    assert row().ratio("tierstore", "mmap") == "0.50"
    assert row().ratio("tierstore", "airllm") == "-"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(time_table([row()], ["tierstore", "mmap", "airllm"]), read_table([row()], ["tierstore", "mmap", "airllm"]))
    text = console.export_text()
    assert "4.00 WRONG" in text
    assert "killed" in text


def test_a_row_says_how_sure_its_figure_is() -> None:
    """Each pass is compared with what set the bound in its own round: the disk here, and then the arithmetic."""
    passes = {name: [{"seconds": factor * s} for s in (0.1, 0.2, 0.4, 0.8, 1.6)] for name, factor in (("plain", 1.0), ("tierstore", 2.0))}
    assert row(passes=passes, raw=[1e10 / 2**n for n in range(5)]).sure("tierstore") == "1.00-1.00"
    assert row(passes=passes, raw=[1e12] * 5).sure("tierstore") == "2.00-2.00"
    assert row(passes=passes, raw=[1e9] * 4 + [4e9]).sure("tierstore") == "0.10-6.40"
    assert row(passes=passes | {"tierstore": passes["tierstore"][:4]}, raw=[1e12] * 5).sure("tierstore") == "-", "it died"
    assert row().sure("tierstore") == "-", "three rounds say nothing"


def test_a_row_says_when_the_machine_was_not_quiet() -> None:
    assert "0.100 to 0.900 s" in row().disturbance
    assert not row(passes={"plain": [{"seconds": 0.10}, {"seconds": 0.11}]}).disturbance


def test_every_contender_goes_first_once() -> None:
    names = ["a", "b", "c"]
    assert [turned(names, r)[0] for r in range(-2, 3)] == ["b", "c", "a", "b", "c"]
    assert all(sorted(turned(names, r)) == names for r in range(3))


@pytest.mark.parametrize("size", range(1, 9))
def test_every_contender_comes_after_each_other_one_equally_often(size: int) -> None:
    rounds = size * (1 + size % 2)
    followed = Counter(pair for number in range(rounds) for pair in pairwise(turned(range(size), number)))
    assert followed == dict.fromkeys(permutations(range(size), 2), rounds // size)


def test_a_task_survives_the_command_line() -> None:
    task = Task("run", "tierstore", TINY, 123, "/x", (1, 64))
    assert Task.loads(task.dumps()) == task
    assert task.contender in CONTENDERS


def test_raw_reads_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes((40 << 20) + 123))
    try:
        with RawReader(file) as reader:
            assert reader.measure() > 0
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")


def test_a_child_answers_and_its_errors_are_told(tmp_path: Path) -> None:
    child = Child(Task("run", "mmap", TINY, 0, str(tmp_path), (1,)), Cap())
    try:
        with pytest.raises(Fate, match=r"weights\.safetensors"):
            child.answer()
    finally:
        child.close()
