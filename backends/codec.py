"""A tier whose values are compressed, over any other backend.

A value is stored in the inner backend as what its codec makes of it, or as it is where that does not pay. What has to be
known of a value without reading it stands in its inner key, so any backend will do and opening one reads no values:

    "lz4 bfloat16 4096x4096 4096x1 0 layers.3.weight"      form, dtype, shape, stride, generation, key

The compressed form is a checksum (xxh3, 64 bits) of all that follows, the number of blocks, the size of each frame, and the
frames; each block is 4 MiB of the value, apart from the last one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import torch
import xxhash

from tierstore.backend import Backend, DistantBackend, MemoryBackend, ReadingBackend, ReadOnlyBackend, SizingBackend, VolatileBackend
from tierstore.backends._codecs import WORTH, Bytes, Codec, codec_named
from tierstore.backends._lock import spec_from
from tierstore.backends._parallel import Parallel
from tierstore.errors import BackendError, CorruptionError, TierStoreError
from tierstore.spec import TensorSpec, dtype_name, raw_bytes, typed_view

RAW = "raw"
BLOCK = 4 << 20  # bytes; a multiple of every element's size

_SAMPLE = 256 << 10  # bytes, three times, of a value of several blocks: most that does not pay is found out by them
_HEAD = struct.Struct("<QI")
_MOST_THREADS = 4


@dataclass(frozen=True, slots=True)
class _Stored:
    """How one value is stored; `nbytes` is what that takes."""

    form: str
    spec: TensorSpec
    generation: int
    nbytes: int

    def inner_key(self, key: str) -> str:
        sizes = ("x".join(map(str, numbers)) for numbers in (self.spec.shape, self.spec.stride))
        return " ".join((self.form, dtype_name(self.spec.dtype), *sizes, str(self.generation), key))


class CompressedBackend(ReadingBackend, SizingBackend):
    """Keeps tensors compressed in `inner`, which it owns: `codec` is "lz4" (fast) or "zstd" (smaller, slower).

    Over a backend that is volatile, distant or only reads, what is constructed is so too. Blocks are compressed and decompressed by a
    few threads, started when first needed. A `put` holds the compressed value once more while it writes; a read decompresses
    straight into the memory that it fills. Safe to call from several threads for different keys.
    """

    def __new__(cls, inner: Backend, codec: str = "lz4") -> Self:
        kinds = (VolatileBackend, ReadOnlyBackend, DistantBackend)
        for fitting in (CompressedMemory, CompressedRemote, CompressedSource, CompressedRemoteSource):
            if cls is CompressedBackend and all(issubclass(fitting, kind) is isinstance(inner, kind) for kind in kinds):
                return object.__new__(fitting)  # type: ignore[return-value]
        return object.__new__(cls)

    def __init__(self, inner: Backend, codec: str = "lz4") -> None:
        if not isinstance(inner, Backend):
            raise TierStoreError(f"expected the backend to keep compressed values in, got {type(inner).__name__}")
        try:
            self._codec = codec_named(codec)
        except ValueError as error:
            raise BackendError(str(error)) from error
        self.inner = inner
        self._workers = Parallel("codec", min(_MOST_THREADS, os.cpu_count() or 1))
        self._stored: dict[str, _Stored] = {}
        for inner_key, spec in list(inner.entries()):
            self._find(inner_key, spec)

    def put(self, key: str, tensor: torch.Tensor) -> None:
        spec, old = TensorSpec.of(tensor), self._stored.get(key)
        frames = self._compress(tensor, spec)
        form, nbytes = (RAW, spec.nbytes) if frames is None else (self._codec.name, _payload_bytes(frames))
        same = old is not None and (old.form, old.spec) == (form, spec)
        generation = 0 if old is None else old.generation + (not same)
        new = _Stored(form, spec, generation, nbytes)
        place = new.inner_key(key)
        if frames is None:
            self.inner.put(place, tensor)
        else:
            self._write(place, frames)
        if old is not None and not same:
            self._replace(old.inner_key(key), place)
        self._stored[key] = new

    def get(self, key: str) -> torch.Tensor:
        stored = self._stored[key]
        if stored.form == RAW and not isinstance(self.inner, MemoryBackend):
            return self.inner.get(stored.inner_key(key))
        with torch.inference_mode(False), torch.no_grad():
            raw = torch.empty(stored.spec.nbytes, dtype=torch.uint8, device="cpu")
            self.read_into(key, raw)
            return typed_view(raw, stored.spec)

    def read_into(self, key: str, out: torch.Tensor) -> None:
        stored = self._stored[key]
        place = stored.inner_key(key)
        if stored.form != RAW:
            payload = raw_bytes(self.inner.get(place)).cpu().numpy()
            try:
                self._decompress(payload, out.numpy(), codec_named(stored.form), _itemsize(stored.spec))
            except ValueError as error:
                raise CorruptionError(key, f"{type(self.inner).__name__} value {place!r}", str(error)) from error
        elif isinstance(self.inner, ReadingBackend):
            self.inner.read_into(place, out)
        else:
            with torch.no_grad():
                out.copy_(raw_bytes(self.inner.get(place)))

    def delete(self, key: str) -> None:
        self.inner.delete(self._stored[key].inner_key(key))
        del self._stored[key]

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        return ((key, stored.spec) for key, stored in list(self._stored.items()))

    def stored_bytes(self, key: str) -> int:
        return self._stored[key].nbytes

    def close(self) -> None:
        self._workers.close()
        self.inner.close()

    # -- what lies where ------------------------------------------------------------------------------------------

    def _find(self, inner_key: str, spec: TensorSpec) -> None:
        """Take note of a value found at opening; of two for one key, which a crash can leave, the later one counts."""
        key, stored = _described(inner_key, spec)
        other = self._stored.get(key)
        if other is not None:
            older = min(other, stored, key=lambda each: each.generation)
            if not isinstance(self.inner, ReadOnlyBackend):
                self.inner.delete(older.inner_key(key))
            if older is stored:
                return
        self._stored[key] = stored

    def _replace(self, old: str, new: str) -> None:
        """Delete the value that another one, under another inner key, has replaced; if that fails, nothing was replaced."""
        try:
            self.inner.delete(old)
        except BaseException:
            with suppress(OSError, TierStoreError):
                self.inner.delete(new)
            raise

    # -- bytes ----------------------------------------------------------------------------------------------------

    def _compress(self, tensor: torch.Tensor, spec: TensorSpec) -> list[bytes] | None:
        """Return the frames of a tensor's blocks, or None where it does not pay."""
        raw, itemsize = raw_bytes(tensor).cpu().numpy(), _itemsize(spec)
        if not self._pays(raw, itemsize):
            return None
        frames = self._workers.map(lambda block: self._codec.encode(block, itemsize), _blocks(raw))
        return frames if _payload_bytes(frames) <= WORTH * len(raw) else None

    def _write(self, place: str, frames: Sequence[bytes]) -> None:
        """Put frames into the inner backend as one value, straight into its own memory where it has some on the CPU."""
        nbytes = _payload_bytes(frames)
        if isinstance(self.inner, MemoryBackend) and self.inner.device.type == "cpu":
            payload = self.inner.allocate(place, TensorSpec(torch.uint8, (nbytes,), (1,)))
            _fill(payload.numpy(), frames)
            self.inner.adopt(place, payload)
        else:
            payload = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            _fill(payload.numpy(), frames)
            self.inner.put(place, payload)

    def _pays(self, raw: Bytes, itemsize: int) -> bool:
        if len(raw) <= BLOCK:
            return len(raw) > _HEAD.size
        middle = len(raw) // 2 // itemsize * itemsize
        samples = [raw[:_SAMPLE], raw[middle : middle + _SAMPLE], raw[-_SAMPLE:]]
        return sum(len(self._codec.encode(sample, itemsize)) for sample in samples) <= WORTH * len(samples) * _SAMPLE

    def _decompress(self, payload: Bytes, out: Bytes, codec: Codec, itemsize: int) -> None:
        """Fill `out`; raise `ValueError` unless the payload is whole and of just that size."""
        frames, blocks = _frames(payload), _blocks(out)
        if len(frames) != len(blocks):
            raise ValueError(f"{len(frames)} blocks instead of {len(blocks)}")
        self._workers.map(lambda pair: codec.decode(pair[0], pair[1], itemsize), list(zip(frames, blocks, strict=True)))


class CompressedMemory(CompressedBackend, VolatileBackend):
    """Compressed values that are lost when the process ends: compressed RAM."""

    inner: VolatileBackend

    def trim(self) -> None:
        self.inner.trim()


class CompressedRemote(CompressedBackend, DistantBackend):
    """Compressed values far away."""


class CompressedSource(ReadOnlyBackend, CompressedBackend):
    """Compressed values that others wrote."""


class CompressedRemoteSource(CompressedSource, DistantBackend):
    """Compressed values far away that others wrote."""


def _itemsize(spec: TensorSpec) -> int:
    """Return the bytes of what repeats in memory; a complex number is two floats."""
    return spec.dtype.itemsize // (2 if spec.dtype.is_complex else 1)


def _blocks(raw: Bytes) -> list[Bytes]:
    return [raw[start : start + BLOCK] for start in range(0, len(raw), BLOCK)]


def _payload_bytes(frames: Sequence[bytes]) -> int:
    return _HEAD.size + sum(4 + len(frame) for frame in frames)


def _fill(payload: Bytes, frames: Sequence[bytes]) -> None:
    start = 8
    for part in (struct.pack(f"<{1 + len(frames)}I", len(frames), *map(len, frames)), *frames):
        payload[start : start + len(part)] = np.frombuffer(part, np.uint8)
        start += len(part)
    payload[:8] = np.frombuffer(struct.pack("<Q", xxhash.xxh3_64_intdigest(payload[8:].data)), np.uint8)


def _frames(payload: Bytes) -> list[memoryview]:
    """Return the frames in a payload; raise `ValueError` unless it is whole."""
    memory = payload.data
    if len(memory) < _HEAD.size:
        raise ValueError(f"{len(memory)} bytes are no compressed value")
    checksum, count = _HEAD.unpack_from(memory)
    if checksum != xxhash.xxh3_64_intdigest(memory[8:]):
        raise ValueError("its checksum does not match")
    stop = _HEAD.size + 4 * count
    if stop > len(memory):
        raise ValueError(f"{count} blocks in {len(memory)} bytes")
    sizes = struct.unpack_from(f"<{count}I", memory, _HEAD.size)
    if stop + sum(sizes) != len(memory):
        raise ValueError("the sizes of its blocks do not add up")
    ends = np.cumsum((stop, *sizes)).tolist()
    return [memory[start:end] for start, end in pairwise(ends)]


def _described(inner_key: str, spec: TensorSpec) -> tuple[str, _Stored]:
    """Return the key and description that `inner_key` spells; raise `BackendError` if a codec did not write this value."""
    form, *fields = inner_key.split(" ", 5)
    try:
        dtype, shape, stride, generation, key = fields
        own = spec_from(dtype, _numbers(shape), _numbers(stride))
        codec_named("lz4" if form == RAW else form)
        return key, _Stored(form, own, int(generation), spec.nbytes)
    except ValueError as error:
        raise BackendError(
            f"the value {inner_key[:60]!r} was not written through a compressed tier ({error}); open it without one, or give another place"
        ) from error


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split("x")] if text else []
