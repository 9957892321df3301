"""A part of the two large comparisons in bench/: models of transformers and torch's own module database, bit for bit."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from exact import difference, reloaded_run, tiered_run
from layers import cases, check
from shrink import build, grad_outcome, run_outcome

TYPES = ["bert", "gpt2", "llama", "mixtral", "t5", "whisper", "vit", "wav2vec2", "mamba", "clip", "zoedepth", "longformer"]
MODULES = ["nn.MultiheadAttention", "nn.LSTM", "nn.BatchNorm2d", "nn.TransformerEncoderLayer", "nn.Embedding", "nn.Bilinear"]


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("outcome", [run_outcome, grad_outcome], ids=["outputs", "gradients"])
def test_transformers_model(model_type: str, outcome: object) -> None:
    plain, sample = build(model_type), build(model_type)
    expected = outcome(plain)  # type: ignore[operator]
    found, _ = tiered_run(sample.model, lambda: outcome(sample))  # type: ignore[operator]
    assert not difference(expected, found)
    for a, b in zip(plain.model.state_dict().values(), sample.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("model_type", [*TYPES, "wavlm", "zaya"])
def test_a_checkpoint_of_a_transformers_model(model_type: str, tmp_path: Path) -> None:
    sample = build(model_type)
    sample.model.save_pretrained(tmp_path)
    kind = type(sample.model)
    expected = run_outcome(replace(sample, model=kind.from_pretrained(tmp_path)))
    found = reloaded_run(kind, str(tmp_path), sample.nbytes, lambda model: run_outcome(replace(sample, model=model)))
    assert not difference(expected, found)


@pytest.mark.parametrize("name", MODULES)
def test_module_of_torchs_database(name: str) -> None:
    samples = [case for case in cases(frozenset([name])) if not case.lazy][::5]
    assert samples
    for case in samples:
        assert check(case) is None, case
