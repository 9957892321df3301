"""`tierstore generate`, and what all commands have in common."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.checkpoints import contents
from tests.test_demo import save_model
from tierstore.__main__ import main

COMMANDS = ("demo", "plan", "inspect", "doctor", "generate", "verify", "repair")
PROMPT = "why is the sky"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"chat": save_model(folder / "chat"), "plain": save_model(folder / "plain", template=None)}


def generate(capsys: pytest.CaptureFixture[str], place: Path, *more: str, prompt: str = PROMPT, code: int = 0) -> tuple[str, str]:
    """Return what came to stdout and to stderr."""
    capsys.readouterr()
    assert main(["generate", str(place), prompt, "--cpu", "100KB", "--device", "cpu", "--max-new-tokens", "8", *more]) == code
    out, errors = capsys.readouterr()
    return out, errors


def expected(place: Path, text: str | None = None) -> str:
    """Return what transformers itself generates."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    model = transformers.AutoModelForCausalLM.from_pretrained(place)
    if text is None:
        message = [{"role": "user", "content": PROMPT}]
        inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=8)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_text_comes_to_stdout_and_all_else_to_stderr(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(models["chat"])
    out, errors = generate(capsys, models["chat"], "--report")
    assert out == expected(models["chat"]) + "\n"
    assert re.match(r"\d+ tokens in [\d.]+ s, [\d.]+ tokens/s", errors)
    assert "disk->cpu" in errors
    assert contents(models["chat"]) == before
    assert sorted(models["chat"].parent.iterdir()) == sorted(models.values()), "nothing was made beside the checkpoint"


def test_chat_or_not(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    chat, plain = models["chat"], models["plain"]
    assert generate(capsys, chat, "--chat")[0] == expected(chat) + "\n"
    assert generate(capsys, chat, "--no-chat")[0] == expected(chat, PROMPT) + "\n"
    assert generate(capsys, plain)[0] == expected(plain, PROMPT) + "\n"
    assert "has no chat format; leave --chat out" in generate(capsys, plain, "--chat", code=2)[1]


def test_a_seed_makes_the_same_text_again(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts = [generate(capsys, models["plain"], "--seed", seed)[0] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_scratch_is_empty_and_casts_are_made(models: dict[str, Path], scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, errors = generate(capsys, models["plain"], "--disk", str(scratch), "--dtype", "bfloat16", "--report")
    assert out.endswith("\n")
    assert "97.66 KiB" in errors


def test_a_prompt_from_stdin(models: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert generate(capsys, models["plain"], prompt="-")[0] == expected(models["plain"], PROMPT) + "\n"


def test_bad_input(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def message(place: Path, *more: str, prompt: str = PROMPT) -> str:
        out, errors = generate(capsys, place, *more, prompt=prompt, code=2)
        assert (out, errors.count("\n")) == ("", 1), errors
        return errors

    plain = models["plain"]
    assert "it has no config.json" in message(tmp_path / "no")
    assert "the prompt has no tokens" in message(plain, prompt="")
    assert "at least 38400 bytes" in message(plain, "--cpu", "1KB")
    assert "device nonsense cannot be used here" in message(plain, "--device", "nonsense")
    (tmp_path / "config.json").write_text('{"model_type": "nobody knows"}')
    assert f"transformers cannot load a tokenizer from {tmp_path}" in message(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'transformers>=5'" in message(plain)


def test_a_model_that_writes_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = save_model(tmp_path / "bert", template=None)
    transformers.BertConfig(vocab_size=300).save_pretrained(place)
    transformers.ViTConfig().save_pretrained(place)
    assert f"transformers cannot load a language model from {place}" in generate(capsys, place, code=2)[1]


def test_truncated_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = save_model(tmp_path / "model", template=None)
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    out, errors = generate(capsys, place, code=2)
    assert out == ""
    assert str(file) in errors


@pytest.mark.parametrize("wrong", [["--dtype", "int3"], ["--max-new-tokens", "0"], ["--cpu", "lots"], ["--seed", "x"]])
def test_bad_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "somewhere", "hello", *wrong])
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


# -- all commands -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: tierstore {command}")
    if command in ("plan", "inspect", "doctor", "generate"):
        assert f"example: tierstore {command}" in shown


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {command} ", shown, re.MULTILINE) for command in COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


def test_errors_of_the_system_are_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "no")]) == 2
    out, errors = capsys.readouterr()
    assert (out, errors.count("\n")) == ("", 1)
    assert str(tmp_path / "no") in errors
