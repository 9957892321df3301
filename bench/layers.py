"""Runs every module of torch's own test database plainly and tiered, and compares bit for bit.

    python bench/layers.py [--only NAME ...] [--peers]

Compared are the outputs, the gradients of the inputs and of the parameters, and the buffers after the step; for inputs that
need no gradient also the outputs under `no_grad`, which takes another path.
"""

import argparse
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import product

import torch
from exact import Outcome, accelerate_offload, difference, forward_backward, forward_only, seed_all, state_of, tensors_in, tiered_run
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.testing._internal.common_modules import FunctionInput, module_db
from torch.utils._pytree import tree_map_only

Runner = Callable[[nn.Module, Callable[[], Outcome]], Outcome]


@dataclass(frozen=True)
class Case:
    """One module class with one of its sample inputs, and how it is run."""

    name: str
    number: int
    description: str
    module_class: type[nn.Module]
    constructor: FunctionInput
    inputs: FunctionInput
    training: bool
    requires_grad: bool

    def __str__(self) -> str:
        mode = f"{'train' if self.training else 'eval'}, {'grad' if self.requires_grad else 'no grad'}"
        return f"{self.name}[{self.number}{' ' + self.description if self.description else ''}, {mode}]"

    @property
    def lazy(self) -> bool:
        """Whether the module has no weights until its first call, so that there is nothing to tier."""
        return issubclass(self.module_class, LazyModuleMixin)

    def build(self) -> nn.Module:
        seed_all()
        arguments = deepcopy((self.constructor.args, self.constructor.kwargs))
        return self.module_class(*arguments[0], **arguments[1]).to(torch.float32).train(self.training)

    def fresh_inputs(self) -> tuple[tuple[object, ...], dict[str, object]]:
        """Returns copies of the inputs, because a module may write into them and gradients add up in them."""
        again = tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), [*self.inputs.args])
        named = tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), dict(self.inputs.kwargs))
        return tuple(again), named


def cases(only: frozenset[str] = frozenset()) -> Iterator[Case]:
    """Yields every sample of every module in torch's database, for float32 on the CPU; `only` names modules."""
    for info, training, requires_grad in product(module_db, (True, False), (True, False)):
        if only and not only & {info.name, info.name.removeprefix("nn.")}:
            continue
        seed_all()
        samples = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=requires_grad, training=training)
        for number, sample in enumerate(samples):
            given = sample.forward_input or FunctionInput()
            yield Case(info.name, number, sample.desc, info.module_cls, sample.constructor_input, given, training, requires_grad)


def step(case: Case, module: nn.Module) -> Outcome:
    """Runs forward and backward once."""
    args, kwargs = case.fresh_inputs()
    leaves = {f"input {i}": t for i, t in enumerate(tensors_in([args, kwargs])) if t.requires_grad}
    return forward_backward(lambda: module(*args, **kwargs), leaves | dict(module.named_parameters()))


def glance(case: Case, module: nn.Module) -> Outcome:
    """Runs forward once without autograd."""
    args, kwargs = case.fresh_inputs()
    return forward_only(lambda: module(*args, **kwargs))


def run_tiered(module: nn.Module, run: Callable[[], Outcome]) -> Outcome:
    return tiered_run(module, run)[0]


def run_accelerate(module: nn.Module, run: Callable[[], Outcome]) -> Outcome:
    with accelerate_offload(module):
        return run()


def compare(case: Case, runner: Runner) -> str:
    """Says in what a runner's outputs and gradients differ from the plain module's, and its state afterwards."""
    for run in (step,) if case.requires_grad else (step, glance):
        plain, other = case.build(), case.build()
        expected = run(case, plain)
        if found := difference(expected, runner(other, lambda run=run, other=other: run(case, other))):
            return f"{run.__name__}: {found}"
        if runner is run_tiered and (found := difference(state_of(plain), state_of(other))):
            return f"{run.__name__}: state afterwards: {found}"
    return ""


def check(case: Case) -> str | None:
    """Says how a module behaves differently when tiered; None if it is the same bit for bit."""
    return compare(case, run_tiered) or None


def judge(case: Case, runner: Runner) -> str:
    """Returns what `compare` says or what it raised, in one line."""
    try:
        return compare(case, runner)
    except Exception as error:  # noqa: BLE001 - whatever a module raises is a finding, and the sweep goes on
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="torch's module test database, plain against tiered, bit for bit")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="modules such as Linear or nn.LSTM")
    parser.add_argument("--peers", action="store_true", help="do the same with accelerate's disk_offload")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    runners: dict[str, Runner] = {"tiered": run_tiered} | ({"accelerate": run_accelerate} if chosen.peers else {})
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    failures: list[tuple[str, Case, str]] = []
    lazy: Counter[str] = Counter()
    console = Console(width=150)
    for case in track(list(cases(frozenset(chosen.only))), "modules", console=console, transient=True):
        if case.lazy:
            lazy[case.name] += 1
            continue
        counts[case.name]["cases"] += 1
        for label, runner in runners.items():
            found = judge(case, runner)
            counts[case.name][label] += not found
            counts[case.name][f"{label} outputs"] += not found or found.startswith("step: gradient")
            if found:
                failures.append((label, case, found))
    report(console, list(runners), counts, failures, lazy)


def report(
    console: Console, labels: list[str], counts: dict[str, Counter[str]], failures: list[tuple[str, Case, str]], lazy: Counter[str]
) -> None:
    """Prints the modules that differ, each different reason once, and the totals."""
    columns = [column for label in labels for column in (f"{label} outputs", label)]
    table = Table("module", "cases", *columns, title="torch's module database: cases equal bit for bit")
    for name, count in counts.items():
        table.add_row(name, str(count["cases"]), *[str(count[column]) for column in columns])
    console.print(table)
    shown: Counter[tuple[str, str, str]] = Counter((label, case.name, found) for label, case, found in failures)
    for (label, name, found), times in shown.items():
        console.print(f"{label}: {name} ({times}x): {found}", markup=False)
    console.print(f"set aside, no weights until first called: {', '.join(f'{n} ({c})' for n, c in lazy.items()) or 'none'}")
    total = sum(c["cases"] for c in counts.values())
    for label in columns:
        equal = sum(c[label] for c in counts.values())
        whole = sum(c[label] == c["cases"] for c in counts.values())
        console.print(f"{label}: {equal} of {total} cases equal bit for bit; {whole} of {len(counts)} modules in all cases")


if __name__ == "__main__":
    main()
