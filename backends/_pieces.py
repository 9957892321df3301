"""Copies parts of tensors from files into CPU memory of any layout and dtype, in pieces around the page cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from tierstore.backends._arena import PAGE, Arena
from tierstore.open_file import OpenFile
from tierstore.spec import TensorSpec, raw_bytes, typed_view

_PIECE = 2 << 20  # bytes read at once; direct I/O into one huge page has the device's full speed
_SHORT = 64 << 10  # bytes; where what is wanted lies in shorter runs, the file is read from the first run to the last
_DIRECT = 1 << 20  # bytes from which it pays to read through memory that lies as the file does


class PieceReader:
    """Reads through pieces of recycled memory: at most `_PIECE` bytes for each thread that reads at the moment."""

    def __init__(self) -> None:
        self._arena = Arena()

    def read(self, file: OpenFile, start: int, spec: TensorSpec, out: torch.Tensor) -> None:
        """Fill `out` with elements that lie in the file as `spec` says, the first of them at byte `start`.

        `out` has the shape of `spec`; its dtype may be another. Raises `OSError`; `CorruptionError` if the file ends too early.
        """
        if not out.numel():
            return
        order = [d for d in sorted(range(out.dim()), key=lambda d: -spec.stride[d]) if spec.shape[d] > 1]
        squeezed = out.as_strided([out.shape[d] for d in order], [out.stride(d) for d in order])
        ordered = TensorSpec(spec.dtype, tuple(spec.shape[d] for d in order), tuple(spec.stride[d] for d in order))
        self._read(file, start, ordered, squeezed)

    def _read(self, file: OpenFile, start: int, spec: TensorSpec, out: torch.Tensor) -> None:
        """`spec` has its largest stride first, and no dimension of one element."""
        run = _run(spec)
        if run == out.numel():
            self._read_run(file, start, spec.dtype, out)
        elif run * spec.dtype.itemsize < _SHORT:
            whole = torch.empty(spec.extent, dtype=spec.dtype, device="cpu")
            self._read_run(file, start, spec.dtype, whole)
            out.copy_(whole.as_strided(spec.shape, spec.stride))
        else:
            inner = TensorSpec(spec.dtype, spec.shape[1:], spec.stride[1:])
            for i, part in enumerate(out.unbind(0)):
                self._read(file, start + i * spec.stride[0] * spec.dtype.itemsize, inner, part)

    def _read_run(self, file: OpenFile, start: int, dtype: torch.dtype, out: torch.Tensor) -> None:
        """Fill `out` with elements that lie side by side in the file, in the order of its indices."""
        if out.is_contiguous() and out.dtype == dtype and (out.nbytes < _DIRECT or (out.data_ptr() - start) % PAGE == 0):
            file.read(raw_bytes(out).numpy().data, start)
            return
        for part in _parts(out, _PIECE // dtype.itemsize):
            nbytes = part.numel() * dtype.itemsize
            phase = start % PAGE if start % dtype.itemsize == 0 else 0
            piece = self._arena.allocate(nbytes, phase)
            file.read(piece.numpy().data, start)
            part.copy_(typed_view(piece, TensorSpec(dtype, tuple(part.shape), _row_major(part.shape))))
            start += nbytes


def _run(spec: TensorSpec) -> int:
    """Return how many elements lie side by side, counted from the last dimension."""
    run = 1
    for size, step in zip(reversed(spec.shape), reversed(spec.stride), strict=True):
        if step != run:
            break
        run *= size
    return run


def _parts(out: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Cut `out` into consecutive parts of at most `most` elements each."""
    if out.is_contiguous():
        out = out.view(-1)
    if out.numel() <= most:
        yield out
        return
    inner = out.numel() // out.shape[0]
    if inner > most:
        for part in out.unbind(0):
            yield from _parts(part, most)
    else:
        step = most // inner
        yield from (out[i : i + step] for i in range(0, out.shape[0], step))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
