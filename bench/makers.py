"""Makes up tensors for the parameters of a forward, from the config's sizes."""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

TOKENS = 12
FRAMES = 64
SAMPLES = 4096
GRID = 4
VISION = "vision|vit|image|backbone|visual"
AUDIO = "audio|speech|acoustic|encoder"
TEXT = "text|decoder|language|thinker|llm"
IDS = re.compile(r"(_id|_index|token_ids|_tokens?)$")


@dataclass(frozen=True)
class Guess:
    """One way to lay inputs out, where the signature leaves it open; `slots` counts placeholder tokens by kind."""

    without: frozenset[str] = frozenset()
    lean: bool = False
    pixels: str = "plain"
    features: str = "mel-time"
    batch: int = 2
    slots: tuple[tuple[str, int], ...] = ()

    def with_slots(self, kind: str, count: int) -> "Guess":
        return replace(self, slots=tuple({**dict(self.slots), kind: count}.items()))


def parts(config: PretrainedConfig, where: str = "") -> list[PretrainedConfig]:
    """Returns the config and its sub-configs, those whose name matches `where` first."""
    found: list[tuple[str, PretrainedConfig]] = [(type(config).__name__.lower(), config)]
    for path, part in found:
        found += [(f"{path}.{k}", v) for k, v in vars(part).items() if isinstance(v, PretrainedConfig)]
    hits = [part for path, part in found[1:] if where and re.search(where, path.partition(".")[2])]
    return hits + [part for _, part in found if not any(part is hit for hit in hits)]


class Maker:
    """Makes the tensor for one parameter: a method's name is the parameter's name."""

    def __init__(self, model: PreTrainedModel, guess: Guess, seed: int) -> None:
        self.config, self.guess, self.batch = model.config, guess, guess.batch
        self.random = torch.Generator().manual_seed(seed)
        self.made: dict[str, Tensor] = {}

    # what the others are made of
    def find(self, *names: str, default: int, where: str = "") -> int:
        """Returns the first positive integer with one of these names in the config or its parts."""
        for part in parts(self.config, where):
            for name in names:
                value = getattr(part, name, None)
                if isinstance(value, (list, tuple)) and value and type(value[0]) is int:
                    value = value[0]
                if type(value) is int and value > 0:
                    return value
        return default

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, max(high, 1), shape, generator=self.random)

    def words(self, *shape: int) -> Tensor:
        """Returns token ids that mean nothing special to the model."""
        vocab = self.find("vocab_size", "text_vocab_size", "src_vocab_size", default=64, where=TEXT)
        taken: set[int] = set()
        for part in parts(self.config):
            for key, value in vars(part).items():
                if IDS.search(key):
                    taken |= {v for v in (value if isinstance(value, (list, tuple)) else [value]) if type(v) is int}
        allowed = [i for i in range(min(vocab, 64)) if i not in taken] or [0]
        return torch.tensor(allowed)[self.ints(len(allowed), *shape)]

    def placeholder(self, kind: str) -> int:
        named = [f"{kind}_{end}" for end in ("token_id", "token_index", "id", "patch_id")]
        return self.find(*named, default=self.find("image_token_id", "image_token_index", default=1))

    def size(self, where: str = VISION) -> tuple[int, int]:
        for part in parts(self.config, where):
            for name in ("image_size", "img_size", "input_size", "spec_size"):
                value = getattr(part, name, None)
                if isinstance(value, (list, tuple)) and len(value) == 2:
                    return int(value[0]), int(value[1])
                if type(value) is int and value > 1:
                    return value, value
        return 64, 64

    def hidden(self, where: str = TEXT) -> int:
        return self.find("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", default=64, where=where)

    # text
    def input_ids(self) -> Tensor:
        books = self.find("num_codebooks", "num_channels_of_tokens", default=0) if self.guess.features == "codes" else 0
        ids = self.words(self.batch, TOKENS, books) if books else self.words(self.batch, TOKENS)
        for kind, count in self.guess.slots:
            run = torch.full((self.batch, count // self.batch), self.placeholder(kind))
            start = self.find("vision_start_token_id", default=0)
            lead = torch.full((self.batch, 1), start) if start else ids[:, :0]
            ids = torch.cat([ids[:, :2], lead, run, ids[:, 2:]], dim=1)
        return ids

    def attention_mask(self) -> Tensor | None:
        leaders = ("input_ids", "inputs_embeds", "hidden_states", "input_values", "flattened_patches")
        led = next((self.made[name] for name in leaders if name in self.made), None)
        return None if led is None else torch.ones(led.shape[:2], dtype=torch.long)

    def token_type_ids(self) -> Tensor:
        return torch.zeros_like(self.made["input_ids"])

    def mm_token_type_ids(self) -> Tensor:
        return (self.made["input_ids"] == self.placeholder("image")).long()

    def decoder_input_ids(self) -> Tensor:
        return self.words(self.batch * max(1, self.find("num_codebooks", default=1)), TOKENS)

    def qformer_input_ids(self) -> Tensor:
        return self.words(self.batch, TOKENS)

    def bbox(self) -> Tensor:
        corners = self.ints(20, self.batch, TOKENS, 4)
        corners[..., 2:] += corners[..., :2]
        return corners

    def inputs_embeds(self) -> Tensor:
        return self.floats(self.batch, TOKENS, self.hidden())

    def query_embeds(self) -> Tensor:
        return self.inputs_embeds()

    def encoder_hidden_states(self) -> Tensor:
        return self.floats(self.batch, TOKENS, self.find("encoder_hidden_size", "cross_hidden_size", default=self.hidden()))

    # pictures
    def pixel_values(self) -> Tensor:
        channels = self.find("num_channels", "in_channels", "in_chans", "num_image_channels", default=3, where=VISION)
        patch = self.find("patch_size", default=8, where=VISION)
        times = self.find("temporal_patch_size", default=1, where=VISION)
        lead, size = (self.batch,), self.size()
        shapes = {
            "patches": (GRID * GRID, channels * times * patch * patch),
            "flat patches": (GRID * GRID, channels * patch * patch),
            "padded patches": (self.batch, GRID * GRID, channels * patch * patch),
            "patch pictures": (GRID * GRID, channels, patch, patch),
            "patch row": (1, GRID * GRID, channels, patch, patch),
            "list": (*lead, 1, channels, *size),
            "pair": (*lead, 2, channels, *size),
            "tiles": (*lead, 1, self.find("max_num_tiles", default=4), channels, *size),
            "frames": (*lead, self.find("num_frames", "frames_per_clip", default=4), channels, *size),
        }
        return self.floats(*shapes.get(self.guess.pixels, (*lead, channels, *size)))

    def pixel_values_videos(self) -> Tensor:
        other = self.guess.pixels if "patch" in self.guess.pixels else "frames"
        return Maker.pixel_values(self.like(replace(self.guess, pixels=other)))

    def like(self, guess: Guess) -> "Maker":
        twin = object.__new__(Maker)
        twin.__dict__ |= {**self.__dict__, "guess": guess}
        return twin

    def image(self) -> Tensor:
        return self.pixel_values()

    def prompt_pixel_values(self) -> Tensor:
        return self.pixel_values()

    def prompt_masks(self) -> Tensor:
        return self.pixel_values()

    def image_grid_thw(self) -> Tensor:
        return torch.tensor([[1, GRID, GRID]])

    def grid_thw(self) -> Tensor:
        return self.image_grid_thw()

    def image_grid_hw(self) -> Tensor:
        return torch.tensor([[GRID, GRID]])

    def grid_hws(self) -> Tensor:
        return self.image_grid_hw()

    def merge_sizes(self) -> Tensor:
        return torch.tensor([1])

    def image_merge_sizes(self) -> Tensor:
        return torch.tensor([1])

    def target_sizes(self) -> Tensor:
        patch = self.find("patch_size", default=8, where=VISION)
        return torch.tensor([[side // patch for side in self.size()]] * self.batch)

    def spatial_shapes(self) -> Tensor:
        return torch.tensor([[GRID, GRID]] * self.batch)

    def pixel_attention_mask(self) -> Tensor:
        if "padded" in self.guess.pixels:
            return torch.ones(self.batch, GRID * GRID, dtype=torch.long)
        shape = self.made["pixel_values"].shape
        return torch.ones(*shape[:-3], *shape[-2:], dtype=torch.long)

    def pixel_position_ids(self) -> Tensor:
        cells = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))
        return cells.expand(self.batch, -1, -1).clone()

    def image_position_ids(self) -> Tensor:
        return self.pixel_position_ids()

    def image_sizes(self) -> Tensor:
        return torch.tensor([self.size()] * self.batch)

    def aspect_ratio_ids(self) -> Tensor:
        return torch.ones(self.batch, 1, dtype=torch.long)

    def aspect_ratio_mask(self) -> Tensor:
        return torch.ones(self.batch, 1, self.find("max_num_tiles", default=4), dtype=torch.long)

    def cross_attention_mask(self) -> Tensor:
        return torch.ones(*self.made["input_ids"].shape, 1, self.find("max_num_tiles", default=4), dtype=torch.long)

    def flattened_patches(self) -> Tensor:
        cells = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).expand(self.batch, -1, -1) + 1
        return torch.cat([cells.float(), self.floats(self.batch, GRID * GRID, self.find("patch_embed_hidden_size", default=64))], dim=-1)

    def image_embeds_position_mask(self) -> Tensor:
        return self.made["input_ids"] == self.placeholder("image")

    def visual_feats(self) -> Tensor:
        return self.floats(self.batch, 5, self.find("visual_feat_dim", default=64))

    def visual_pos(self) -> Tensor:
        return torch.rand(self.batch, 5, 4, generator=self.random)

    def visual_embeds(self) -> Tensor:
        return self.floats(self.batch, 5, self.find("visual_embedding_dim", default=64))

    # sound
    def input_values(self) -> Tensor:
        if self.guess.features == "channels":
            return self.floats(self.batch, self.find("audio_channels", default=1), SAMPLES)
        if self.guess.features == "time-mel":
            bins = self.find("num_mel_bins", "model_in_dim", "feature_size", default=80, where=AUDIO)
            return self.floats(self.batch, self.find("max_length", default=FRAMES), bins)
        return self.floats(self.batch, SAMPLES)

    def bins(self) -> int:
        names = ("num_mel_bins", "n_mel_bins", "feature_size", "input_feat_size", "input_feat_per_channel", "input_dim")
        return self.find(*names, "feature_projection_input_dim", "nb_mels", default=80, where=AUDIO)

    def input_features(self) -> Tensor:
        frames = self.frames()
        shapes = {
            "time-mel": (self.batch, frames, self.bins()),
            "channel-time-mel": (self.batch, 1, frames, self.bins()),
            "flat": (self.bins(), frames),
        }
        return self.floats(*shapes.get(self.guess.features, (self.batch, self.bins(), frames)))

    def frames(self) -> int:
        positions = self.find("max_source_positions", default=0, where=AUDIO)
        return 2 * positions if 0 < positions <= 512 else FRAMES

    def input_features_mask(self) -> Tensor:
        return torch.ones(self.batch, self.frames(), dtype=torch.long)

    def feature_attention_mask(self) -> Tensor:
        return self.input_features_mask()

    def feature_lens(self) -> Tensor:
        return torch.tensor([self.frames()])

    def audio_mel(self) -> Tensor:
        return self.floats(self.batch, self.frames(), self.bins())

    def audio_mel_mask(self) -> Tensor:
        return torch.zeros(self.batch, self.frames(), dtype=torch.bool)

    def spectrogram(self) -> Tensor:
        return self.floats(self.batch, FRAMES, self.find("model_in_dim", "num_mel_bins", default=80))

    def mel_spectrogram(self) -> Tensor:
        return self.floats(self.batch, self.find("mel_dim", "num_mel_bins", default=80), FRAMES)

    # series
    def past_values(self) -> Tensor:
        length = self.find("context_length", default=32) + max(getattr(self.config, "lags_sequence", None) or [0])
        wide = self.find("num_input_channels", default=1) if self.guess.pixels == "list" else 0
        return self.floats(self.batch, length, wide) if wide else self.floats(self.batch, length)

    def past_time_features(self) -> Tensor:
        return self.floats(*self.made["past_values"].shape[:2], self.find("num_time_features", default=0))

    def past_observed_mask(self) -> Tensor:
        return torch.ones_like(self.made["past_values"])

    def future_values(self) -> Tensor:
        return self.floats(self.batch, self.find("prediction_length", default=8))

    def future_time_features(self) -> Tensor:
        return self.floats(self.batch, self.find("prediction_length", default=8), self.find("num_time_features", default=0))

    def past_values_padding(self) -> Tensor:
        return torch.zeros_like(self.made["past_values"])

    def freq(self) -> Tensor:
        return torch.zeros(self.batch, 1, dtype=torch.long)

    # states inside a model
    def hidden_states(self) -> Tensor:
        if "patch" in self.guess.pixels:
            return self.pixel_values()
        if self.guess.pixels == "list":
            return self.like(replace(self.guess, pixels="plain")).pixel_values()
        return self.floats(self.batch, TOKENS, self.find("input_dim", default=self.hidden()))

    def mask(self) -> Tensor:
        return torch.ones(self.batch, TOKENS, dtype=torch.bool)

    def state(self) -> Tensor:
        return self.floats(self.batch, self.find("max_state_dim", "state_dim", default=8))
