"""Finds inputs that a model accepts, from its forward signature, its config and its errors."""

import inspect
import re
from collections.abc import Iterator
from itertools import product

from makers import Guess, Maker
from small_config import WIDTH
from torch import Tensor
from transformers import PreTrainedModel

PICTURE = re.compile(r"pixel|image|grid|spatial_shapes|aspect_ratio|visual|merge_sizes|target_sizes")
SOUND = re.compile(r"^input_features|^feature_|input_values|^audio|spectrogram")
VIDEO = re.compile(r"video")
CORE = ("input_ids", "attention_mask", "decoder_input_ids", "pixel_values", "input_features", "input_values", "bbox", "past_values")
STATES = ("hidden_states", "inputs_embeds", "encoder_hidden_states", "query_embeds", "image", "mask", "state", "prompt_masks")
COUNT = re.compile(r"(image|video|audio)?[^.]*?features.*tokens: *(\d+), *features:? *(\d+)", re.IGNORECASE | re.DOTALL)


def make(model: PreTrainedModel, guess: Guess, seed: int) -> dict[str, Tensor]:
    """Returns the inputs that one guess leads to.

    A parameter without a default is always made; one with a default where a maker knows it and the guess allows it.
    """
    maker = Maker(model, guess, seed)
    main = model.main_input_name if isinstance(model.main_input_name, str) else "pixel_values"
    for name, parameter in ordered(model):
        needed = parameter.default is parameter.empty or name == main
        wanted = name in CORE if guess.lean else name not in STATES and not VIDEO.search(name)
        dropped = any((PICTURE if kind == "pictures" else SOUND).search(name) for kind in guess.without)
        if hasattr(maker, name) and (needed or (wanted and not dropped)):
            made = getattr(maker, name)()
            if made is not None:
                maker.made[name] = made
    return maker.made


def ordered(model: PreTrainedModel) -> list[tuple[str, inspect.Parameter]]:
    """Returns the forward's parameters, those first that others take their length from."""
    first = ("input_ids", "inputs_embeds", "hidden_states", "input_values", "flattened_patches", "pixel_values", "past_values")
    return sorted(inspect.signature(model.forward).parameters.items(), key=lambda item: item[0] not in first)


def guesses(model: PreTrainedModel) -> Iterator[Guess]:
    """Yields ways to lay out the inputs: most kinds of input first, then plainer ones."""
    names = set(inspect.signature(model.forward).parameters)
    see, hear = any(PICTURE.search(n) for n in names), any(SOUND.search(n) for n in names)
    grid = any("grid" in n or n == "merge_sizes" for n in names)
    drops = [frozenset[str]()]
    if "input_ids" in names:
        drops += (
            [frozenset({"sounds"})] * (see and hear)
            + [frozenset({"pictures"})] * (see and hear)
            + [frozenset({"pictures", "sounds"})] * (see or hear)
        )
    layouts = (
        ["patches", "flat patches", "patch pictures", "patch row", "plain"]
        if grid
        else ["plain", "list", "pair", "frames", "tiles", "padded patches", "patches"]
    )
    sounds = ["mel-time", "time-mel", "channels", "channel-time-mel", "flat"]
    batch = 1 if grid or ("input_ids" in names and (see or hear)) else 2
    for without, lean in product(drops, (False, True)):
        for pixels in layouts if (see or "past_values" in names or "hidden_states" in names) and "pictures" not in without else ["plain"]:
            for features in sounds if hear and "sounds" not in without else ["mel-time", "codes"]:
                yield Guess(without, lean, pixels, features, batch)
    if batch > 1:
        yield Guess(batch=1)


def repair(guess: Guess, message: str) -> Guess | None:
    """Reads from an error how many placeholder tokens the model wants.

    Some models print the number of elements, not of features: when that many was wrong, a width's share is tried.
    """
    found = COUNT.search(message)
    if found is None:
        return None
    kind, wanted = (found[1] or "image").lower(), int(found[3])
    had = dict(guess.slots).get(kind, 0)
    if had == wanted:
        return guess.with_slots(kind, wanted // WIDTH) if wanted >= WIDTH else None
    return guess.with_slots(kind, wanted) if had * WIDTH != wanted else None
