"""`python -m tierstore generate`: a language model continues a text, with its weights in tiers and its checkpoint as the disk."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tierstore.commands.quiet import quiet
from tierstore.commands.showing import count, dtype, remarks, size
from tierstore.errors import BackendError, CheckpointError
from tierstore.pretrained import explained, from_pretrained, transformers_library

_EPILOG = """\
The text goes to stdout as it is made, everything else to stderr. The checkpoint's files are read where they lie, and nothing
is written to them; --disk is for what has to be written, if anything.

example: tierstore generate /models/llama "Why is the sky blue?" --cpu 4GiB --max-new-tokens 64 --report

exit code: 0 for a text, 2 if there is none: a budget that is too small, or a checkpoint that cannot be used
"""
_NEW = 128


def add_command(commands: Any) -> None:
    """Add `generate` to the subparsers of `python -m tierstore`."""
    parser = commands.add_parser(
        "generate",
        help="a language model continues a text inside the budgets",
        description="Continue a text with the model of a checkpoint directory, its weights inside a byte budget for each tier.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="DIR", help="a Hugging Face directory with a tokenizer")
    add("prompt", help="the text to continue, or the question to a chat model; - reads it from stdin")
    add("--gpu", type=size, metavar="SIZE", help="budget of the accelerator's memory, such as 8GiB")
    add("--cpu", type=size, metavar="SIZE", help="budget of RAM, such as 32GiB")
    add("--disk", type=Path, metavar="DIR", help="where scratch files go (default: beside the checkpoint, if there are any)")
    add("--dtype", type=dtype, metavar="DTYPE", help="cast floating weights on the way up (default: as the config says)")
    add("--device", metavar="DEV", help="where to compute, such as cuda or cpu (default: the accelerator if one works)")
    add("--max-new-tokens", type=count, default=_NEW, metavar="N", help="tokens to generate at most (default: %(default)s)")
    add("--chat", action=argparse.BooleanOptionalAction, help="put the text into the model's chat format (default: if it has one)")
    add("--seed", type=int, metavar="N", help="sample, the same each time for one seed (default: the likeliest token each time)")
    add("--report", action="store_true", help="show what lay where and what moved")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Generate; what cannot be done raises."""
    library = transformers_library()
    place = Path(arguments.checkpoint).expanduser()
    if not (place / "config.json").is_file():
        raise CheckpointError(f"{place} is no Hugging Face model directory: it has no config.json; give one that has")
    with quiet(library):
        with explained("a tokenizer", place):
            tokenizer = library.AutoTokenizer.from_pretrained(place, local_files_only=True)
        inputs = _encode(tokenizer, _prompt(arguments.prompt), arguments.chat)
        budgets = {"gpu": arguments.gpu, "cpu": arguments.cpu, "disk": arguments.disk, "device": arguments.device}
        with explained("a language model", place):
            model = from_pretrained(library.AutoModelForCausalLM, place, dtype=arguments.dtype, **budgets)
    try:
        _generate(library, model, tokenizer, inputs, arguments)
        if arguments.report:
            remarks().print(model.tiered.report(), markup=False, end="")
    except torch.OutOfMemoryError as error:
        raise BackendError(f"no memory was left beside the weights: {error}; lower --gpu, or ask for fewer tokens") from error
    finally:
        model.tiered.close()
    return 0


def _prompt(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _encode(tokenizer: Any, prompt: str, chat: bool | None) -> dict[str, torch.Tensor]:
    """Return the prompt as tokens of shape (1, length), with its attention mask."""
    if chat and tokenizer.chat_template is None:
        raise CheckpointError("this tokenizer has no chat format; leave --chat out")
    if chat or (chat is None and tokenizer.chat_template is not None):
        message = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].numel() == 0:
        raise CheckpointError("the prompt has no tokens; give some text")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _generate(library: Any, model: Any, tokenizer: Any, inputs: dict[str, torch.Tensor], arguments: argparse.Namespace) -> None:
    """Write the text to stdout as it is made, and how fast that went to stderr."""
    streamer = library.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    device = model.tiered.device
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    started = time.perf_counter()
    with torch.no_grad(), quiet(library):
        output = model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            max_new_tokens=arguments.max_new_tokens,
            do_sample=arguments.seed is not None,
            streamer=streamer,
        )
    new = output.shape[1] - inputs["input_ids"].shape[1]
    seconds = time.perf_counter() - started
    remarks().print(f"{new} tokens in {seconds:.1f} s, {new / seconds:.2f} tokens/s, the first pass included")
