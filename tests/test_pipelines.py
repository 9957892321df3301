"""Whole pipelines of diffusers and transformers, made from small random configs: the same result, bit for bit, and what moves."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from pipelines import Outcome, budgets, measure, same, table_of
from rich.console import Console
from small_pipelines import MAKERS, Small, generator, make

from tests.plainly import restored, within_budget
from tierstore import ModelError, Tiered, tiered
from tierstore.parts import find_parts


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def pressed(pipe: Any, disk: Path, gpu: float = 0.4, cpu: float = 0.3) -> Iterator[Tiered]:
    """A session over a pipeline whose fast tier and RAM hold these shares of it; budgets must hold."""
    fast, ram = budgets(find_parts(pipe).modules, gpu, cpu)
    with tiered(pipe, gpu=fast, cpu=ram, disk=disk, device="cpu") as session:
        yield session
        within_budget(session)


def looped(outcome: Outcome) -> Any:
    return next(row for row in outcome.rows if row.least is not None)


@pytest.mark.parametrize("name", MAKERS)
def test_the_result_is_the_same(name: str) -> None:
    outcome = measure(name)
    assert all(outcome.same), outcome.same
    assert outcome.within_budget
    assert all(sum(row.moved) > 0 and row.calls > 0 for row in outcome.rows), outcome.rows
    row = looped(outcome)
    fast = row.nbytes - row.least
    assert row.moved[-1] <= row.calls * (row.nbytes - fast // 2), "half of the fast tier at least is of use to the loop"


def test_the_model_in_the_loop_stays_and_others_pass_through() -> None:
    rows = {row.model: row for row in measure("stable diffusion", gpu=0.9).rows}
    assert rows["unet"].moved[-1] == 0
    assert rows["text_encoder"].moved[-1] > 0
    assert rows["vae"].moved[-1] > 0


def test_models_used_once_give_way_in_ram_too() -> None:
    """The text encoders come first and fill RAM; the transformer that streams in each step must not stay on disk for them."""
    outcome = measure("stable diffusion 3", gpu=0.33, cpu=0.33)
    row = looped(outcome)
    assert all(outcome.same)
    assert row.moved[-1] > 0
    assert row.read[-1] == 0
    assert row.least is not None
    assert row.moved[-1] < 1.5 * row.calls * row.least, "what left for the text encoders comes once, beside a ring"


def test_names_and_devices(scratch: Path) -> None:
    small = make("stable diffusion")
    objects = {name: dict(model.named_parameters()) for name, model in find_parts(small.pipe).modules.items()}
    with pressed(small.pipe, scratch) as session:
        assert session.tier_of("unet.conv_in.weight") in ("gpu", "cpu", "disk")
        assert {name.split(".")[0] for name in session.tier_map} == {"vae", "text_encoder", "unet"}
        assert small.pipe.device == small.pipe._execution_device == torch.device("cpu")
        with pytest.raises(ModelError, match="already under tiered"):
            tiered(small.pipe, gpu="8MiB", device="cpu")
    for name, model in find_parts(small.pipe).modules.items():
        assert restored(model, objects[name])


def test_inference_mode_and_other_pipelines_over_the_same_models(scratch: Path) -> None:
    small = make("stable diffusion")
    noise = torch.rand(1, 3, 16, 16, generator=generator(3))

    def image_to_image() -> Any:
        other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(small.pipe)
        other.set_progress_bar_config(disable=True)
        return other("a cat", image=noise, num_inference_steps=4, generator=generator(1), output_type="pt").images

    expected = small(0), image_to_image()
    with pressed(small.pipe, scratch):
        with torch.inference_mode():
            assert same(small(0), expected[0])
        assert same(image_to_image(), expected[1])


def test_two_pipelines_share_budgets_and_models(scratch: Path) -> None:
    first, second = make("stable diffusion"), make("PixArt")
    second.pipe.vae = first.pipe.vae
    expected = first(0), second(0)
    with pressed({"first": first.pipe, "second": second.pipe}, scratch) as session:
        assert same((first(0), second(0)), expected)
        assert {"first.vae.decoder.conv_in.weight", "second.transformer.pos_embed.proj.weight"} <= session.tier_map.keys()
    assert same((first(0), second(0)), expected)


# -- what a pipeline can do to its models -----------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Any], object]] = {
    "to the device where it is": lambda pipe: pipe.to("cpu"),
    "to another dtype": lambda pipe: pipe.to(torch.float64),
    "another memory format": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(),
    "VAE tiling": lambda pipe: (pipe.vae.enable_tiling(), pipe.vae.enable_slicing()),
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(),
    "layerwise casting": lambda pipe: pipe.unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32),
    "whole models offloaded to the same device": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "a word more": lambda pipe: pipe.load_textual_inversion({"<new>": torch.ones(1, 64)}, token="<new>"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_inside_the_with(name: str, scratch: Path) -> None:
    plain, small = make("stable diffusion"), make("stable diffusion")
    CHANGES[name](plain.pipe)
    expected = plain(0), plain(1)
    with pressed(small.pipe, scratch):
        small(0)
        small(1)
        CHANGES[name](small.pipe)
        assert same((small(0), small(1)), expected)
    assert same((small(0), small(1)), expected)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A file with a LoRA adapter for the small stable diffusion."""
    unet = make("stable diffusion").pipe.unet
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    layers = diffusers.utils.convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    return tmp_path / "lora"


def load(pipe: Any, adapter: Path) -> None:
    pipe.load_lora_weights(adapter, adapter_name="x")


LORA: dict[str, Callable[[Any, Path], object]] = {
    "loaded": load,
    "loaded and fused": lambda pipe, adapter: (load(pipe, adapter), pipe.fuse_lora()),
    "fused and not": lambda pipe, adapter: (load(pipe, adapter), pipe.fuse_lora(), pipe.unfuse_lora()),
    "half": lambda pipe, adapter: (load(pipe, adapter), pipe.set_adapters(["x"], [0.5])),
    "unloaded": lambda pipe, adapter: (load(pipe, adapter), pipe.unload_lora_weights()),
}


@pytest.mark.parametrize("name", LORA)
def test_lora_inside_the_with(name: str, adapter: Path, scratch: Path) -> None:
    plain, small = make("stable diffusion"), make("stable diffusion")
    without = plain(0)
    LORA[name](plain.pipe, adapter)
    expected = plain(0), plain(1)
    assert same(expected[0], without) == (name == "unloaded")
    with pressed(small.pipe, scratch) as session:
        small(0)
        LORA[name](small.pipe, adapter)
        assert same((small(0), small(1)), expected)
        named = {name for name, _ in small.pipe.unet.named_parameters(prefix="unet")}
        assert named <= session.tier_map.keys()
    assert same((small(0), small(1)), expected)


# -- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: pipe.to("meta"), "cannot be moved to meta as a whole; leave the `with` or close"),
        (lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"), "turn off what .* inside the `with`"),
    ],
    ids=["another device", "sequential offload"],
)
def test_refused_inside_the_with(change: Callable[[Any], object], message: str, scratch: Path) -> None:
    small = make("stable diffusion")
    expected = small(0)
    with pressed(small.pipe, scratch):
        small(0)
        with pytest.raises(Exception, match=message) as caught:
            change(small.pipe)
        assert type(caught.value).__module__.startswith("tierstore.")
        assert same(small(0), expected)
    assert same(small(0), expected)


def test_offloading_that_is_on_already(scratch: Path) -> None:
    small = make("stable diffusion")
    expected = small(0)
    small.pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ModelError, match=r"remove_all_hooks\(\)"):
        tiered(small.pipe, gpu="4MiB", disk=scratch, device="cpu")
    small.pipe.remove_all_hooks()
    with pressed(small.pipe, scratch):
        assert same(small(0), expected)
    small.pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ModelError, match="group_offloading"):
        tiered(small.pipe, gpu="4MiB", disk=scratch, device="cpu")


def test_a_cache_of_activations_may_be_on_already(scratch: Path) -> None:
    def cached() -> Small:
        small = make("PixArt")
        config = diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000), current_timestep_callback=lambda: 500
        )
        diffusers.apply_pyramid_attention_broadcast(small.pipe.transformer, config)
        return small

    plain, small = cached(), cached()
    expected = plain(0)
    assert not same(expected, make("PixArt")(0)), "the cache changes the result"
    with pressed(small.pipe, scratch):
        assert same(small(0), expected)


def test_the_bench_tells_a_difference() -> None:
    outcome = measure("DDPM", runs=1)
    outcome.same[0] = False
    printed = io.StringIO()
    Console(width=200, file=printed).print(table_of([outcome]))
    assert "NO: [False, True]" in printed.getvalue()
