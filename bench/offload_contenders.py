"""The child processes of `cpu_offload.py`: each holds one contender and runs a pass whenever its parent asks for one.

A child is told its task as JSON on the command line. It answers on its standard output, one JSON object a line; whatever
libraries print goes to its standard error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TextIO

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from offload_model import Decoder, Shape, loaded_decoder, mapped_decoder, random_decoder, save
from raw_speed import RawReader
from torch import Tensor

from tierstore import tiered

Answer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """What one child is told: "prepare", "calibrate" or "run"; a contender, the model's shape, a budget, where files are."""

    action: str
    contender: str
    shape: Shape
    budget: int
    place: str
    tokens: tuple[int, ...]

    def dumps(self) -> str:
        return json.dumps(vars(self) | {"shape": self.shape.told()})

    @classmethod
    def loads(cls, text: str) -> Task:
        told = json.loads(text)
        return cls(**told | {"shape": Shape(**told["shape"]), "tokens": tuple(told["tokens"])})

    @property
    def source(self) -> Path:
        """The checkpoint from which everything is made. No contender reads it in a pass, as maps of one file share pages."""
        return Path(self.place, "weights.safetensors")

    @property
    def own(self) -> Path:
        """The directory that only this contender reads."""
        return Path(self.place, self.contender)

    def expected(self, tokens: int) -> Path:
        return Path(self.place, f"expected-{tokens}.pt")


class UnableError(RuntimeError):
    """A contender cannot do what is asked with this budget, which `short` says in two words."""

    def __init__(self, short: str, story: str) -> None:
        super().__init__(story)
        self.short = short


class Contender(ABC):
    """One way to run the decoder; `family` are those that import the same libraries, which `modules` names.

    `shares`: parts of the budget that it may be told, the largest first; the first with which it is not killed is used.
    """

    family: str
    modules: tuple[str, ...] = ()
    shares: tuple[float, ...] = (1.0,)
    capped = True

    def prepare(self, task: Task) -> None:  # noqa: B027  one has no format of its own
        """Write the weights in this contender's own format to `task.own`; done once, without a cap."""

    @abstractmethod
    def start(self, task: Task) -> Answer:
        """Set up and return what runs a pass."""

    def stop(self) -> None:  # noqa: B027  most have nothing to do
        """Undo what `start` did."""


class Plain(Contender):
    family, capped = "plain", False

    def prepare(self, task: Task) -> None:
        model = random_decoder(task.shape)
        save(model, task.source)
        for tokens in task.tokens:
            torch.save(run_pass(model, task.shape.ids(tokens)), task.expected(tokens))

    def start(self, task: Task) -> Answer:
        return loaded_decoder(task.shape, task.source)


class Unmanaged(Plain):
    """A plain pass while others read the bytes that cannot be there, neither of which waits for the other: what overlapping costs."""

    def prepare(self, task: Task) -> None:
        """Everything is there."""

    def start(self, task: Task) -> Answer:
        model = loaded_decoder(task.shape, task.source)
        self.disk = RawReader(task.source)

        def answer(ids: Tensor) -> Tensor:
            reading = self.disk.begin(max(0, task.shape.touched(ids.numel()) - task.budget))
            logits: Tensor = model(ids)
            for part in reading:
                part.result()
            return logits

        return answer

    def stop(self) -> None:
        self.disk.__exit__(None, None, None)


class Tierstore(Contender):
    family = "tierstore"

    def start(self, task: Task) -> Answer:
        shutil.rmtree(task.own, ignore_errors=True)  # what one that was killed left behind
        task.own.mkdir()
        model = mapped_decoder(task.shape, task.source)
        self.session = tiered(model, cpu=task.budget, disk=task.own, device="cpu")
        return model

    def stop(self) -> None:
        self.session.close()


class Mapped(Contender):
    """A map of a safetensors file, where the kernel's page cache decides what stays."""

    family = "mmap"

    def prepare(self, task: Task) -> None:
        save(loaded_decoder(task.shape, task.source), task.own / "weights.safetensors")

    def start(self, task: Task) -> Answer:
        return mapped_decoder(task.shape, task.own / "weights.safetensors")


class AccelerateDisk(Contender):
    """`disk_offload`: every weight is read when its module runs, and dropped afterwards."""

    family, modules = "accelerate", ("accelerate",)

    def prepare(self, task: Task) -> None:
        from accelerate.utils import offload_state_dict

        offload_state_dict(task.own, mapped_decoder(task.shape, task.source).state_dict())

    def start(self, task: Task) -> Answer:
        from accelerate import disk_offload

        return disk_offload(mapped_decoder(task.shape, task.source), task.own, execution_device=torch.device("cpu"))


class AccelerateMax(AccelerateDisk):
    """`infer_auto_device_map` and `dispatch_model`: what `max_memory` allows stays in memory, the rest as in `disk_offload`."""

    shares = (1.0, 0.9, 0.8, 0.6, 0.4)

    def start(self, task: Task) -> Answer:
        from accelerate import dispatch_model, infer_auto_device_map

        model = mapped_decoder(task.shape, task.source)
        places = infer_auto_device_map(model, max_memory={"cpu": task.budget})
        if all(place == "disk" for place in places.values()):
            raise UnableError("keeps none", "infer_auto_device_map keeps nothing in memory, so this would be accelerate-disk")
        for name, parameter in model.named_parameters():
            if any(name == place or name.startswith(f"{place}.") for place, device in places.items() if device != "disk"):
                parameter.data = parameter.data.clone()  # else the part that is kept would be a map, which is dropped under pressure
        return dispatch_model(model, places, main_device="cpu", offload_dir=task.own)


class DiffusersBlock(Contender):
    """Group offload to disk, one block at a time; it keeps nothing between passes, whatever the budget."""

    family, modules = "diffusers", ("diffusers", "accelerate")
    level: ClassVar[dict[str, Any]] = {"offload_type": "block_level", "num_blocks_per_group": 1, "block_modules": ["model"]}

    def offload(self, model: Decoder, task: Task) -> Decoder:
        from diffusers.hooks import apply_group_offloading

        cpu = torch.device("cpu")
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_to_disk_path=str(task.own), **self.level)
        return model

    def prepare(self, task: Task) -> None:
        self.offload(loaded_decoder(task.shape, task.source), task)

    def start(self, task: Task) -> Answer:
        return self.offload(mapped_decoder(task.shape, task.source), task)  # its files are there already, so it only reads them


class DiffusersLeaf(DiffusersBlock):
    """Group offload to disk, one layer at a time."""

    level: ClassVar[dict[str, Any]] = {"offload_type": "leaf_level"}


class AirLLM(Contender):
    """Reads one decoder layer after the other, the next one in a thread while the last one runs."""

    family, modules = "airllm", ("airllm", "transformers", "accelerate")

    def open(self, task: Task) -> Any:
        from airllm.airllm_base import AirLLMBaseModel

        class WithoutTokenizer(AirLLMBaseModel):
            def get_tokenizer(self, hf_token: str | None = None) -> None:
                return None

        return WithoutTokenizer(str(task.own), device="cpu")

    def prepare(self, task: Task) -> None:
        (task.own / "config.json").write_text(json.dumps(task.shape.config()))
        (task.own / "model.safetensors").symlink_to(task.source)
        self.open(task)

    def start(self, task: Task) -> Answer:
        model = self.open(task)
        return lambda ids: model(ids, use_cache=False).logits


CONTENDERS: dict[str, type[Contender]] = {
    "plain": Plain,
    "unmanaged": Unmanaged,
    "tierstore": Tierstore,
    "accelerate-disk": AccelerateDisk,
    "accelerate-max": AccelerateMax,
    "diffusers-leaf": DiffusersLeaf,
    "diffusers-block": DiffusersBlock,
    "airllm": AirLLM,
    "mmap": Mapped,
}


# -- in the child -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_pass(answer: Answer, ids: Tensor) -> Tensor:
    return answer(ids)


def read_bytes() -> int:
    """Return how many bytes this process, with all its threads, has had read from disks."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"])


def digest(output: Tensor) -> str:
    return hashlib.sha256(output.contiguous().view(torch.uint8).numpy().data).hexdigest()


def timed_pass(answer: Answer, task: Task, tokens: int) -> dict[str, Any]:
    """Run one pass; return its seconds, the bytes it had read, and the digest of its output."""
    ids = task.shape.ids(tokens)
    before, started = read_bytes(), time.perf_counter()
    output = run_pass(answer, ids)
    seconds, read = time.perf_counter() - started, read_bytes() - before
    return {"seconds": seconds, "read": read, "digest": digest(output)}


def difference(answer: Answer, task: Task, tokens: int) -> dict[str, Any]:
    """Run one pass that is not timed, and return the largest difference between its output and the plain one."""
    expected = torch.load(task.expected(tokens), weights_only=True)
    return {"difference": (run_pass(answer, task.shape.ids(tokens)).float() - expected.float()).abs().max().item()}


def prepare(contender: Contender, task: Task) -> Iterator[dict[str, Any]]:
    task.own.mkdir(exist_ok=True)
    contender.prepare(task)
    yield {"digests": [digest(torch.load(task.expected(tokens), weights_only=True)) for tokens in task.tokens]}


def calibrate(contender: Contender, task: Task) -> Iterator[dict[str, Any]]:
    """Run the largest pass on one layer in memory with the contender's libraries imported: what is held but weights."""
    for module in contender.modules:
        __import__(module)
    shape = task.shape.with_layers(1)
    model = random_decoder(shape)
    for tokens in (*task.tokens, max(task.tokens)):
        digest(run_pass(model, shape.ids(tokens)))
    yield {"weights": shape.bytes}


def run(contender: Contender, task: Task) -> Iterator[dict[str, Any]]:
    started = time.perf_counter()
    answer = contender.start(task)
    yield {"set_up": time.perf_counter() - started}
    for line in sys.stdin:
        wish, tokens = line.split()
        yield (timed_pass if wish == "pass" else difference)(answer, task, int(tokens))
    contender.stop()


ACTIONS = {"prepare": prepare, "calibrate": calibrate, "run": run}


def take_standard_output() -> TextIO:
    """Return a stream to the standard output, and send what anybody else prints to the standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def main() -> int:
    answers = take_standard_output()
    task = Task.loads(sys.argv[1])
    try:
        for told in ACTIONS[task.action](CONTENDERS[task.contender](), task):
            print(json.dumps(told), file=answers)
    except Exception as error:  # whatever a peer raises goes into its cell
        short = error.short if isinstance(error, UnableError) else "error"
        print(json.dumps({"error": f"{type(error).__name__}: {error}", "short": short}), file=answers)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
