"""Small random models of every transformers type, with inputs that they accept.

`build` takes the first class, recipe and guess at the inputs with which the model runs; all of it is a function of the
type and the seed.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from inputs import guesses, make, repair
from small_config import RECIPES, Recipe, small_config

transformers.logging.set_verbosity_error()


class CannotBuild(Exception):
    """No class, recipe and inputs were found with which the type runs."""


@dataclass(frozen=True)
class Sample:
    model_type: str
    class_name: str
    model: PreTrainedModel
    inputs: dict[str, Tensor]
    nbytes: int
    largest: int
    note: str = ""


def model_types() -> list[str]:
    return sorted(CONFIG_MAPPING_NAMES)


PREFERRED = (
    "FOR_IMAGE_TEXT_TO_TEXT", "FOR_MULTIMODAL_LM", "FOR_SEQ_TO_SEQ_CAUSAL_LM", "FOR_SPEECH_SEQ_2_SEQ", "FOR_CAUSAL_LM", "FOR_MASKED_LM", "FOR_CTC", "FOR_OBJECT_DETECTION",
    "FOR_UNIVERSAL_SEGMENTATION", "FOR_IMAGE_CLASSIFICATION", "FOR_AUDIO_CLASSIFICATION", "FOR_DEPTH_ESTIMATION",
)


def classes(model_type: str) -> list[type[PreTrainedModel]]:
    """Returns the model classes of a type, task heads first."""
    config_class = CONFIG_MAPPING[model_type]
    heads: list[str] = []
    for task in (*PREFERRED, ""):
        mapping = getattr(modeling_auto, f"MODEL_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES")
        if name := mapping.get(model_type):
            heads += [name] if isinstance(name, str) else list(name)
    own: list[type[PreTrainedModel]] = []
    for file in sorted(Path(inspect.getfile(config_class)).parent.glob("modeling_*.py")):
        try: module = importlib.import_module(f"{config_class.__module__.rpartition('.')[0]}.{file.stem}")
        except ImportError as e: continue
        own += [c for c in vars(module).values() if is_model_of(c, config_class, module.__name__)]
    own = [c for c in own if not c.__name__.endswith("PreTrainedModel")]
    order = {name: i for i, name in reversed(list(enumerate(heads)))}
    return sorted(own, key=lambda c: order.get(c.__name__, 99))


def is_model_of(thing: object, config_class: type, module: str) -> bool:
    return inspect.isclass(thing) and issubclass(thing, PreTrainedModel) and thing.__module__ == module and thing.config_class is config_class


def flatten(out: object, seen: set[int] | None = None) -> list[Tensor]:
    """Returns every tensor in a nest of containers and plain objects, in order."""
    seen = set() if seen is None else seen
    if id(out) in seen: return []
    if isinstance(out, Tensor): return [out]
    if out is None or isinstance(out, (str, int, float, bool)): return []
    seen.add(id(out))
    if isinstance(out, dict): items = list(out.values())
    elif isinstance(out, (list, tuple)): items = list(out)
    elif isinstance(out, (nn.Module, PretrainedConfig)): items = []
    else: items = list(getattr(out, "__dict__", {}).values())
    return [t for item in items for t in flatten(item, seen)]


def instance(cls, recipe, seed, start=None):
    config = small_config(cls.config_class, recipe, start or {})
    with torch.device("meta"):
        size = sum(p.numel() * p.element_size() for p in cls(config).parameters())
    if size > MAX_BYTES:
        raise MemoryError(f"{size >> 20} MiB")
    torch.manual_seed(seed)
    model = cls(config).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.copy_(torch.nan_to_num(p, 0, 0, 0) + 0.02 * torch.randn(p.shape, generator=noise))
    return model


def forward(model, inputs):
    torch.manual_seed(0)
    out = flatten(model(**inputs))
    if not any(t.is_floating_point() for t in out):
        raise ValueError("no float output")
    return out


def fitting(model, seed, log, dropped=True):
    for guess in guesses(model):
        if guess.without and not dropped: return None
        for _ in range(6):
            try:
                inputs = make(model, guess, seed)
                with torch.no_grad():
                    forward(model, inputs)
                return inputs, guess
            except Exception as e:
                log.append((str(guess), describe(e)))
                guess = repair(guess, str(e))
                if guess is None: break
    return None


def describe(e):
    import traceback
    tb = traceback.extract_tb(e.__traceback__)[-1]
    return f"{type(e).__name__}: {str(e)[:160]} @{Path(tb.filename).name}:{tb.lineno}"

MAX_BYTES = 16 << 20

def build(model_type: str, seed: int = 0, log=None) -> Sample:
    log = [] if log is None else log
    for dropped in (False, True):
      for cls in classes(model_type)[:4]:
        for i, recipe in enumerate(RECIPES):
            try:
                model = instance(cls, recipe, seed)
            except Exception as e:
                log.append((cls.__name__, i, describe(e)))
                continue
            tensors = {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
            size = sum(tensors.values())
            if size > MAX_BYTES:
                log.append((cls.__name__, i, f"{size >> 20} MiB"))
                continue
            tries = []
            found = fitting(model, seed, tries, dropped)
            if found:
                return Sample(model_type, cls.__name__, model, found[0], size, max(tensors.values()), f"r{i} {found[1]}")
            log.append((cls.__name__, i, tries))
        if not any("input_ids" in inspect.signature(c.forward).parameters for c in classes(model_type)[:4]): break
    raise CannotBuild(model_type)
