"""Models of transformers through tierstore.compat.accelerate: the examples of accelerate's documentation, and libraries around them."""

from __future__ import annotations

import copy
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, T5Config, Trainer, TrainingArguments

import tierstore.compat.accelerate as compat
from tests.plainly import nbytes, same

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from exact import difference
from shrink import build, run_outcome

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 60}
IDS = torch.arange(12).reshape(2, 6)
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "gpt2, tied": GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=60, n_positions=32),
    "t5, an encoder too": T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=3, num_heads=4, vocab_size=60, decoder_start_token_id=0),
}

# Their modules fire accelerate's hooks of children by hand (`force_accelerate_hooks`), since they use weights without calling them.
FORCED = ["bamba", "dac", "falcon_mamba", "jamba", "lfm2", "mamba", "mamba2", "nemotron_h", "qwen3_next", "wav2vec2", "wavlm", "zamba2"]
UNDIVIDED = ["mobilenet_v2", "pvt", "glpn", "mgp-str"]  # `_no_split_modules` is None or empty: device_map="auto" refuses or splits wrongly


@pytest.fixture(autouse=True)
def collected(no_thread_left: None) -> Iterator[None]:
    """Sessions end with their models, once these are collected."""
    yield
    gc.collect()


@pytest.fixture(params=CONFIGS)
def plain(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    kind = transformers.AutoModelForSeq2SeqLM if "t5" in request.param else AutoModelForCausalLM
    return kind.from_config(CONFIGS[request.param]).eval()


def generated(model: Any) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)


# -- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FORCED, *UNDIVIDED])
def test_families_that_need_annotations_elsewhere(family: str, scratch: Path) -> None:
    expected, sample = run_outcome(build(family)), build(family)
    compat.disk_offload(sample.model, scratch, "cpu")
    assert "disk" in sample.model.tiered.tier_map.values()
    assert not difference(expected, run_outcome(sample))
    assert sample.model.tiered.stats().links["disk->gpu"].bytes > 0
    compat.remove_hook_from_module(sample.model, recurse=True)
    assert not difference(expected, run_outcome(sample))


def test_families_are_those_that_transformers_marks() -> None:
    folder = Path(transformers.__file__).parent / "models"
    for family in FORCED:
        assert "@force_accelerate_hooks" in (folder / family / f"modeling_{family}.py").read_text(), family


# -- transformers' own tests of offloading ----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("place", ["cpu", "disk, safetensors", "disk, torch.save"])
def test_offload_by_max_memory(plain: Any, share: float, place: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    if "torch.save" in place:
        folder.mkdir()
        torch.save(plain.state_dict(), folder / "pytorch_model.bin")
    else:
        plain.save_pretrained(folder, max_shard_size="20KB")
    total = nbytes(plain)
    max_memory = {0: int(total * share), "cpu": total * 2 if place == "cpu" else int(total * 0.1)}
    with compat.init_empty_weights():
        model = type(plain)(plain.config).eval()
    model = compat.load_checkpoint_and_dispatch(model, folder, device_map="auto", max_memory=max_memory, main_device="cpu")
    assert 0 in model.hf_device_map.values()
    assert set(model.hf_device_map.values()) - {0} == ({"cpu"} if place == "cpu" else {"cpu", "disk"} & set(model.hf_device_map.values()))
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if plain.config.is_encoder_decoder else {})}
    with torch.no_grad():
        expected = plain(**inputs)
        for _ in range(2):
            assert same(model(**inputs).logits, expected.logits)
    assert torch.equal(generated(model), generated(plain))
    for tier in model.tiered.stats().tiers.values():
        assert tier.budget_bytes is None or tier.peak_bytes <= tier.budget_bytes
    assert model.get_input_embeddings().weight is getattr(model, "shared", model.get_input_embeddings()).weight
    model.save_pretrained(tmp_path / "again")
    again = type(plain).from_pretrained(tmp_path / "again")
    assert same(list(again.state_dict().values()), list(plain.state_dict().values()))


# -- the examples of accelerate's documentation, with the import changed ----------------------------------------------


def both() -> Iterator[Any]:
    """Yield accelerate, then its stand-in: a script runs with one and with the other."""
    yield accelerate
    yield compat


def test_example_cpu_offload(plain: Any) -> None:
    results = []
    for library in both():
        model = copy.deepcopy(plain)
        library.cpu_offload(model, execution_device=torch.device("cpu"))
        results.append(generated(model))
    assert torch.equal(*results)


def test_example_disk_offload(plain: Any, tmp_path: Path) -> None:
    results = []
    for number, library in enumerate(both()):
        model = copy.deepcopy(plain)
        model = library.disk_offload(model, offload_dir=str(tmp_path / str(number)), execution_device=torch.device("cpu"))
        results.append(generated(model))
    assert torch.equal(*results)


def test_example_of_three_models_in_a_loop() -> None:
    results = []
    for library in both():
        torch.manual_seed(0)
        model_1, model_2, model_3 = nn.Linear(8, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh()), nn.Linear(16, 4)
        device = "cpu"
        model_1, hook_1 = library.cpu_offload_with_hook(model_1, device)
        model_2, hook_2 = library.cpu_offload_with_hook(model_2, device, prev_module_hook=hook_1)
        model_3, hook_3 = library.cpu_offload_with_hook(model_3, device, prev_module_hook=hook_2)
        hidden = model_1(torch.ones(2, 8))
        for _ in range(50):
            hidden = model_2(hidden)
        results.append(model_3(hidden))
        hook_3.offload()
        if library is compat:
            assert [set(model.tiered.tier_map.values()) for model in (model_1, model_2, model_3)] == [{"cpu"}] * 3
            assert model_2.tiered.stats().links["cpu->gpu"].bytes == nbytes(model_2)  # once, for fifty passes
    assert torch.equal(*results)


def test_example_big_model_inference(plain: Any, tmp_path: Path) -> None:
    """An empty model, a sharded checkpoint, `device_map="auto"` and `max_memory`."""
    if plain.config.is_encoder_decoder:
        pytest.skip("the example is a decoder")
    checkpoint, results = tmp_path / "checkpoint", []
    plain.save_pretrained(checkpoint, max_shard_size="20KB")
    for number, library in enumerate(both()):
        config = AutoConfig.from_pretrained(checkpoint)
        with library.init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        model = library.load_checkpoint_and_dispatch(
            model,
            checkpoint=checkpoint,
            device_map="auto",
            max_memory={"cpu": "70KiB"},
            no_split_module_classes=["LlamaDecoderLayer", "GPT2Block"],
            offload_folder=tmp_path / str(number),
        )
        assert "cpu" in model.hf_device_map.values()
        results.append(generated(model.eval()))
    assert torch.equal(*results)
    assert torch.equal(results[0], generated(plain))


def test_example_infer_then_dispatch(plain: Any, tmp_path: Path) -> None:
    results = []
    for number, library in enumerate(both()):
        model = copy.deepcopy(plain)
        device_map = library.infer_auto_device_map(model, max_memory={"cpu": "70KiB"}, no_split_module_classes=["GPT2Block"])
        model = library.dispatch_model(model, device_map=device_map, offload_dir=tmp_path / str(number))
        assert set(model.hf_device_map.values()) <= {"cpu", "disk"}
        results.append(generated(model))
    assert torch.equal(*results)


# -- what takes such a model ------------------------------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(6) * (index + 1)) % 60
        return {"input_ids": ids, "labels": ids}


@pytest.fixture(params=["cpu_offload", "dispatch_model"])
def offloaded(request: pytest.FixtureRequest, plain: Any, scratch: Path) -> Iterator[Any]:
    model = copy.deepcopy(plain)
    if request.param == "cpu_offload":
        compat.cpu_offload(model, "cpu")
    else:
        device_map = compat.infer_auto_device_map(model, {"cpu": nbytes(model) * 2 // 3})
        compat.dispatch_model(model, device_map, offload_dir=scratch)
    yield model
    compat.remove_hook_from_module(model)  # trainers and pipelines live on


def test_trainer_predicts(plain: Any, offloaded: Any, tmp_path: Path) -> None:
    def predictions(model: Any) -> Any:
        arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True)
        return Trainer(model, arguments).predict(Numbers())

    expected, found = predictions(plain), predictions(offloaded)
    assert same(torch.as_tensor(found.predictions[0]), torch.as_tensor(expected.predictions[0]))
    assert found.metrics["test_loss"] == expected.metrics["test_loss"]
    assert {"cpu", "disk"} & set(offloaded.tiered.tier_map.values())


def test_generate_in_every_way(plain: Any, offloaded: Any) -> None:
    for options in ({"num_beams": 2}, {"do_sample": True, "top_k": 5}, {"use_cache": False}, {"cache_implementation": "static"}):
        results = []
        for model in (plain, offloaded):
            torch.manual_seed(3)
            results.append(model.generate(IDS, max_new_tokens=4, min_new_tokens=4, **options))
        assert torch.equal(*results), options


def test_text_pipeline(plain: Any, offloaded: Any) -> None:
    if plain.config.is_encoder_decoder:
        pytest.skip("text-generation is for decoders")
    tokenizer = word_tokenizer()
    results = [
        transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)("w1 w2 w3", max_new_tokens=5, do_sample=False)
        for model in (plain, offloaded)
    ]
    assert results[0] == results[1]


def word_tokenizer() -> Any:
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(60)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w59")
