"""`from_pretrained` and models of transformers: bound as transformers would load them, with its renames and fusions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, LlamaConfig, MixtralConfig

import tierstore
from tests.checkpoints import contents, equal, within_budget
from tierstore import CheckpointError, on_meta, tiered

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
BUDGET = "60KB"
IDS = torch.arange(12).reshape(2, 6)

CONFIGS: dict[str, Any] = {
    "llama, tied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "mixtral, whose experts are fused": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32),
}


@pytest.fixture(params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
    model.generation_config.max_length = 9
    model.save_pretrained(tmp_path / "c", max_shard_size="20KB")
    return tmp_path / "c"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_as_transformers_loads_it(saved: Path, dtype: torch.dtype | None) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype or "auto")
    before = contents(saved)
    model = tierstore.from_pretrained(AutoModelForCausalLM, saved, cpu=BUDGET, dtype=dtype)
    assert type(model) is type(plain)
    assert not model.training
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert torch.equal(model.generate(IDS, do_sample=False), plain.generate(IDS, do_sample=False))
    assert within_budget(model.tiered)
    assert contents(saved) == before
    model.tiered.close()
    assert equal(model, plain)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    )
    assert contents(saved) == before


def test_a_model_on_meta(saved: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved)
    with on_meta():
        model = AutoModelForCausalLM.from_config(plain.config).eval()
    with tiered(model, checkpoint=saved, cpu=BUDGET), torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert equal(model, plain)


def test_saving_again(saved: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved)
    plain.save_pretrained(tmp_path / "expected", max_shard_size="20KB")
    model = tierstore.from_pretrained(AutoModelForCausalLM, saved, cpu=BUDGET)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert within_budget(model.tiered)
    model.tiered.close()
    expected, again = ({p.name: load_file(p) for p in (tmp_path / name).glob("*.safetensors")} for name in ("expected", "again"))
    assert expected.keys() == again.keys()
    for name, tensors in expected.items():
        assert tensors.keys() == again[name].keys()
        assert all(torch.equal(tensor, again[name][key]) for key, tensor in tensors.items())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert equal(reloaded, plain)


def test_weights_of_an_older_name(tmp_path: Path) -> None:
    """`gamma` and `beta`, a head that the base model lacks, and a prefix."""
    torch.manual_seed(0)
    plain = BertModel(BertConfig(**SIZES, max_position_embeddings=64)).eval()
    plain.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {
        f"bert.{k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')}": v for k, v in state.items()
    }
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    expected = BertModel.from_pretrained(tmp_path)
    model = tierstore.from_pretrained(AutoModel, tmp_path, cpu=BUDGET)
    with torch.no_grad():
        assert torch.equal(model(IDS).last_hidden_state, expected(IDS).last_hidden_state)
    model.tiered.close()
    assert equal(model, expected)


def test_what_is_missing(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"]
    state["stranger"] = torch.zeros(2)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"(?s)LlamaForCausalLM.*missing .1.: model\.norm\.weight.*stranger") as caught:
        tierstore.from_pretrained(AutoModelForCausalLM, tmp_path)
    assert caught.value.missing == ("model.norm.weight",)
    assert caught.value.unexpected == ("stranger",)
    with pytest.warns(UserWarning, match="stranger"):
        lenient = tierstore.from_pretrained(AutoModelForCausalLM, tmp_path, strict=False)
    with torch.no_grad():
        assert lenient(IDS).logits.isfinite().all()
    lenient.tiered.close()
    state["model.norm.weight"] = torch.ones(33)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        tierstore.from_pretrained(AutoModelForCausalLM, tmp_path, strict=False)
    assert caught.value.mismatched == ("model.norm.weight",)


def test_options_that_are_ours(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="device_map cannot be given here"):
        tierstore.from_pretrained(AutoModelForCausalLM, saved, device_map="auto")


def test_a_config_that_is_given_and_files_of_torch_save(saved: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved)
    folder = tmp_path / "bin"
    folder.mkdir()
    torch.save(plain.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text((saved / "config.json").read_text())
    config = transformers.AutoConfig.from_pretrained(saved)
    model = tierstore.from_pretrained(type(plain), folder, config=config, cpu=BUDGET, attn_implementation="eager")
    eager = type(plain).from_pretrained(saved, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, eager(IDS).logits)
    model.tiered.close()
    assert json.loads((saved / "config.json").read_text())["architectures"] == [type(plain).__name__]
