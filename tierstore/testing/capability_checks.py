"""What holds for backends with a capability."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tierstore.backend import Backend, DivisibleBackend, FileBackend, FileExtent, MemoryBackend, ReadingBackend, SizingBackend
from tierstore.spec import TensorSpec, raw_bytes
from tierstore.testing.rules import ConformanceError, compare, compare_entries, require, rule
from tierstore.testing.values import bits, make_value, overwrite, random_bytes, some_values


def _check_memory(backend: Backend) -> None:
    if not isinstance(backend, MemoryBackend):
        return
    backend.put("key", make_value(seed=1))
    live = backend.get("key")
    require(live.device.type == backend.device.type, "live memory", f"get returned a tensor on {live.device}, device is {backend.device}")
    overwrite(live, seed=2)
    require(bits(backend.get("key")) == bits(live), "live memory", "get must return the stored memory itself, not a copy")
    mine = make_value(layout="transposed", seed=3).to(backend.device)
    for key in ("key", "new"):
        backend.adopt(key, mine)
        require(backend.get(key).data_ptr() == mine.data_ptr(), "adopt", "after adopt, get must return the adopted memory itself")
        compare(backend, key, mine, "adopt", "an adopted tensor")
    compare_entries(backend, dict.fromkeys(("key", "new"), TensorSpec.of(mine)), "adopt")
    for name, value in some_values():
        _check_allocate(backend, TensorSpec.of(value), name)


def _check_allocate(backend: MemoryBackend, spec: TensorSpec, name: str) -> None:
    with rule("allocate", name):
        first, second = backend.allocate("a", spec), backend.allocate("b", spec)
        place = raw_bytes(first).fill_(1), raw_bytes(second).fill_(0)
    require(TensorSpec.of(first) == spec, "allocate", f"asked for {spec}, got {TensorSpec.of(first)}")
    require(first.device.type == backend.device.type, "allocate", f"the memory is on {first.device}, device is {backend.device}")
    require(bool((place[0] == 1).all()), "allocate", f"two pieces of memory for {name} overlap")
    backend.adopt("key", second)
    require(backend.get("key").data_ptr() == second.data_ptr(), "allocate", "what allocate returned must be what adopt stores")


def _check_divided(backend: Backend) -> None:
    """Two pieces lie side by side wherever they come from, and stay there for good once the value is completed."""
    if not isinstance(backend, DivisibleBackend):
        return
    size = backend.piece_bytes
    first, second, third = (random_bytes(size, torch.uint8, seed) for seed in (1, 2, 3))
    with rule("pieces"):
        require(backend.divides(2 * size), "pieces", f"a value of two pieces of {size} bytes is not divided")
        memory = backend.reserve(2 * size)
        backend.place(memory, {"first": size, "second": size})
        backend.put("first", first)
        backend.adopt("second", second)
        require(bits(memory) == bits(torch.cat((first, second))), "pieces", "values that were put and adopted do not lie side by side")
        for key, start in (("first", 0), ("second", size)):
            apart = backend.get(key).data_ptr() - memory.data_ptr()
            require(apart == start, "pieces", f"get of a piece returned memory {apart} bytes from where the value begins, not {start}")
        backend.delete("first")
        backend.put("first", third)
        require(bits(memory) == bits(torch.cat((third, second))), "pieces", "a piece that came back is elsewhere, or has moved another one")
        backend.delete("second")
        backend.complete(memory, {size: first})
        require(bits(memory) == bits(torch.cat((third, first))), "pieces", "complete() did not put what was missing beside what was there")


def _extent(backend: FileBackend, key: str) -> FileExtent:
    extent = backend.extent(key)
    require(extent is not None, "extent", f"{key}: what was put is in no file")
    assert extent is not None
    return extent


def _check_file(backend: Backend) -> None:
    if not isinstance(backend, FileBackend):
        return
    for name, value in some_values():
        backend.put(name, value)
        with rule("extent", name):
            extent = _extent(backend, name)
            with Path(extent.path).open("rb") as file:
                file.seek(extent.offset)
                found = file.read(extent.nbytes)
        require(extent.nbytes == TensorSpec.of(value).nbytes, "extent", f"{name}: {extent.nbytes} bytes for {TensorSpec.of(value)}")
        require(found == _raw(value), "extent", f"{name}: the file has other bytes there")
    _require_key_error(backend.extent, "extent")
    backend.put("key", make_value(seed=1))
    extent = _extent(backend, "key")
    with Path(extent.path).open("rb") as file:
        backend.put("key", make_value(seed=2))
        file.seek(extent.offset)
        found = file.read(len(_raw(make_value(seed=1))))
    require(found == _raw(make_value(seed=1)), "extent", "put wrote to a file that a reader has open, instead of replacing it")


def _check_reading(backend: Backend) -> None:
    if not isinstance(backend, ReadingBackend):
        return
    for name, value in (*some_values(), ("large", make_value(torch.uint8, "contiguous", 5_000_003))):
        backend.put(name, value)
        nbytes = TensorSpec.of(value).nbytes
        memory = torch.full((nbytes + 64,), 0x5A, dtype=torch.uint8)
        with rule("read into", name):
            backend.read_into(name, memory[32 : 32 + nbytes])
        require(memory[32 : 32 + nbytes].numpy().tobytes() == _raw(value), "read into", f"{name}: other bytes came, or only some")
        require(
            bool((memory[:32] == 0x5A).all() and (memory[32 + nbytes :] == 0x5A).all()), "read into", f"{name}: more than `out` was written"
        )
    _require_key_error(lambda key: backend.read_into(key, torch.empty(0, dtype=torch.uint8)), "read into")


def _check_sizing(backend: Backend) -> None:
    if not isinstance(backend, SizingBackend):
        return
    noise, zeros = make_value(torch.uint8, size=50_000, seed=1), torch.zeros(100_000, dtype=torch.uint8)
    for value in (noise, zeros, noise, make_value(layout="empty"), make_value(layout="sliced"), torch.zeros((), dtype=torch.bool)):
        backend.put("key", value)
        with rule("stored bytes"):
            stored = backend.stored_bytes("key")
        limit = TensorSpec.of(value).nbytes
        require(
            type(stored) is int and 0 <= stored <= limit,
            "stored bytes",
            f"{stored} bytes for a value of {limit}, which is what was reserved",
        )
        entropy = value is noise
        require(not entropy or stored > 0.9 * limit, "stored bytes", f"{stored} bytes for {limit} of noise: an older value's, or wrong")
    _require_key_error(backend.stored_bytes, "stored bytes")


def _require_key_error(call: Callable[[str], object], name: str) -> None:
    try:
        call("no such key")
    except KeyError:
        return
    except Exception as error:
        raise ConformanceError(name, f"a missing key raised {type(error).__name__}, not KeyError") from error
    raise ConformanceError(name, "a missing key raised nothing")


def _raw(value: torch.Tensor) -> bytes:
    return raw_bytes(value).numpy().tobytes()


CAPABILITY_CHECKS: tuple[Callable[[Backend], None], ...] = (_check_memory, _check_divided, _check_file, _check_reading, _check_sizing)
