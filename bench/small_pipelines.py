"""Small random pipelines of diffusers and transformers, built in code: nothing is downloaded, and nothing they say makes sense.

Widths are small and depths are not, so that a model is many weights of which each is a small part, as in real ones.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}

import diffusers
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ("a", "cat", "dog", "on", "the", "red", "mat", "sits", "runs", "far")
PROMPTS = ("a cat on the mat", "the red dog runs far")


@dataclass(frozen=True)
class Small:
    """A pipeline, what to call on it for a seed, how many steps its loop has, and which of its models is in the loop."""

    pipe: Any
    run: Callable[[int], Any]
    steps: int
    looped: str

    def __call__(self, seed: int) -> Any:
        """Return what the pipeline makes for a seed, as tensors or plain values."""
        made = self.run(seed)
        return torch.from_numpy(made) if isinstance(made, np.ndarray) else made


# -- tokenizers -----------------------------------------------------------------------------------------------------------


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """Letters only: each is a token, in a word or at its end."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        transformers.CLIPTokenizer(str(vocab), str(merges), model_max_length=16).save_pretrained(folder)
        return transformers.CLIPTokenizer.from_pretrained(folder)


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokens = ["<pad>", "</s>", "<unk>", *WORDS]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


# -- models ---------------------------------------------------------------------------------------------------------------


def clip_text(width: int = 64, *, projected: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=54, bos_token_id=52, eos_token_id=53, pad_token_id=53, hidden_size=width, intermediate_size=2 * width,
        projection_dim=width, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=16,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval()


def t5_encoder(width: int = 64) -> Any:
    config = transformers.T5Config(
        vocab_size=16, d_model=width, d_ff=2 * width, d_kv=width // 4, num_heads=4, num_layers=4, is_encoder_decoder=False
    )
    return transformers.T5EncoderModel(config).eval()


def image_vae(channels: int = 4) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=8, latent_channels=channels, sample_size=16, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def ddim() -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, beta_schedule="scaled_linear")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- pipelines of diffusers -----------------------------------------------------------------------------------------------


def stable_diffusion() -> Small:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=2, norm_num_groups=8, attention_head_dim=8,
        cross_attention_dim=64, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=image_vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=unet, scheduler=ddim(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def run(seed: int) -> Any:
        return pipe(PROMPTS[seed % 2], num_inference_steps=6, height=16, width=16, generator=generator(seed), output_type="pt").images

    return Small(pipe, run, 6, "unet")


def stable_diffusion_3() -> Small:
    """A flow transformer over image and text together; three text encoders."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=6, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=128, caption_projection_dim=64, pooled_projection_dim=128, out_channels=4, pos_embed_max_size=16,
    ).eval()  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=image_vae(),
        text_encoder=clip_text(projected=True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projected=True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(128), tokenizer_3=word_tokenizer(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def run(seed: int) -> Any:
        return pipe(
            PROMPTS[seed % 2],
            num_inference_steps=6,
            height=16,
            width=16,
            generator=generator(seed),
            output_type="pt",
            max_sequence_length=16,
        ).images

    return Small(pipe, run, 6, "transformer")


def pixart() -> Small:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=8, patch_size=2, attention_head_dim=16, num_attention_heads=4, in_channels=4,
        out_channels=8, cross_attention_dim=64, caption_channels=64,
    ).eval()  # fmt: skip
    pipe = diffusers.PixArtAlphaPipeline(
        transformer=transformer, scheduler=diffusers.DPMSolverMultistepScheduler(), vae=image_vae(),
        text_encoder=t5_encoder(), tokenizer=word_tokenizer(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def run(seed: int) -> Any:
        return pipe(
            PROMPTS[seed % 2], num_inference_steps=6, height=16, width=16, generator=generator(seed), output_type="pt",
            use_resolution_binning=False, clean_caption=False, max_sequence_length=16,
        ).images  # fmt: skip

    return Small(pipe, run, 6, "transformer")


def class_conditional() -> Small:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=8, patch_size=2, attention_head_dim=16, num_attention_heads=4, in_channels=4, out_channels=8,
        num_embeds_ada_norm=1000,  # the pipeline's class for "none" is number 1000
    ).eval()  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=image_vae(), scheduler=ddim())
    pipe.set_progress_bar_config(disable=True)

    def run(seed: int) -> Any:
        return pipe(class_labels=[seed], num_inference_steps=6, generator=generator(seed), output_type="np").images

    return Small(pipe, run, 6, "transformer")


def unconditional() -> Small:
    unet = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=2, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    pipe = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return Small(pipe, lambda seed: pipe(num_inference_steps=6, generator=generator(seed), output_type="np").images, 6, "unet")


def video() -> Small:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64, num_layers=6,
        caption_channels=64,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
    ).eval()  # fmt: skip
    pipe = diffusers.LTXPipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder=t5_encoder(),
        tokenizer=word_tokenizer(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def run(seed: int) -> Any:
        return pipe(
            PROMPTS[seed % 2], num_inference_steps=6, height=32, width=32, num_frames=9, generator=generator(seed), output_type="pt",
            max_sequence_length=16,
        ).frames  # fmt: skip

    return Small(pipe, run, 6, "transformer")


def audio() -> Small:
    unet = diffusers.UNet1DModel(
        sample_size=512, sample_rate=16_000, in_channels=2, out_channels=2, block_out_channels=(32, 32, 64), extra_in_channels=64,
        use_timestep_embedding=False, flip_sin_to_cos=True, time_embedding_type="fourier", mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    ).eval()  # fmt: skip
    pipe = diffusers.DanceDiffusionPipeline(unet=unet, scheduler=diffusers.IPNDMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return Small(pipe, lambda seed: pipe(generator=generator(seed), num_inference_steps=6).audios, 6, "unet")


# -- pipelines of transformers --------------------------------------------------------------------------------------------


def text_generation() -> Small:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    pipe = transformers.pipeline("text-generation", model=transformers.LlamaForCausalLM(config).eval(), tokenizer=word_tokenizer())

    def run(seed: int) -> Any:
        torch.manual_seed(seed)
        return pipe(PROMPTS[seed % 2], max_new_tokens=6, min_new_tokens=6, do_sample=True, return_tensors=True)[0]["generated_token_ids"]

    return Small(pipe, run, 6, "model")


def text_classification() -> Small:
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, max_position_embeddings=32
    )
    model = transformers.BertForSequenceClassification(config).eval()
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=word_tokenizer())
    return Small(pipe, lambda seed: [one["score"] for one in pipe(PROMPTS[seed % 2], top_k=None)], 1, "model")


def speech_recognition() -> Small:
    config = transformers.Wav2Vec2Config(
        vocab_size=13, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, conv_dim=(32, 32, 32),
        conv_stride=(5, 4, 4), conv_kernel=(10, 8, 4), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, pad_token_id=0,
    )  # fmt: skip
    pipe = transformers.pipeline(
        "automatic-speech-recognition", model=transformers.Wav2Vec2ForCTC(config).eval(), tokenizer=word_tokenizer(),
        feature_extractor=transformers.Wav2Vec2FeatureExtractor(),
    )  # fmt: skip

    def run(seed: int) -> Any:
        sound = np.random.default_rng(seed).standard_normal(4000).astype(np.float32)
        with torch.no_grad():
            exact = pipe.forward(next(iter(pipe.preprocess(sound))))
        return pipe(sound)["text"], {name: value for name, value in exact.items() if isinstance(value, torch.Tensor)}

    return Small(pipe, run, 1, "model")


def image_classification() -> Small:
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, num_labels=5
    )
    model = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    pipe = transformers.pipeline("image-classification", model=model, image_processor=processor)

    def run(seed: int) -> Any:
        from PIL import Image

        pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        return [(one["label"], one["score"]) for one in pipe(Image.fromarray(pixels))]

    return Small(pipe, run, 1, "model")


MAKERS: dict[str, Callable[[], Small]] = {
    "stable diffusion": stable_diffusion,
    "stable diffusion 3": stable_diffusion_3,
    "PixArt": pixart,
    "DiT": class_conditional,
    "DDPM": unconditional,
    "LTX video": video,
    "dance diffusion": audio,
    "text-generation": text_generation,
    "text-classification": text_classification,
    "automatic-speech-recognition": speech_recognition,
    "image-classification": image_classification,
}


def make(name: str, seed: int = 0) -> Small:
    """Return a pipeline by name; its weights follow from `seed`."""
    torch.manual_seed(seed)
    return MAKERS[name]()
