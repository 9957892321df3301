"""The ties between a model on several devices and their stores: one `Attachment` for each device."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch

from tierstore.patch.attach import Attachment, Progress
from tierstore.patch.crossing import Crossing, CrossingScope
from tierstore.patch.regions import StoredValue
from tierstore.patch.shares import Shares
from tierstore.store import TieredStore


class DeviceAttachment(Attachment):
    """The tie between the share of one device, at position `place` of `crossing`, and its store.

    Keys that are made later are marked: stores of other devices use the same tiers below, and names are unique in a model only.
    """

    def __init__(self, store: TieredStore, crossing: Crossing, place: int, shares: Shares, others: Container[str]) -> None:
        super().__init__(store, crossing.devices[place])
        self._others = others
        self._crossing = crossing
        self._number = place
        self._places = shares.places
        self._names = {region.name for region in shares.parts[place].regions}

    def _enter(self, module: torch.nn.Module) -> None:
        if module._compiled_call_impl is None:
            scope = CrossingScope(module, self, self._crossing, self._places.get(module, (self._number,)))
            module.__dict__["_compiled_call_impl"] = scope
        super()._enter(module)

    def _free_key(self, name: str) -> str:
        return super()._free_key(name if name in self._names else f"{name}@{self.moves.tiers[0].name}")

    def _taken(self, key: str) -> bool:
        return key in self._others or super()._taken(key)


def attach_all(
    chain: Sequence[tuple[TieredStore, torch.device]],
    roots: Mapping[str, torch.nn.Module],
    shares: Shares,
    progress: Progress,
    stored: Mapping[int, StoredValue] | None,
    others: Container[str],
) -> list[DeviceAttachment]:
    """Put each share of `roots` under the store of its device; on failure the models are as they were.

    `others`: keys that the tiers below have from before.
    """
    crossing = Crossing([device for _, device in chain])
    attachments = [DeviceAttachment(store, crossing, place, shares, others) for place, (store, _) in enumerate(chain)]
    begun: list[DeviceAttachment] = []
    try:
        for attachment, part in zip(attachments, shares.parts, strict=True):
            attachment.attach(roots, progress, stored, part)
            begun.append(attachment)
    except BaseException:
        for attachment in begun:
            attachment.detach()
        raise
    return attachments
