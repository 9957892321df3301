"""Makes up inputs for a model it has never seen, from its forward signature and its config."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

TOKENS = 12
FRAMES = 64
SAMPLES = 2048


@dataclass(frozen=True)
class Guess:
    """One way to lay inputs out, where the signature leaves it open; `slots` counts placeholder tokens by kind."""

    use: frozenset[str] = frozenset({"image", "audio"})
    pixels: str = "plain"
    features: str = "mel-time"
    batch: int = 2
    slots: tuple[tuple[str, int], ...] = ()

    def with_slots(self, kind: str, count: int) -> "Guess":
        return replace(self, slots=tuple({**dict(self.slots), kind: count}.items()))


def parts(config: PretrainedConfig, where: str) -> list[PretrainedConfig]:
    """Returns the config and its sub-configs, those whose name matches `where` first."""
    found: list[tuple[str, PretrainedConfig]] = [("", config)]
    for path, part in found:
        found += [(f"{path}.{k}", v) for k, v in vars(part).items() if isinstance(v, PretrainedConfig)]
    hits = [part for path, part in found if where and re.search(where, path)]
    return hits + [part for _, part in found]


VISION = "vision|vit|image|backbone|visual"
AUDIO = "audio|speech|acoustic|encoder"
TEXT = "text|decoder|language|thinker|llm"


class Maker:
    """Makes one tensor for each parameter name it knows, from a seed."""

    def __init__(self, model: PreTrainedModel, guess: Guess, seed: int) -> None:
        self.model, self.config, self.guess = model, model.config, guess
        self.random = torch.Generator().manual_seed(seed)
        self.names = [p for p in inspect.signature(model.forward).parameters if p not in ("self", "kwargs", "args")]

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

    def ints(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.random)

    # text
    def special(self) -> set[int]:
        ids: set[int] = set()
        for part in parts(self.config, ""):
            for key, value in vars(part).items():
                if re.search(r"token(_\w+)?_(id|index)$|_(id|index)$|token_ids$", key):
                    ids |= {v for v in (value if isinstance(value, (list, tuple)) else [value]) if type(v) is int}
        return ids

    def words(self, *shape: int) -> Tensor:
        vocab = self.find("vocab_size", "text_vocab_size", "src_vocab_size", default=64, where=TEXT)
        allowed = [i for i in range(min(vocab, 64)) if i not in self.special()] or [0]
        return torch.tensor(allowed)[self.ints(len(allowed), *shape)]

    def input_ids(self) -> Tensor:
        ids = self.words(self.guess.batch, TOKENS)
        for kind, count in self.guess.slots:
            run = self.placeholder(kind).repeat(count // self.guess.batch)
            ids = torch.cat([ids[:, :2], run.expand(self.guess.batch, -1), ids[:, 2:]], dim=1)
        return ids

    def placeholder(self, kind: str) -> Tensor:
        names = [f"{kind}_token_id", f"{kind}_token_index", f"{kind}_id", f"{kind}_patch_id"]
        return torch.tensor([self.find(*names, default=self.find("image_token_id", "image_token_index", default=1))])

    # pictures
    def pixel_values(self) -> Tensor:
        return self.pictures(VISION)

    def size(self, where: str) -> tuple[int, int]:
        for part in parts(self.config, where):
            for name in ("image_size", "img_size", "input_size", "spec_size"):
                value = getattr(part, name, None)
                if isinstance(value, (list, tuple)) and len(value) == 2:
                    return int(value[0]), int(value[1])
                if type(value) is int and value > 1:
                    return value, value
        return 64, 64

    def pictures(self, where: str) -> Tensor:
        channels = self.find("num_channels", "in_channels", "in_chans", "num_image_channels", default=3, where=where)
        patch = self.find("patch_size", default=8, where=where)
        height, width = self.size(where)
        batch = self.guess.batch
        if self.guess.pixels == "patches":
            times = self.find("temporal_patch_size", default=1, where=where)
            return self.floats(16, channels * times * patch * patch)
        if self.guess.pixels == "padded patches":
            return self.floats(batch, 16, channels * patch * patch)
        if self.guess.pixels == "list of pictures":
            return self.floats(batch, 1, channels, height, width)
        if self.guess.pixels == "frames":
            return self.floats(batch, self.find("num_frames", "frames_per_clip", default=4), channels, height, width)
        if self.guess.pixels == "patch cubes":
            return self.floats(16, channels, patch, patch)
        return self.floats(batch, channels, height, width)

    def pixel_values_videos(self) -> Tensor:
        return Maker(self.model, replace(self.guess, pixels=self.guess.pixels if "patch" in self.guess.pixels else "frames"), 1).pictures(VISION)

    def grid(self) -> Tensor:
        return torch.tensor([[1, 4, 4]])

    def pixel_mask(self) -> Tensor:
        return torch.ones(self.guess.batch, *self.size(VISION), dtype=torch.long)

    # sound
    def input_values(self) -> Tensor:
        mono = self.floats(self.guess.batch, SAMPLES)
        if self.guess.features == "channels":
            return mono[:, None]
        if self.guess.features == "time-mel":
            return self.floats(self.guess.batch, FRAMES, self.find("num_mel_bins", "feature_size", "model_in_dim", default=80, where=AUDIO))
        return mono

    def input_features(self) -> Tensor:
        bins = self.find("num_mel_bins", "n_mel_bins", "feature_size", "input_feat_size", "input_feat_per_channel", "input_dim", "feature_projection_input_dim", default=80, where=AUDIO)
        frames = 2 * self.find("max_source_positions", default=FRAMES // 2, where=AUDIO)
        if self.guess.features == "time-mel":
            return self.floats(self.guess.batch, FRAMES, bins)
        if self.guess.features == "chunks":
            return self.floats(self.guess.batch, 1, frames, bins)
        return self.floats(self.guess.batch, bins, frames)

    def bbox(self) -> Tensor:
        corners = self.ints(20, self.guess.batch, TOKENS, 4)
        corners[..., 2:] += corners[..., :2]
        return corners


MAIN = {"pixel_values", "input_ids", "input_values", "input_features"}


def make(model: PreTrainedModel, guess: Guess, seed: int) -> dict[str, Tensor]:
    """Returns the inputs one guess leads to."""
    maker, names = Maker(model, guess, seed), inspect.signature(model.forward).parameters
    out: dict[str, Tensor] = {}
    main = model.main_input_name if isinstance(model.main_input_name, str) else "pixel_values"
    text, vision, sound = "input_ids" in names, "image" in guess.use or main == "pixel_values", "audio" in guess.use
    if text:
        out["input_ids"] = maker.input_ids()
        if "attention_mask" in names:
            out["attention_mask"] = torch.ones_like(out["input_ids"])
        if "token_type_ids" in names:
            out["token_type_ids"] = torch.zeros_like(out["input_ids"])
        if "mm_token_type_ids" in names:
            out["mm_token_type_ids"] = (out["input_ids"] == maker.placeholder("image")).long()
    if "decoder_input_ids" in names:
        out["decoder_input_ids"] = maker.words(guess.batch, TOKENS)
    if vision and "pixel_values" in names:
        out["pixel_values"] = maker.pixel_values()
        for name in ("image_grid_thw", "grid_thw"):
            if name in names:
                out[name] = maker.grid()
        if "image_sizes" in names:
            out["image_sizes"] = torch.tensor([maker.size(VISION)] * guess.batch)
    if "pixel_values_videos" in names and main == "pixel_values_videos":
        out["pixel_values_videos"] = maker.pixel_values_videos()
    if sound or main in ("input_values", "input_features"):
        for name in ("input_values", "input_features"):
            if name in names:
                out[name] = getattr(maker, name)()
    if "bbox" in names:
        out["bbox"] = maker.bbox()
    if "hidden_states" in names and main in ("hidden_states", "pixel_values") and "pixel_values" not in names:
        out["hidden_states"] = maker.pixel_values()
        if "grid_thw" in names:
            out["grid_thw"] = maker.grid()
    return out


def guesses(model: PreTrainedModel) -> Iterator[Guess]:
    """Yields ways to lay out the inputs, most telling first."""
    names = inspect.signature(model.forward).parameters
    multimodal = "input_ids" in names and any(n in names for n in ("pixel_values", "input_features", "input_values"))
    grid = any("grid" in n for n in names)
    pixels = ["patches"] if grid else ["plain", "list of pictures", "padded patches", "patch cubes"]
    pixels = pixels if any(n in names for n in ("pixel_values", "hidden_states")) else ["plain"]
    features = ["mel-time", "time-mel", "channels", "chunks"] if any(n in names for n in ("input_features", "input_values")) else ["mel-time"]
    batch = 1 if multimodal or grid else 2
    for use in (frozenset({"image", "audio"}), frozenset({"image"}), frozenset({"audio"}), frozenset()) if multimodal else (frozenset({"image", "audio"}),):
        for p in pixels if "image" in use else pixels[:1]:
            for f in features if "audio" in use or not multimodal else features[:1]:
                yield Guess(use, p, f, batch)


COUNT = re.compile(r"(image|video|audio|multimodal)?.*?features.*tokens: *(\d+), *features:? *(\d+)", re.IGNORECASE | re.DOTALL)


def repair(guess: Guess, message: str) -> Guess | None:
    """Reads from an error how many placeholder tokens the model wants."""
    if found := COUNT.search(message):
        kind = (found[1] or "image").lower().replace("multimodal", "image")
        if dict(guess.slots).get(kind, 0) != int(found[3]):
            return guess.with_slots(kind, int(found[3]))
    return None
