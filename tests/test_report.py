"""What a person sees of a run: the report, and the timeline."""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from tierstore import Tiered, TierStoreError, tiered


def stack(layers: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(300, 300) for _ in range(layers)))


def run(session: Tiered, model: nn.Module, passes: int) -> None:
    with torch.no_grad():
        for _ in range(passes):
            model(torch.ones(1, 300))


def test_a_report_shows_prediction_limit_and_what_more_memory_buys(scratch: Path) -> None:
    model = stack()
    with tiered(model, cpu="2MiB", disk=scratch) as session:
        assert "plan:" not in session.report()
        run(session, model, 6)
        before = session.stats().links["disk->cpu"].bytes
        run(session, model, 4)
        moved = (session.stats().links["disk->cpu"].bytes - before) / 4
        made, text = session.store.plan, " ".join(session.report().split())
    assert made is not None
    assert abs(moved - made.link_bytes[0]) <= made.ring_bytes[0], "what is fetched ahead across the last snapshot may differ"
    fetched = re.search(r"each repetition fetches ([0-9.]+) MiB in (\d+) copies", text)
    assert fetched is not None
    assert abs(float(fetched[1]) * 2**20 - made.link_bytes[0]) < 0.06 * 2**20
    assert int(fetched[2]) == len(made.order[0])
    larger = re.search(r"a budget of 2.5 MiB would fetch ([0-9.]+) MiB each time", text)
    assert larger is not None
    assert float(larger[1]) < float(fetched[1])
    assert "limit:" in text


def test_a_model_that_fits_has_nothing_to_report(scratch: Path) -> None:
    model = stack()
    with tiered(model, cpu="200MiB", disk=scratch) as session:
        run(session, model, 3)
        assert "plan:" not in session.report()
        assert "everything fits" in session.report()


def test_the_timeline_has_every_copy_and_the_bytes_in_each_tier(scratch: Path, tmp_path: Path) -> None:
    model = stack()
    with tiered(model, cpu="2MiB", disk=scratch) as session:
        run(session, model, 5)
        session.store.moves.settle()  # or a fetch ahead lands between the two
        session.timeline(tmp_path / "trace.json")
        stats = session.stats()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    copies = [event for event in events if event["ph"] == "X" and event["tid"] == "disk->cpu"]
    assert len(copies) == stats.links["disk->cpu"].copies
    assert sum(event["args"]["bytes"] for event in copies) == stats.links["disk->cpu"].bytes
    assert {event["name"] for event in copies} <= set(dict(stack().named_parameters()))
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    counts = [event["args"] for event in events if event["ph"] == "C"]
    assert counts
    assert all(set(count) == {"cpu", "disk"} and count["cpu"] <= stats.tiers["cpu"].peak_bytes for count in counts)
    assert any(event["tid"] == "stalls" for event in events if event["ph"] == "X")


def test_a_picture_shows_when_each_weight_was_there(scratch: Path, tmp_path: Path) -> None:
    model = stack()
    with tiered(model, cpu="2MiB", disk=scratch) as session:
        run(session, model, 3)
        session.store.moves.settle()
        session.timeline(tmp_path / "run.png")
        stays = session.store.moves.timeline.stays(0)
        here = {key for key, entry in session.store.moves.entries.items() if entry.resident}
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert {key for key in stays if key.endswith("weight")} == {f"{i}.weight" for i in range(12)}
    assert all(start <= end for spans in stays.values() for start, end in spans)
    assert all(a[1] <= b[0] for spans in stays.values() for a, b in pairwise(spans)), "nobody is there twice"
    assert here <= stays.keys()


def test_a_picture_without_matplotlib_says_what_to_install(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with tiered(stack(), cpu="2MiB", disk=scratch) as session, pytest.raises(TierStoreError, match=r"tierstore\[plot\]"):
        session.timeline(tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()
