"""Which files make up a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tierstore.backends._lock import parse_json
from tierstore.backends._pickled import read_pickled
from tierstore.backends._safetensors import Located, read_header
from tierstore.errors import CheckpointError, CorruptionError

Parse = Callable[[Path], dict[str, Located]]

_INDEX = ".index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def find_tensors(path: Path) -> dict[str, Located]:
    """Return every tensor of the checkpoint at `path`, a file or a directory, by its name.

    In a directory, in this order: `model.safetensors`, an index of shards, all other safetensors files, and the same for
    files of `torch.save` (`pytorch_model.bin`). Raises `CheckpointError` if there is none, or a shard is missing, or the
    index names a file elsewhere; `CorruptionError` for a damaged file.
    """
    if path.is_file():
        if path.name.endswith(_INDEX):
            return _indexed(path)
        return _parser(path)(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}; give a directory or a file that is on this machine")
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    for main, suffixes in (("model.safetensors", (".safetensors",)), ("pytorch_model.bin", _PICKLED)):
        found = [path / name for name in names if name.endswith(suffixes)]
        indices = [path / name for name in names if name.endswith(tuple(suffix + _INDEX for suffix in suffixes))]
        if path / main in found:
            return _parser(path / main)(path / main)
        if indices:
            return _indexed(_only(path, main + _INDEX, indices))
        if found:
            return _merged(found)
    raise CheckpointError(f"{path} holds no *.safetensors and no {', '.join('*' + suffix for suffix in _PICKLED)}; it has {names[:5]}")


def looks_like_one(path: Path) -> bool:
    """True if `path` is, or a directory has, a file whose name ends like those of checkpoints."""
    suffixes = (".safetensors", _INDEX, *_PICKLED)
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else [path.name]
    return any(name.endswith(suffixes) and not name.startswith(".") for name in names)


def _parser(file: Path) -> Parse:
    return read_pickled if file.name.endswith(_PICKLED) else read_header


def _only(folder: Path, preferred: str, indices: list[Path]) -> Path:
    if folder / preferred in indices:
        return folder / preferred
    if len(indices) > 1:
        raise CheckpointError(f"{folder} has several checkpoints ({', '.join(index.name for index in indices)}); give the path of one")
    return indices[0]


def _indexed(index: Path) -> dict[str, Located]:
    """Read the shards that an index names; each tensor must be where the index says."""
    weight_map = _weight_map(index)
    shards = {name: _shard(index, name) for name in dict.fromkeys(weight_map.values())}
    beside = {entry.name for entry in index.parent.iterdir() if entry.is_file()}
    missing = [name for name in shards if name not in beside]  # also one that no file system would take
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards that {index.name} names: {', '.join(missing[:5])}"
        )
    found = _merged(shards.values())
    for key, name in weight_map.items():
        if key not in found or found[key].file != shards[name]:
            raise CheckpointError(f"{index} says that {key!r} is in {name}, but it is not there")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = parse_json(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptionError("", str(index), f"it is no index of shards: {error!r}") from None
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(name, str) for name in weight_map.values())):
        raise CorruptionError("", str(index), "its weight_map does not map tensors to files")
    return weight_map


def _shard(index: Path, name: str) -> Path:
    """Return the path of a shard; an index from anywhere must not name files elsewhere."""
    if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        raise CheckpointError(f"{index} names {name!r}, which is not a file beside it; refusing to open that")
    return index.parent / name


def _merged(files: Iterable[Path]) -> dict[str, Located]:
    found: dict[str, Located] = {}
    for file in files:
        for name, tensor in _parser(file)(file).items():
            if name in found:
                raise CheckpointError(f"{name!r} is in {found[name].file.name} and in {file.name}; give the path of one checkpoint")
            found[name] = tensor
    return found
