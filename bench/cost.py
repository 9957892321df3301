"""What an access costs when every weight that is used is in the fast tier.

    python bench/cost.py [--seconds 6]

Microseconds for one module that owns weights, and the ratio to the plain model's. The contenders take turns in one
process; each number is the median over all turns, and ratios and differences are taken within a turn.

- held:     the whole model fits into the budget, so nothing is wrapped;
- scope:    the model does not fit, because of a part that is never used; without gradients each module's call hands out
            plain tensors;
- wrapper:  the same model with gradients, forward and backward: every operation goes through a TieredTensor.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle

import torch
from memory_cap import WIDTH, Block
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tierstore import Tier, Tiered, TieredStore, open_backend, tiered

Step = Callable[[nn.Module, Tensor], object]


@dataclass(frozen=True)
class Case:
    """Layers of one kind in a row; `calls` of them are timed as one, where one is too short for the clock."""

    name: str
    layer: Callable[[], nn.Module]
    layers: int
    x: Tensor
    calls: int = 1

    @property
    def modules(self) -> int:
        """How many modules that own weights one call passes through."""
        with torch.device("meta"):
            return self.layers * sum(1 for m in self.layer().modules() if m._parameters)


CASES = (
    Case("Linear 16x16, batch 1", lambda: nn.Linear(16, 16), 32, torch.randn(1, 16), calls=10),
    Case("Linear 4096x4096, batch 1", lambda: nn.Linear(4096, 4096), 2, torch.randn(1, 4096)),
    Case("Linear 4096x4096, batch 64", lambda: nn.Linear(4096, 4096), 2, torch.randn(64, 4096)),
    Case("transformer block, 1 token", Block, 2, torch.randn(1, 1, WIDTH)),
    Case("transformer block, 64 tokens", Block, 2, torch.randn(1, 64, WIDTH)),
)


class WithSpare(nn.Module):
    """Layers in a row, and one more that is never used."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layers, self.spare = nn.Sequential(*(case.layer() for _ in range(case.layers))), case.layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> None:
    model(x)


def backward(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


def size_of(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def contenders(case: Case, disk: str, stack: ExitStack) -> tuple[dict[str, nn.Module], Tiered]:
    """Return equal models: plain, held, and one byte short of fitting; and the last one's session."""
    plain = WithSpare(case)
    held, short = copy.deepcopy(plain), copy.deepcopy(plain)
    stack.enter_context(tiered(held, device="cpu"))
    session = stack.enter_context(tiered(short, cpu=size_of(plain) - 1, disk=disk, device="cpu"))
    return {"plain": plain, "held": held, "tiered": short}, session


def take_turns(models: dict[str, nn.Module], case: Case, step: Step, limit: float) -> dict[str, list[float]]:
    """Return the microseconds of a module for each contender and turn, over `limit` seconds and at least ten turns."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    unit = 1e6 / case.calls / case.modules
    until = time.perf_counter() + limit
    for order in orders(list(models)):
        for name in order:
            started = time.perf_counter()
            for _ in range(case.calls):
                step(models[name], case.x)
            taken[name].append((time.perf_counter() - started) * unit)
        if time.perf_counter() > until and len(taken["plain"]) > 10:
            break
    return {name: times[1:] for name, times in taken.items()}


def orders(names: list[str]) -> Iterator[list[str]]:
    """Yield the names for ever, another one first each time, so that none always follows the same one."""
    return cycle([names[i:] + names[:i] for i in range(len(names))] + [names[i::-1] + names[:i:-1] for i in range(len(names))])


def measure(case: Case, disk: str, limit: float, table: Table) -> None:
    """Add two rows to `table`; raise if a weight that is used ever left the fast tier."""
    with ExitStack() as stack:
        models, session = contenders(case, disk, stack)
        for what, step in (("scope", forward), ("wrapper", backward)):
            for model in models.values():
                step(model, case.x)
            before = session.stats().misses
            taken = take_turns(models, case, step, limit)
            if session.stats().misses != before:
                raise RuntimeError(f"{case.name}: weights left the fast tier, so these are no costs of hits")
            add_row(table, case, what, taken)


def add_row(table: Table, case: Case, what: str, taken: dict[str, list[float]]) -> None:
    plain = taken["plain"]
    cells = [f"{statistics.median(plain):.1f}"]
    for name in ("held", "tiered"):
        ratio = statistics.median(other / base for other, base in zip(taken[name], plain, strict=True))
        cells += [f"{statistics.median(taken[name]):.1f}", f"{ratio:.3f}"]
    more = statistics.median(other - base for other, base in zip(taken["tiered"], plain, strict=True))
    mode = "forward" if what == "scope" else "forward+backward"
    table.add_row(case.name, str(case.modules), mode, *cells[:3], what, *cells[3:], f"{more:+.1f}", str(len(plain)))


def median_of(action: Callable[[], object], calls: int = 2000, rounds: int = 25) -> float:
    """Return the seconds of one call: the median over rounds of many."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            action()
        taken.append((time.perf_counter() - started) / calls)
    return statistics.median(taken)


def store_costs(console: Console) -> None:
    """Print what `get` and `lease` cost for a value that is resident, beside a dict lookup."""
    with TieredStore([Tier("cpu", open_backend("device", "cpu"), "1MiB")]) as store:
        plain = {f"key{i}": torch.randn(16, 16) for i in range(100)}
        for key, tensor in plain.items():
            store.put(key, tensor)

        def lease() -> None:
            with store.lease("key50"):
                pass

        costs = {"dict lookup": lambda: plain["key50"], "store.get hit": lambda: store.get("key50"), "store.lease hit": lease}
        console.print(", ".join(f"{name} {median_of(action) * 1e6:.2f} us" for name, action in costs.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each row (default: %(default)s)")
    options = parser.parse_args()
    console = Console(width=140, highlight=False)
    table = Table(title=f"microseconds per module ({torch.get_num_threads()} threads)", title_justify="left")
    for name in ("layer", "modules", "mode", "plain", "held", "ratio", "way", "tiered", "ratio", "more", "turns"):
        table.add_column(name, justify="left" if name in ("layer", "mode", "way") else "right")
    with tempfile.TemporaryDirectory() as disk:
        for case in CASES:
            measure(case, disk, options.seconds, table)
    console.print(table)
    store_costs(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
