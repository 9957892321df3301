"""What holds for every backend, each rule with its check."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tierstore.backend import Backend, MemoryBackend
from tierstore.spec import TensorSpec
from tierstore.testing.rules import ConformanceError, compare, compare_entries, require, rule
from tierstore.testing.values import bits, every_value, make_value, overwrite, some_values

ODD_KEYS = (
    "", " ", ".", "..", "../up", "/abs/path", "a/b/c", "a\\b", "C:", "CON", "-rf", "%2e%2e", "__index__", "tail.", "tail ",
    "Key", "key", "KEY", "\u00e9", "e\u0301", "\u65e5\u672c\u8a9e", "\U0001f9ca", "line\nbreak", "nul\0byte", "quote\"'`", "%s{0}$HOME",
    "x" * 300, "x" * 299 + "y", "deep/" * 400,
)  # fmt: skip


def _check_values(backend: Backend) -> None:
    for name, value in every_value():
        with rule("bits", f"put of {name}"):
            backend.put(name, value)
        compare(backend, name, value, "bits", name)
    for name, value in some_values():
        compare(backend, name, value, "bits", f"{name}, after other puts")
    compare_entries(backend, {name: TensorSpec.of(value) for name, value in every_value()}, "entries")
    name, _ = next(every_value())
    backend.delete(name)
    require(name not in dict(backend.entries()), "entries", "a deleted key is still listed")


def _check_put_copies(backend: Backend) -> None:
    for layout in ("contiguous", "transposed", "sliced"):
        value = make_value(layout=layout, seed=1)
        before = value.clone(memory_format=torch.preserve_format)
        backend.put(layout, value)
        require(bits(value) == bits(before), "put only reads", f"put changed the {layout} tensor that it was given")
        overwrite(value, seed=2)
        found = bits(backend.get(layout))
        require(found == bits(before), "put copies", f"writing to the {layout} tensor given to put changed the stored value")


def _check_plain(backend: Backend) -> None:
    """A value is a tensor like any other, also where a user has set another default device."""
    value = make_value(seed=1)
    with torch.device("meta"), rule("plain tensor", "under another default device"):
        backend.put("key", value)
        found = backend.get("key")
    require(found.device.type != "meta", "plain tensor", "get followed torch's default device")
    require(type(found) is torch.Tensor, "plain tensor", f"get returned a {type(found).__name__}")
    require(not found.requires_grad, "plain tensor", "get returned what requires a gradient")


def _check_large(backend: Backend) -> None:
    """More bytes than any buffer or request has, and no multiple of one."""
    value = make_value(torch.uint8, "contiguous", 5_000_003, seed=1)
    with rule("large values"):
        backend.put("key", value)
    compare(backend, "key", value, "large values", "a value of 10 MB")


def _check_get_is_private(backend: Backend) -> None:
    if isinstance(backend, MemoryBackend):
        return
    value = make_value(seed=1)
    backend.put("key", value)
    overwrite(backend.get("key"), seed=2)
    require(bits(backend.get("key")) == bits(value), "get is private", "writing to what get returned changed the stored value")


def _check_get_survives(backend: Backend) -> None:
    """What `get` returned is read while another thread replaces or deletes the key."""
    first, second = make_value(size=2000, seed=1), make_value(size=2000, seed=2)
    for event in ("put", "delete"):
        backend.put("key", first)
        held = backend.get("key")
        if event == "put":
            backend.put("key", second)
        else:
            backend.delete("key")
        backend.put("another", make_value(size=2000, seed=3))  # reuses the memory if it was given up
        require(bits(held) == bits(first), "get survives", f"a tensor from get changed at {event} of the same key")


def _check_missing(backend: Backend) -> None:
    backend.put("present", make_value())
    backend.put("gone", make_value())
    backend.delete("gone")
    for key in ("never", "gone"):
        for call in (backend.get, backend.delete):
            try:
                call(key)
            except KeyError:
                continue
            except Exception as error:
                raise ConformanceError("missing key", f"{call.__name__} raised {type(error).__name__}, not KeyError") from error
            raise ConformanceError("missing key", f"{call.__name__} of a key that is not there raised nothing")
    compare_entries(backend, {"present": TensorSpec.of(make_value())}, "missing key")


def _check_overwrite(backend: Backend) -> None:
    values = [make_value(torch.float32, "contiguous", 9, 1), make_value(torch.float32, "contiguous", 9, 2)]
    values += [
        make_value(torch.int64, "transposed", 3, 3),
        make_value(torch.bool, "scalar", 1, 4),
        make_value(torch.uint8, "sliced", 500, 5),
    ]
    for value in values:
        backend.put("key", value)
        compare(backend, "key", value, "overwrite", f"after putting {TensorSpec.of(value)} over an older value")
        compare_entries(backend, {"key": TensorSpec.of(value)}, "overwrite")


def _check_delete(backend: Backend) -> None:
    backend.put("kept", make_value(seed=1))
    backend.put("gone", make_value(seed=2))
    memory = StorageWeakRef(backend.get("gone").untyped_storage())  # type: ignore[no-untyped-call]
    backend.delete("gone")
    require("gone" not in dict(backend.entries()), "delete", "a deleted key is still listed")
    require(not isinstance(backend, MemoryBackend) or memory.expired(), "delete", "the memory of a deleted value is still alive")  # type: ignore[no-untyped-call]
    compare(backend, "kept", make_value(seed=1), "delete", "another key, after a delete")


def _check_odd_keys(backend: Backend) -> None:
    values = {key: make_value(seed=seed) for seed, key in enumerate(ODD_KEYS)}
    for key, value in values.items():
        with rule("odd keys", f"put of {key[:40]!r}"):
            backend.put(key, value)
    for key, value in values.items():
        compare(backend, key, value, "odd keys", repr(key[:40]))
    compare_entries(backend, {key: TensorSpec.of(value) for key, value in values.items()}, "odd keys")
    for key in values:
        with rule("odd keys", f"delete of {key[:40]!r}"):
            backend.delete(key)
    compare_entries(backend, {}, "odd keys")


def _check_atomic_put(backend: Backend) -> None:
    """A tensor without data describes itself like any other and fails when its bytes are read."""
    old = make_value(size=50, seed=1)
    backend.put("key", old)
    for key in ("key", "new"):
        try:
            backend.put(key, torch.empty(70, device="meta"))
        except Exception:  # noqa: BLE001  (which one is the backend's choice)
            pass
        else:
            raise ConformanceError("atomic put", "put of a tensor whose bytes cannot be read raised nothing")
    compare(backend, "key", old, "atomic put", "the older value, after a put that failed")
    compare_entries(backend, {"key": TensorSpec.of(old)}, "atomic put")


def _check_threads(backend: Backend, threads: int = 8, rounds: int = 12) -> None:
    """Each thread works on its own keys, as the store promises."""
    failures: list[BaseException] = []
    start = threading.Barrier(threads)

    def work(number: int) -> None:
        try:
            start.wait()
            for turn in range(rounds):
                _one_turn(backend, f"thread {number} key {turn % 3}", make_value(size=50 + number, seed=100 * number + turn))
        except BaseException as error:  # noqa: BLE001  (reported by the checking thread)
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise ConformanceError("threads", f"{threads} threads on different keys: {failures[0]!r}") from failures[0]
    compare_entries(backend, {}, "threads")


def _one_turn(backend: Backend, key: str, value: torch.Tensor) -> None:
    backend.put(key, value)
    if bits(backend.get(key)) != bits(value):
        raise ValueError(f"another value came back for {key!r}")
    backend.delete(key)


def check_reopen(backend: Backend, reopen: Callable[[Backend], Backend]) -> None:
    values = dict(some_values()) | {key: make_value(seed=seed) for seed, key in enumerate(ODD_KEYS)}
    for key, value in values.items():
        backend.put(key, value)
    backend.put("gone", make_value())
    backend.delete("gone")
    backend.put("replaced", make_value(seed=1))
    backend.put("replaced", values.setdefault("replaced", make_value(seed=2)))
    for attempt in ("first", "second"):
        with rule("reopen"):
            backend = reopen(backend)
        compare_entries(backend, {key: TensorSpec.of(value) for key, value in values.items()}, "reopen")
        for key, value in values.items():
            compare(backend, key, value, "reopen", f"{key[:40]!r} after the {attempt} reopening")
    backend.close()


BACKEND_CHECKS: tuple[Callable[[Backend], None], ...] = (
    _check_missing, _check_put_copies, _check_values, _check_overwrite, _check_get_is_private, _check_plain, _check_get_survives,
    _check_delete, _check_atomic_put, _check_odd_keys, _check_threads, _check_large,
)  # fmt: skip
