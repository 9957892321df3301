"""Whole pipelines under one budget: what each of their models moves, run by run, and whether the result stays the same.

    python bench/pipelines.py                                   # all of them
    python bench/pipelines.py --only PixArt --gpu 0.6 --cpu 0.2

Pipelines of diffusers and transformers with small random models, built in code. Each is run plainly for two seeds, then
`--runs` times under `tiered(pipe, ...)`, whose fast tier and RAM hold the given shares of its bytes, and plainly again. The
results must be the same, bit for bit.

"moved" are bytes that came into the fast tier from RAM or disk, by the model they belong to; "from disk", those that were read
from the disk, into either. "per call" is for a call of the model in the last run: a step of the sampler, a token. "least" is
what no policy can go below per call for the model in the loop: its bytes less the whole fast tier.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from small_pipelines import MAKERS, Small, make
from torch.utils._pytree import tree_leaves

from tierstore import Tiered, format_size, tiered
from tierstore.parts import find_parts

FAST = "gpu"
COLUMNS = ("pipeline", "model", "weights", "calls", "moved, run 1", "moved, last run", "from disk", "per call", "least", "same result")


@dataclass
class Row:
    """One model of a pipeline. `moved` and `read`: bytes in each run; `least`: bytes per call, None where it is not in the loop."""

    model: str
    nbytes: int
    calls: int
    moved: list[int]
    read: list[int]
    least: int | None


@dataclass
class Outcome:
    """What was found about one pipeline; `same` has whether the result was that of the plain one, for each run and afterwards."""

    name: str
    rows: list[Row]
    same: list[bool]
    within_budget: bool


def nbytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def widest(module: torch.nn.Module) -> int:
    """Return the bytes of the largest set of tensors that one module owns directly: what has to fit at once."""
    own = ((*part.parameters(recurse=False), *part.buffers(recurse=False)) for part in module.modules())
    return max(sum(tensor.nbytes for tensor in tensors) for tensors in own)


def same(a: object, b: object) -> bool:
    """True if two results consist of equal values, tensors bit for bit."""
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(left, right, strict=True)
    )


def counts(session: Tiered, models: list[str]) -> Counter[tuple[str, str]]:
    """Return the bytes that each link carried so far for each model."""
    with tempfile.TemporaryDirectory() as folder:
        session.timeline(Path(folder, "trace.json"))
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    found: Counter[tuple[str, str]] = Counter()
    for event in events:
        if "->" in event.get("cat", ""):
            model = next(name for name in models if event["name"].startswith(f"{name}."))
            found[model, event["cat"]] += event["args"]["bytes"]
    return found


@contextmanager
def counted_calls(models: dict[str, torch.nn.Module]) -> Iterator[dict[str, int]]:
    """Count the calls of each model; of one that is used by its parts, such as a decoder, those of the part called most."""
    calls: dict[str, int] = dict.fromkeys(models, 0)
    seen: Counter[torch.nn.Module] = Counter()
    handles = [
        part.register_forward_pre_hook(lambda module, _: seen.update([module]))
        for model in models.values()
        for part in (model, *model.children())
    ]
    yield calls
    for handle in handles:
        handle.remove()
    for name, model in models.items():
        calls[name] = seen[model] or max((seen[part] for part in model.children()), default=0)


def budgets(models: dict[str, torch.nn.Module], gpu: float, cpu: float) -> tuple[int, int]:
    """Return the bytes of the fast tier and of RAM; two of the largest modules have to fit into the first."""
    total = sum(map(nbytes, models.values()))
    return max(int(gpu * total), 2 * max(map(widest, models.values()))), int(cpu * total)


def measure(name: str, gpu: float = 0.4, cpu: float = 0.3, runs: int = 3) -> Outcome:
    """Run one pipeline plainly, tiered and plainly again."""
    small: Small = make(name)
    models = find_parts(small.pipe).modules
    expected = [small(0), small(1)]
    with counted_calls(models) as calls:
        small(0)
    fast, ram = budgets(models, gpu, cpu)
    totals: list[Counter[tuple[str, str]]] = [Counter()]
    equal = []
    with tempfile.TemporaryDirectory() as folder, tiered(small.pipe, gpu=fast, cpu=ram, disk=folder, device="cpu") as session:
        for run in range(runs):
            if run == 0:
                totals = [counts(session, list(models))]
            equal.append(same(small(run % 2), expected[run % 2]))
            totals.append(counts(session, list(models)))
        inside = all(tier.budget_bytes is None or tier.peak_bytes <= tier.budget_bytes for tier in session.stats().tiers.values())
    equal.append(same(small(0), expected[0]))
    rows = []
    for model, module in models.items():
        carried = [{link: after[model, link] - before[model, link] for _, link in after} for before, after in pairwise(totals)]
        moved = [sum(nbytes for link, nbytes in links.items() if link.endswith(f"->{FAST}")) for links in carried]
        read = [sum(nbytes for link, nbytes in links.items() if link.startswith("disk->")) for links in carried]
        least = max(0, nbytes(module) - fast) if model == small.looped else None
        rows.append(Row(model, nbytes(module), calls[model], moved, read, least))
    return Outcome(name, rows, equal, inside)


def table_of(outcomes: list[Outcome]) -> Table:
    table = Table(box=MARKDOWN)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("pipeline", "model", "same result") else "right", overflow="fold")
    for outcome in outcomes:
        for row in outcome.rows:
            verdict = "yes" if all(outcome.same) else f"NO: {outcome.same}"
            table.add_row(
                outcome.name,
                row.model,
                format_size(row.nbytes),
                str(row.calls),
                format_size(row.moved[0]),
                format_size(row.moved[-1]),
                format_size(row.read[-1]),
                format_size(row.moved[-1] // max(1, row.calls)),
                "" if row.least is None else format_size(row.least),
                verdict if outcome.within_budget else f"{verdict}, OVER BUDGET",
            )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MAKERS), default=list(MAKERS), metavar="NAME", help=f"of {', '.join(MAKERS)}")
    parser.add_argument("--gpu", type=float, default=0.4, help="share of a pipeline's bytes in the fast tier (default: %(default)s)")
    parser.add_argument("--cpu", type=float, default=0.3, help="share in RAM; the rest is on disk (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the models are too small to share among threads
    outcomes = [measure(name, options.gpu, options.cpu, options.runs) for name in options.only]
    Console(width=200, highlight=False).print(table_of(outcomes))
    return 0 if all(all(outcome.same) and outcome.within_budget for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
