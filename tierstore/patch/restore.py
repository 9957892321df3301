"""The way out: from TieredTensors back to plain ones."""

from __future__ import annotations

import gc
import warnings

import torch

from tierstore.backend import MappedBackend, MemoryBackend, SourceBackend
from tierstore.entry import Entry
from tierstore.patch.maps import complete
from tierstore.patch.regions import Binding, Region
from tierstore.patch.source import typed_part
from tierstore.patch.stored import DividedSource, StoredSource
from tierstore.patch.swap import replace_content
from tierstore.patch.wrapper import Wrapper
from tierstore.spec import TensorSpec, raw_bytes, typed_view
from tierstore.writing import Moves


def move_plain(tensor: torch.Tensor, part: torch.Tensor) -> None:
    """Put a plain tensor, and its gradient, where `part` is."""
    gradient, tensor.grad = tensor.grad, None
    tensor.data = part
    if gradient is not None:
        tensor.grad = gradient.to(part.device)


def settle(source: StoredSource, device: torch.device | None) -> None:
    """Give `source` its final plain tensor, on `device`, unless it has it.

    Bytes in memory are handed over, files are mapped: nothing is doubled.
    """
    if source.settled is None:
        tensor = complete(source) if isinstance(source, DividedSource) else _newest(source, device)
        if device is not None and tensor.device != device:
            tensor = typed_view(raw_bytes(tensor).to(device), source.spec)
        source.settled = tensor


def _newest(source: StoredSource, device: torch.device | None) -> torch.Tensor:
    moves, (entry,) = source.host.store.moves, source.stored
    with moves.lock:
        moves.wait_until_idle(entry)
        moves.refresh(entry)
        if entry.ready is not None:
            entry.ready.wait()
        backend = moves.tiers[_best_level(moves, entry, device)].backend
    return backend.keep(entry.key) if isinstance(backend, SourceBackend) else backend.get(entry.key)


def _best_level(moves: Moves, entry: Entry, device: torch.device | None) -> int:
    """Return the fastest tier that holds a value, or a slower one that maps it where the fastest lies on another device."""
    fastest = min(entry.tiers)
    memory = moves.tiers[fastest].backend
    if device is not None and device.type == "cpu" and isinstance(memory, MemoryBackend) and memory.device != device:
        return next((level for level in sorted(entry.tiers) if isinstance(moves.tiers[level].backend, MappedBackend)), fastest)
    return fastest


def restore_binding(binding: Binding) -> bool:
    """Turn a TieredTensor back into a plain tensor; False if its source is not settled. What a user replaced stays as it is."""
    wrapper = binding.tensor
    if not isinstance(wrapper, Wrapper):
        return True
    source = wrapper._source
    if any(True for _ in source.entries()):
        return False
    geometry = wrapper.geometry()
    with torch.inference_mode(False), torch.no_grad():
        plain = typed_part(source.read(), geometry.spec, geometry.offset)
        if plain.device != binding.device:
            plain = plain.to(binding.device)
        if issubclass(binding.kind, torch.nn.Parameter):
            plain = torch.Tensor._make_subclass(binding.kind, plain, wrapper.requires_grad)
        elif wrapper.requires_grad:
            plain.requires_grad_()
    _replace_or_keep(wrapper, plain, binding.names[0])
    return True


def _replace_or_keep(wrapper: Wrapper, plain: torch.Tensor, name: str) -> None:
    """Make `wrapper` plain; torch refuses while C++ code (a TorchScript trace) refers to it weakly: then it stays, settled."""
    try:
        replace_content(wrapper, plain)
    except RuntimeError as error:
        if "weakref" not in str(error):
            raise
        gc.collect()  # a trace that nobody uses any more
        try:
            replace_content(wrapper, plain)
        except RuntimeError:
            warnings.warn(
                f"{name!r} stays a TieredTensor over plain memory, with the right values: TorchScript still refers to it ({error})",
                stacklevel=2,
            )


def give_back_held(region: Region, entry: Entry) -> None:
    """Move held tensors back to the device they came from; where that is the compute device they never left."""
    base = entry.tensor
    assert base is not None
    for device in {binding.device for binding in region.bindings} - {base.device}:
        with torch.inference_mode(False), torch.no_grad():
            moved = typed_view(raw_bytes(base).to(device), region.spec)
        for binding in region.bindings:
            tensor = binding.tensor
            if tensor.device == device:
                continue
            shared = tensor.untyped_storage()._cdata == base.untyped_storage()._cdata
            part = typed_part(moved, TensorSpec.of(tensor), int(tensor.storage_offset())) if shared else tensor.detach().to(device)
            move_plain(tensor, part)
