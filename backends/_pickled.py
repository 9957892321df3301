"""Checkpoints that `torch.save` wrote: where their tensors lie, without reading these and without running code from the file."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch

from tierstore.backends._pinned_file import identity_of
from tierstore.backends._safetensors import Located
from tierstore.errors import CheckpointError, CorruptionError
from tierstore.spec import TensorSpec


def read_pickled(file: Path) -> dict[str, Located]:
    """Return every tensor of the state dict in `file` by its name; what else it holds is left out.

    Raises `CheckpointError` for a file that needs code to be run, is not one state dict or has torch's format of before
    1.6, and `CorruptionError` for one that lies about where its tensors are.
    """
    if not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} has torch's old format, which cannot be used in place; load it and save it with safetensors")
    identity = identity_of(file.stat())
    state = _state_dict(file)
    records = _records(file)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    return {name: Located(file, *_place(file, name, tensor, records), identity) for name, tensor in tensors.items()}


def _state_dict(file: Path) -> dict[str, object]:
    try:
        state = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors, and code from it would have to be run ({str(error).splitlines()[0]}); "
            "if you trust it, load it with torch and save its state dict with safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise CorruptionError("", str(file), f"torch cannot read it: {error}") from error
    if not (isinstance(state, dict) and all(isinstance(name, str) for name in state)):
        raise CheckpointError(f"{file} holds a {type(state).__name__} instead of a dict of named tensors; save model.state_dict()")
    if not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{file} names no tensors, only {', '.join(map(repr, list(state)[:5]))}; save model.state_dict()")
    return state


def _records(file: Path) -> dict[int, int]:
    """Return offset and size of each record that is stored as it is; torch compresses none."""
    try:
        reader = torch._C.PyTorchFileReader(str(file))
        with zipfile.ZipFile(file) as archive:
            stored = [info for info in archive.infolist() if info.compress_type == zipfile.ZIP_STORED]
        return {reader.get_record_offset(info.filename.partition("/")[2]): info.file_size for info in stored}  # type: ignore[attr-defined]
    except (RuntimeError, zipfile.BadZipFile) as error:
        raise CorruptionError("", str(file), f"its archive cannot be read: {error}") from error


def _place(file: Path, name: str, tensor: torch.Tensor, records: dict[int, int]) -> tuple[int, TensorSpec]:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{name!r} in {file} has layout {tensor.layout}; only strided tensors can be used in place")
    spec = TensorSpec.of(tensor)
    storage = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    offset = int(tensor.storage_offset()) * spec.dtype.itemsize
    if storage not in records or offset + spec.nbytes > records[storage]:
        raise CorruptionError(name, str(file), "its bytes are not inside the record that is named for them")
    return storage + offset, spec
