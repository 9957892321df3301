"""Other formats for tensors on a disk, one file, or chunk, for each value; as their documentation uses them."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from accelerate.utils import OffloadedWeightsLoader, offload_state_dict
from safetensors.torch import load_file, save_file

Act = Callable[[], object]


@dataclass(frozen=True)
class Format:
    """What writes all values to `folder`, durably, and what reads them into memory; `write` is None if another's files are read."""

    name: str
    folder: Path
    write: Act | None
    read: Act


def formats(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[Format]:
    """Yield the formats whose libraries are here; what they write without a flush is flushed by `flushed`."""
    for make in (_safetensors, _torch, _accelerate, _zarr):
        yield from make(folder / make.__name__, tensors)
    if importlib.util.find_spec("tensorstore") is None:
        print("tensorstore is left out: pip install tensorstore")
        return
    for mode in ("default", "direct"):
        yield _tensorstore(folder / f"tensorstore {mode}", tensors, mode)


def flushed(folder: Path) -> None:
    """Flush every file in a directory that somebody else has written without."""
    for path in files_in(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _safetensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[Format]:
    def write() -> None:
        for key, tensor in tensors.items():
            save_file({"data": tensor}, folder / f"{key}.safetensors")
        flushed(folder)

    yield Format("safetensors", folder, write, lambda: [load_file(folder / f"{key}.safetensors")["data"].clone() for key in tensors])


def _torch(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[Format]:
    def write() -> None:
        for key, tensor in tensors.items():
            torch.save(tensor, folder / key)
        flushed(folder)

    yield Format("torch.save and load", folder, write, lambda: [torch.load(folder / key) for key in tensors])
    yield Format("torch.load(mmap=True)", folder, None, lambda: [torch.load(folder / key, mmap=True).clone() for key in tensors])


def _accelerate(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[Format]:
    def write() -> None:
        offload_state_dict(folder, dict(tensors))
        flushed(folder)

    def read() -> None:
        loader = OffloadedWeightsLoader(save_folder=folder)
        for key in tensors:
            loader[key].clone()

    yield Format("accelerate's offload files", folder, write, read)


def _zarr(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[Format]:
    def write() -> None:
        group = zarr.open_group(folder, mode="w")
        for key, tensor in tensors.items():
            array = group.create_array(key, shape=(tensor.numel(),), chunks=(tensor.numel(),), dtype=np.uint16, compressors=None)
            array[:] = tensor.view(torch.uint16).numpy()
        flushed(folder)

    def read() -> None:
        group = zarr.open_group(folder, mode="r")
        for key in tensors:
            np.asarray(group[key][:])

    yield Format("zarr, uncompressed", folder, write, read)


def _tensorstore(folder: Path, tensors: Mapping[str, torch.Tensor], mode: str) -> Format:
    """All values at once, as its asynchronous interface is meant to be used; it flushes by itself."""
    import tensorstore

    context = tensorstore.Context({"file_io_mode": {"mode": mode}})

    def opened(key: str, **how: object) -> "tensorstore.TensorStore":
        return tensorstore.open(_array(folder / key, tensors[key].numel()), context=context, **how).result()

    def write() -> None:
        arrays = {key: opened(key, create=True, delete_existing=True) for key in tensors}
        for written in [arrays[key].write(tensor.view(torch.uint16).numpy()) for key, tensor in tensors.items()]:
            written.result()

    def read() -> None:
        for found in [opened(key).read() for key in tensors]:
            found.result()

    return Format(f"tensorstore, zarr v3, file_io_mode {mode}", folder, write, read)


def _array(path: Path, count: int) -> dict[str, object]:
    grid = {"name": "regular", "configuration": {"chunk_shape": [count]}}
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    metadata = {"shape": [count], "data_type": "uint16", "chunk_grid": grid, "codecs": codecs}
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}, "metadata": metadata}
