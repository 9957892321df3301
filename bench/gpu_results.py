"""What one run of `gpu_offload.py` has found out so far, to and from JSON, and on the screen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_ceilings import Ceilings
from gpu_rows import Row, TierRow
from gpu_tables import show_ceilings, show_rows, tier_table
from rich.console import Console

from tierstore import format_size


@dataclass
class Results:
    """`allowances`: by model and number of tokens, bytes that the device may hold beside the budget."""

    contenders: list[str]
    allowances: dict[str, int] = field(default_factory=dict)
    ceilings: Ceilings = field(default_factory=Ceilings)
    rows: list[Row] = field(default_factory=list)
    tiers: list[TierRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def write(self, file: Path) -> None:
        """Write it as JSON, so that whoever is killed meanwhile leaves the version before."""
        draft = file.with_name(f"{file.name}.part")
        draft.write_text(json.dumps(asdict(self), indent=1))
        draft.replace(file)

    @classmethod
    def read(cls, file: Path) -> Results:
        told: dict[str, Any] = json.loads(file.read_text())
        parts = {
            "ceilings": ceilings_from(told["ceilings"]),
            "rows": [Row(**row) for row in told["rows"]],
            "tiers": [TierRow(**row) for row in told["tiers"]],
        }
        return cls(**told | parts)

    def show(self, console: Console, shown: int | None = None) -> None:
        """Print everything; after ceilings and the first `shown` rows have been printed, the rest."""
        if shown is None:
            show_ceilings(console, self.ceilings)
        show_rows(console, self.rows[shown:], self.contenders)
        if self.tiers:
            console.print(tier_table(self.tiers))
        for name, size in self.allowances.items():
            console.print(f"allowance for {name}: {format_size(size)}", markup=False, style="dim")
        for note in self.notes:
            console.print(f"- {note}", markup=False)


def ceilings_from(told: dict[str, Any]) -> Ceilings:
    """Return the ceilings that JSON tells of, where pairs are lists."""
    pairs = {name: [(int(chunk), float(rate)) for chunk, rate in told[name]] for name in ("h2d", "d2h", "both")}
    return Ceilings(**told | pairs)
