"""Lossless codecs for the bytes of weights: small classes over numcodecs.

The exponents of trained weights take few values and their mantissas nearly all, so what compresses is a part of each
element: both codecs sort the bits or bytes of a block by their place in the element first.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from numcodecs import Shuffle, blosc, zstd

Bytes = npt.NDArray[np.uint8]

WORTH = 0.95
"""A block, a plane of bytes or a value is kept as it is unless it shrinks to this part of its size."""


class Codec(ABC):
    """Encodes blocks of elements of `itemsize` (1, 2, 4 or 8) bytes, and decodes them into memory that is given."""

    name: ClassVar[str]

    @abstractmethod
    def encode(self, block: Bytes, itemsize: int) -> bytes:
        """Return `block`, a whole number of elements, as a frame that may be a little larger than it."""

    @abstractmethod
    def decode(self, frame: memoryview, out: Bytes, itemsize: int) -> None:
        """Fill `out` with the block in `frame`; raise `ValueError` if that is not a block of just this size."""


class BitShuffledLZ4(Codec):
    """lz4 over the bits of all elements, sorted by their place: fast both ways, for disks and links up to a few GB/s."""

    name = "lz4"

    def encode(self, block: Bytes, itemsize: int) -> bytes:
        frame: bytes = blosc.compress(block.view(f"u{itemsize}"), b"lz4", 1, blosc.BITSHUFFLE)
        return frame

    def decode(self, frame: memoryview, out: Bytes, itemsize: int) -> None:
        if len(frame) < blosc.MAX_OVERHEAD or struct.unpack_from("<4xI4xI", frame) != (len(out), len(frame)):
            raise ValueError("a frame of another size")
        try:
            blosc.decompress(frame, out)
        except RuntimeError as error:
            raise ValueError(str(error)) from error


class BytePlanesZstd(Codec):
    """zstd over each plane of bytes (the first bytes of all elements, the second ones, ...) that shrinks by it.

    Smaller than lz4 where exponents compress, at a third of its speed: for links of some hundred MB/s.
    """

    name = "zstd"

    def encode(self, block: Bytes, itemsize: int) -> bytes:
        planes = np.frombuffer(Shuffle(itemsize).encode(block), np.uint8).reshape(itemsize, -1)
        packed = [_packed(plane) for plane in planes]
        sizes = (0 if frame is None else len(frame) for frame in packed)
        frames = (planes[number].data if frame is None else frame for number, frame in enumerate(packed))
        return b"".join((struct.pack(f"<{itemsize}I", *sizes), *frames))

    def decode(self, frame: memoryview, out: Bytes, itemsize: int) -> None:
        planes = np.empty((itemsize, len(out) // itemsize), np.uint8)
        if len(frame) < 4 * itemsize:
            raise ValueError("a frame of another size")
        position = 4 * itemsize
        for plane, size in zip(planes, struct.unpack_from(f"<{itemsize}I", frame), strict=True):
            part = frame[position : position + (size or len(plane))]
            _unpack(part, plane, packed=size > 0)
            position += len(part)
        if position != len(frame):
            raise ValueError("a frame of another size")
        Shuffle(itemsize).decode(planes.reshape(-1), out)


def _packed(plane: Bytes) -> bytes | None:
    frame: bytes = zstd.compress(plane, 1)
    return frame if len(frame) <= WORTH * len(plane) else None


def _unpack(part: memoryview, plane: Bytes, *, packed: bool) -> None:
    if not packed:
        if len(part) != len(plane):
            raise ValueError("a plane of another size")
        plane[:] = np.frombuffer(part, np.uint8)
        return
    try:
        zstd.decompress(part, plane)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def codec_named(name: str) -> Codec:
    """Return the codec called `name`; raise `ValueError` with the names there are."""
    codecs: dict[str, type[Codec]] = {codec.name: codec for codec in (BitShuffledLZ4, BytePlanesZstd)}
    if name not in codecs:
        raise ValueError(f"no codec is called {name!r}; there are {', '.join(map(repr, codecs))}")
    return codecs[name]()
