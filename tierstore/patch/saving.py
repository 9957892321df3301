"""What `state_dict()` hands out, and how its bytes reach whoever saves them, one tensor at a time.

[Note: who asks for bytes, and how]
`torch.save` writes down storages after it has written down everything else, and asks each of them that is not in CPU memory
for `.cpu()` just before: a `LateStorage` fetches its bytes then, and nobody keeps them. safetensors wants the addresses of
all tensors of a file at once. So what has one is a map wherever a file has the bytes, and what lies in memory alone is
written down first if a tier has room for it: the system then decides which pages stay in memory. Before that, sharing is
looked for by comparing storages, which must cost nothing.
"""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from typing import Any

import torch

from tierstore.backend import MappedBackend, SourceBackend
from tierstore.entry import Entry
from tierstore.patch.maps import composed, extent_of, pieces
from tierstore.patch.source import CopySource, Source
from tierstore.patch.stored import DividedSource, StoredSource
from tierstore.patch.swap import own_attributes
from tierstore.patch.wrapper import Wrapper
from tierstore.spec import TensorSpec, raw_bytes, typed_view
from tierstore.writing import Moves

_V3_DTYPES = torch.storage._new_dtypes()


class LateStorage(torch.UntypedStorage):
    """Stands for the storage of a source. On the meta device, so that whatever reads it without asking fails.

    `data_ptr` is the address of the bytes once somebody has asked for one, and before a number that no other storage has.
    """

    image: Image

    def data_ptr(self) -> int:
        return self._cdata if self.image.plain is None else self.image.plain.data_ptr()

    def cpu(self) -> torch.UntypedStorage:
        """Return the bytes in CPU memory that the caller owns."""
        return copied(self.image.source).untyped_storage()


class LateTypedStorage(torch.storage.TypedStorage):
    """A `LateStorage` as pickles name it; outside of `torch.save` it is pickled with its bytes."""

    _fake_device = torch.device("cpu")  # where the bytes will be

    def __new__(cls, *args: Any, **kwargs: Any) -> LateTypedStorage:
        return object.__new__(cls)

    def __reduce__(self) -> Any:
        late: Any = self._untyped_storage
        plain = torch.storage.TypedStorage(wrap_storage=late.cpu(), dtype=self.dtype, _internal=True)  # type: ignore[no-untyped-call]
        return plain.__reduce__()  # type: ignore[no-untyped-call]


class Image:
    """The bytes of a source at an address, from when it is first asked for as long as this object lives."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.plain: torch.Tensor | None = None
        self._kept = source
        self._version = -1
        self._typed: dict[torch.dtype, LateTypedStorage] = {}
        self.storage = LateStorage(source.spec.nbytes, device="meta")  # type: ignore[no-untyped-call]
        self.storage.image = self

    @classmethod
    def of(cls, source: Source) -> Image:
        """Return the image of a source that somebody has already, or a new one."""
        image = source.image() if source.image is not None else None
        if image is None:
            image = cls(source)
            source.image = weakref.ref(image)
        return image

    def address(self) -> int:
        """Return the address of the first byte."""
        version = self.source.version()
        if self.plain is None or version != self._version:
            self.plain, self._kept = addressable(self.source)
            self._version = version
        return self.plain.data_ptr()

    def typed(self, dtype: torch.dtype) -> LateTypedStorage:
        """Return the storage as one of `dtype`; the same object each time, or ties would come apart."""
        if dtype not in self._typed:
            self._typed[dtype] = LateTypedStorage(wrap_storage=self.storage, dtype=dtype, _internal=True)
        return self._typed[dtype]


def reduced(tensor: Wrapper, *, as_parameter: bool) -> tuple[Any, ...]:
    """Return how to pickle `tensor` as the plain one that it stands for, with a storage that fetches its bytes late."""
    legacy = tensor.dtype not in _V3_DTYPES
    storage = Image.of(tensor._source).typed(tensor.dtype if legacy else torch.uint8)
    hooks: OrderedDict[int, Any] = OrderedDict()
    args = (storage, int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride(), tensor.requires_grad and not as_parameter, hooks)
    rebuild: tuple[Any, tuple[Any, ...]] = (torch._utils._rebuild_tensor_v2, args)
    if not legacy:
        rebuild = (torch._utils._rebuild_tensor_v3, (*args, tensor.dtype))
    state = own_attributes(tensor)
    if as_parameter:
        parts = (_Rebuilt(rebuild), tensor.requires_grad, hooks)
        if state:
            return torch._utils._rebuild_parameter_with_state, (*parts, state)
        return torch._utils._rebuild_parameter, parts
    if state:
        return torch._tensor._rebuild_from_type_v2, (rebuild[0], torch.Tensor, rebuild[1], state)
    return rebuild


class _Rebuilt:
    """A tensor inside the pickle of another one."""

    def __init__(self, how: tuple[Any, tuple[Any, ...]]) -> None:
        self._how = how

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._how


def asked_by_state_dict(depth: int) -> bool:
    """True if the caller of the function `depth` frames up is collecting a module's state."""
    return sys._getframe(depth + 1).f_code is torch.nn.Module._save_to_state_dict.__code__


# -- bytes --------------------------------------------------------------------------------------------------------------


def copied(source: Source) -> torch.Tensor:
    """Return the value of `source` on the CPU with a storage of its own, as a map where a file has the bytes."""
    with torch.inference_mode(False), torch.no_grad():
        if source.settled is not None:
            return _own_memory(source.settled)
        if isinstance(source, CopySource):
            return _own_memory(source.made_from(copied))
        if isinstance(source, DividedSource):
            moves = source.host.store.moves
            return composed(
                source, ((start, extent_of(moves, entry) or raw_bytes(_copy_of(moves, entry))) for start, entry in pieces(source))
            )
        if isinstance(source, StoredSource):
            return _copy_of(source.host.store.moves, source.stored[0])
        return _own_memory(source.host.copy_out(source))


def addressable(source: Source) -> tuple[torch.Tensor, Source]:
    """Return the value of `source` on the CPU, taking as little memory as can be, and what has to live as long as that."""
    if source.settled is not None:
        return source.settled.cpu(), source
    moves = source.host.store.moves
    if not isinstance(source, StoredSource):
        value = copied(source)
        level = _room_in_files(moves, value.nbytes)
        return (value, source) if level is None else addressable(source.host.adopt(source.name, value, level))
    kept = [_kept(moves, entry) for entry in source.stored]
    return (copied(source) if len(kept) > 1 or kept[0] is None else kept[0]), source


def _own_memory(plain: torch.Tensor) -> torch.Tensor:
    return typed_view(raw_bytes(plain).to("cpu", copy=True), TensorSpec.of(plain))


def _copy_of(moves: Moves, entry: Entry) -> torch.Tensor:
    """Return the fastest copy of an entry that is a map of a file, or else one in memory of its own; nobody moves it meanwhile."""
    with moves.lock:
        moves.wait_until_idle(entry)
        moves.refresh(entry)
        moves.mark_busy(entry)
        tiers = [moves.tiers[level].backend for level in sorted(entry.tiers)]
    try:
        mapped = next((backend for backend in tiers if isinstance(backend, MappedBackend)), None)
        return tiers[0].get(entry.key).to("cpu", copy=True) if mapped is None else mapped.get(entry.key)
    finally:
        with moves.lock:
            moves.unmark_busy(entry)


def _kept(moves: Moves, entry: Entry) -> torch.Tensor | None:
    """Return a map of an entry, after writing its newest value to a file if none has it; None if no tier of files has room."""
    level = _mapped_level(moves, entry)
    if level is None:
        return None
    backend = moves.tiers[level].backend
    return backend.keep(entry.key) if isinstance(backend, SourceBackend) else backend.get(entry.key)


def _mapped_level(moves: Moves, entry: Entry) -> int | None:
    """Return the fastest tier of files that has the newest value, after writing it to one with free room if none has."""
    levels = [level for level, tier in enumerate(moves.tiers) if isinstance(tier.backend, MappedBackend)]
    with moves.lock:
        moves.wait_until_idle(entry)
        moves.refresh(entry)
        return next((level for level in levels if level in entry.tiers or moves.write_down(entry, level)), None)


def _room_in_files(moves: Moves, nbytes: int) -> int | None:
    """Return the fastest tier of files with free room for `nbytes`."""
    with moves.lock:
        tiers = enumerate(moves.tiers)
        return next((level for level, tier in tiers if isinstance(tier.backend, MappedBackend) and tier.ledger.excess(nbytes) <= 0), None)
