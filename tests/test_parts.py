"""What `tiered` accepts beside a module: lists, dicts, and objects that hold modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tierstore import ModelError, tiered
from tierstore.parts import find_parts


class Holder:
    """An object with attributes, as a pipeline has."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def linear() -> nn.Linear:
    return nn.Linear(2, 2)


def test_components_come_before_attributes() -> None:
    a, b = linear(), linear()
    assert find_parts(Holder(components={"a": a, "words": "x", "none": None}, b=b)).modules == {"a": a}
    assert find_parts(Holder(components={"words": "x"}, b=b)).modules == {"b": b}
    assert find_parts(Holder(components="not a mapping", b=b, both=[a, b, 3], named={"c": a})).modules == {
        "b": b,
        "both.0": a,
        "both.1": b,
        "named.c": a,
    }


def test_names_of_what_is_nested() -> None:
    a, b, c = linear(), linear(), linear()
    assert find_parts(a).modules == {"": a}
    assert find_parts({"base": Holder(unet=a), "others": [b, c]}).modules == {"base.unet": a, "others.0": b, "others.1": c}
    assert find_parts((a, b)).modules == {"0": a, "1": b}


def test_two_modules_of_one_name() -> None:
    with pytest.raises(ModelError, match=r"'a\.b'"):
        find_parts({"a": {"b": linear()}, "a.b": linear()})


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (Holder(weights=torch.zeros(2), name="x"), r"Holder.*`components`.*\(weights, name\).*tiered\(\["),
        (Holder(components={"scheduler": 1}), r"\(scheduler, components\)"),
        ({"x": Holder()}, r"Holder at 'x'.*it has none"),
        (nn.Linear, r"got type"),
        (None, r"NoneType"),
    ],
)
def test_what_holds_no_module(thing: object, message: str, scratch: Path) -> None:
    with pytest.raises(ModelError, match=message):
        tiered(thing, gpu="1MiB", disk=scratch, device="cpu")


def test_an_attribute_that_says_where_the_modules_are(scratch: Path) -> None:
    """Inputs are sent there; the modules compute elsewhere inside the `with`."""
    holder = Holder(model=linear(), device=torch.device("meta"), other="meta")
    with tiered(holder, gpu="1MiB", disk=scratch, device="cpu"):
        assert holder.device == torch.device("cpu")
        assert holder.other == "meta"
    assert holder.device == torch.device("meta")
    with tiered(holder, gpu="1MiB", disk=scratch, device="cpu"):
        holder.device = torch.device("cuda", 3)
    assert holder.device == torch.device("cuda", 3), "what the user set meanwhile stays"


def test_a_device_that_a_property_finds(scratch: Path) -> None:
    class Finds(Holder):
        @property
        def device(self) -> torch.device:
            return next(self.model.parameters()).device

    holder = Finds(model=linear())
    with tiered(holder, gpu="1MiB", disk=scratch, device="cpu"):
        assert holder.device == torch.device("cpu")
