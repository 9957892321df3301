"""Small random models of every transformers type, with inputs that they accept.

`build` takes the first class, recipe and guess at the inputs with which the model runs: everything is a function of the type
and the seed, and models that no table names work too.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import importlib
import inspect
import traceback
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import transformers
from exact import Outcome, forward_backward, forward_only, model_bytes
from inputs import Guess, guesses, make, repair
from overrides import START
from small_config import RECIPES, Recipe, small_config
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

MOST_BYTES = 16 << 20
MOST_CLASSES = 4
MOST_RUNS = 150  # tries at running one type before it is given up, with all kinds of inputs and again without some
MOST_REPAIRS = 6
TASKS = (  # in this order, because a head that runs all of a model's parts proves most
    "FOR_IMAGE_TEXT_TO_TEXT",
    "FOR_MULTIMODAL_LM",
    "FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "FOR_SPEECH_SEQ_2_SEQ",
    "FOR_CAUSAL_LM",
    "FOR_MASKED_LM",
    "FOR_CTC",
    "FOR_OBJECT_DETECTION",
    "FOR_UNIVERSAL_SEGMENTATION",
    "FOR_IMAGE_CLASSIFICATION",
    "FOR_AUDIO_CLASSIFICATION",
    "FOR_DEPTH_ESTIMATION",
)


class CannotBuild(Exception):  # noqa: N818 - it says what cannot be done
    """No class, recipe and inputs were found with which the type runs; the message is the first reason."""


@dataclass(frozen=True)
class Sample:
    """A small model in eval mode with inputs; sizes are of its different parameters and buffers, in bytes."""

    model_type: str
    class_name: str
    model: PreTrainedModel
    inputs: dict[str, Tensor]
    nbytes: int
    largest: int
    note: str = ""


def model_types() -> list[str]:
    """Returns every model type that the installed transformers knows."""
    return sorted(CONFIG_MAPPING_NAMES)


def build(model_type: str, seed: int = 0) -> Sample:
    """Returns a small random model of a type; raises `CannotBuild` with the reason if none runs."""
    reasons: Counter[str] = Counter()
    found = [c for c in model_classes(model_type) if "forward" in own_names(c)][:MOST_CLASSES]
    if not found:
        raise CannotBuild("transformers has no model class with a forward for it alone")
    for all_kinds in (True, False):
        tries: Counter[str] = Counter()
        for model_class, recipe in product(found, RECIPES):
            if tries.total() > MOST_RUNS:
                break
            try:
                model = random_model(model_class, recipe, seed)
            except Exception as error:  # noqa: BLE001 - a recipe may fail in any way; the next one is tried
                tries[reason(error)] += 1
                continue
            if fit := fitting_inputs(model, all_kinds, seed, tries):
                sizes = model_bytes(model).values()
                return Sample(model_type, model_class.__name__, model, fit[0], sum(sizes), max(sizes), fit[1])
        reasons += tries
    raise CannotBuild(next((r for r in reasons if r.startswith(("ImportError", "ModuleNotFound"))), next(iter(reasons))))


def own_names(model_class: type[PreTrainedModel]) -> set[str]:
    """Returns what the class defines below torch's `Module`, whose `forward` only raises."""
    return {name for base in model_class.__mro__ if issubclass(base, PreTrainedModel) for name in vars(base)}


def model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """Returns the model classes that a type's config belongs to, the most telling heads first."""
    config_class = CONFIG_MAPPING[model_type]
    heads: list[str] = []
    for mapping in [f"MODEL_{task}_MAPPING_NAMES" for task in TASKS] + ["MODEL_MAPPING_NAMES"]:
        name = getattr(modeling_auto, mapping).get(model_type, ())
        heads += [name] if isinstance(name, str) else list(name)
    own: list[type[PreTrainedModel]] = []
    for file in sorted(Path(inspect.getfile(config_class)).parent.glob("modeling_*.py")):
        try:
            module = importlib.import_module(f"{config_class.__module__.rpartition('.')[0]}.{file.stem}")
        except ImportError as error:
            raise CannotBuild(reason(error)) from error
        own += [c for c in vars(module).values() if is_model_of(c, config_class, module.__name__)]
    return sorted(own, key=lambda c: heads.index(c.__name__) if c.__name__ in heads else len(heads))


def is_model_of(thing: object, config_class: type[PretrainedConfig], module: str) -> bool:
    """Says whether something is a model class of this module whose config is exactly of this class."""
    return (
        inspect.isclass(thing)
        and issubclass(thing, PreTrainedModel)
        and thing.__module__ == module
        and getattr(thing, "config_class", None) is config_class
        and not thing.__name__.endswith("PreTrainedModel")
    )


def random_model(model_class: type[PreTrainedModel], recipe: Recipe, seed: int) -> PreTrainedModel:
    """Returns a model whose weights are all finite and none of them 0 or 1 throughout.

    A bias of zeros or a norm of ones would hide that it was never applied. Raises `MemoryError` before a large model is made.
    """
    config = small_config(model_class.config_class, recipe, START.get(model_class.config_class.model_type, {}))
    with torch.device("meta"):
        size = sum(model_bytes(model_class(config)).values())
    if size > MOST_BYTES:
        raise MemoryError(f"cannot be made smaller than {size >> 20} MiB")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                jitter = 0.02 * torch.randn(parameter.shape, generator=noise)
                parameter.copy_(torch.nan_to_num(parameter, 0.0, 0.0, 0.0) + jitter.to(parameter.dtype))
    return model


def fitting_inputs(model: PreTrainedModel, all_kinds: bool, seed: int, reasons: Counter[str]) -> tuple[dict[str, Tensor], str] | None:
    """Returns inputs with which the model runs and gives a float tensor, and a note of what kinds are left out.

    With `all_kinds`, a model that takes pictures or sounds gets them.
    """
    tried: set[str] = set()
    for first in guesses(model):
        if bool(first.without) == all_kinds:
            continue
        guess: Guess | None = first
        for _ in range(MOST_REPAIRS):
            if guess is None or reasons.total() > MOST_RUNS:
                break
            try:
                inputs = make(model, guess, seed)
                layout = str({name: tensor.shape for name, tensor in inputs.items()})
                if layout in tried:
                    break
                tried.add(layout)
                if any(t.is_floating_point() for t in forward_only(lambda: model(**inputs)).outputs):  # noqa: B023
                    return inputs, " ".join(f"no {kind}" for kind in sorted(guess.without))
                raise ValueError("no output of floats")
            except Exception as error:  # noqa: BLE001 - inputs may be wrong in any way; the error leads to better ones
                reasons[reason(error)] += 1
                guess = repair(guess, str(error))
    return None


def reason(error: BaseException) -> str:
    """Returns an error in one line, with the place that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({Path(last[0].filename).name}:{last[0].lineno})" if last else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:110]}{where}"


def run(sample: Sample) -> list[Tensor]:
    """Runs the model once without autograd and returns all its output tensors."""
    return run_outcome(sample).outputs


def run_with_grad(sample: Sample) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Runs the model, sends a fixed projection of its outputs backward, and returns outputs and gradients by name."""
    outcome = grad_outcome(sample)
    return outcome.outputs, outcome.grads


def run_outcome(sample: Sample) -> Outcome:
    return forward_only(lambda: sample.model(**fresh(sample)))


def grad_outcome(sample: Sample) -> Outcome:
    return forward_backward(lambda: sample.model(**fresh(sample)), dict(sample.model.named_parameters()))


def fresh(sample: Sample) -> dict[str, Tensor]:
    """Returns copies of the inputs, because a model may write into them."""
    return {name: tensor.clone() for name, tensor in sample.inputs.items()}
