"""Checks that a backend or a policy keeps its contract; the error names the rule that it breaks.

A test of a backend is one call: `check_backend(lambda: MyBackend(next(fresh_directories)), reopen=close_and_open_again)`.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tierstore.backend import Backend, MemoryBackend
from tierstore.planning.policy import Policy
from tierstore.spec import TensorSpec, raw_bytes
from tierstore.testing.values import bits, every_value, make_value, overwrite, some_values

ODD_KEYS = (
    "", " ", ".", "..", "../up", "/abs/path", "a/b/c", "a\\b", "C:", "CON", "-rf", "%2e%2e", "__index__", "tail.", "tail ",
    "Key", "key", "KEY", "\u00e9", "e\u0301", "\u65e5\u672c\u8a9e", "\U0001f9ca", "line\nbreak", "nul\0byte", "quote\"'`", "%s{0}$HOME",
    "x" * 300, "x" * 299 + "y", "deep/" * 400,
)  # fmt: skip


class ConformanceError(AssertionError):
    """A broken rule: `rule` is its name, the message also says where it broke."""

    def __init__(self, rule: str, detail: str) -> None:
        self.rule = rule
        super().__init__(f"rule {rule!r} is broken: {detail}")


@contextmanager
def _rule(name: str, detail: str = "") -> Iterator[None]:
    """Blame every exception inside on the rule `name`."""
    try:
        yield
    except ConformanceError:
        raise
    except Exception as error:
        raise ConformanceError(name, f"{detail}: {type(error).__name__}: {error}".removeprefix(": ")) from error


def _require(condition: bool, rule: str, detail: str) -> None:
    if not condition:
        raise ConformanceError(rule, detail)


def check_backend(make_backend: Callable[[], Backend], *, reopen: Callable[[Backend], Backend] | None = None) -> None:
    """Raise `ConformanceError` for the first rule of `Backend` that fresh backends from `make_backend` break.

    `reopen` closes a backend and returns one over the same values; give it for backends that outlive their process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message="ComplexHalf")
        for check in _BACKEND_CHECKS:
            backend = make_backend()
            with _rule("values", "a fresh backend cannot tell its entries"):
                _require(not list(backend.entries()), "fresh", "make_backend() must return an empty backend each time")
            check(backend)
            with _rule("close"):
                backend.close()
        if reopen is not None:
            _check_reopen(make_backend(), reopen)


def _compare(backend: Backend, key: str, expected: torch.Tensor, rule: str, detail: str) -> None:
    """Require the value of `key` to equal `expected`; `rule` is what different bits break."""
    with _rule(rule, detail):
        found = backend.get(key)
    for name in ("dtype", "shape", "stride"):
        have, want = getattr(TensorSpec.of(found), name), getattr(TensorSpec.of(expected), name)
        _require(have == want, name, f"{detail}: put {want}, got {have}")
    _require(bits(found) == bits(expected), rule, f"{detail}: the bits differ")


def _check_values(backend: Backend) -> None:
    for name, value in every_value():
        with _rule("bits", f"put of {name}"):
            backend.put(name, value)
        _compare(backend, name, value, "bits", name)
    for name, value in some_values():
        _compare(backend, name, value, "bits", f"{name}, after other puts")
    _compare_entries(backend, {name: TensorSpec.of(value) for name, value in every_value()}, "entries")
    name, _ = next(every_value())
    backend.delete(name)
    _require(name not in dict(backend.entries()), "entries", "a deleted key is still listed")


def _compare_entries(backend: Backend, expected: dict[str, TensorSpec], rule: str) -> None:
    with _rule(rule):
        listed = list(backend.entries())
    found = dict(listed)
    _require(len(listed) == len(found), rule, f"entries() names a key twice: {sorted(key for key, _ in listed)}")
    _require(found.keys() == expected.keys(), rule, f"entries() and puts differ in the keys {sorted(found.keys() ^ expected.keys())}")
    for key, spec in expected.items():
        _require(found[key] == spec, rule, f"entries() says {found[key]} ({found[key].nbytes} bytes) for {key!r}, put was {spec}")


def _check_put_copies(backend: Backend) -> None:
    for layout in ("contiguous", "transposed", "sliced"):
        value = make_value(layout=layout, seed=1)
        before = value.clone(memory_format=torch.preserve_format)
        backend.put(layout, value)
        overwrite(value, seed=2)
        found = bits(backend.get(layout))
        _require(found == bits(before), "put copies", f"writing to the {layout} tensor given to put changed the stored value")


def _check_get_is_private(backend: Backend) -> None:
    if isinstance(backend, MemoryBackend):
        return
    value = make_value(seed=1)
    backend.put("key", value)
    overwrite(backend.get("key"), seed=2)
    _require(bits(backend.get("key")) == bits(value), "get is private", "writing to what get returned changed the stored value")


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
        _require(bits(held) == bits(first), "get survives", f"a tensor from get changed at {event} of the same key")


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
    _compare_entries(backend, {"present": TensorSpec.of(make_value())}, "missing key")


def _check_overwrite(backend: Backend) -> None:
    values = [make_value(torch.float32, "contiguous", 9, 1), make_value(torch.float32, "contiguous", 9, 2)]
    values += [
        make_value(torch.int64, "transposed", 3, 3),
        make_value(torch.bool, "scalar", 1, 4),
        make_value(torch.uint8, "sliced", 500, 5),
    ]
    for value in values:
        backend.put("key", value)
        _compare(backend, "key", value, "overwrite", f"after putting {TensorSpec.of(value)} over an older value")
        _compare_entries(backend, {"key": TensorSpec.of(value)}, "overwrite")


def _check_delete(backend: Backend) -> None:
    backend.put("kept", make_value(seed=1))
    backend.put("gone", make_value(seed=2))
    memory = StorageWeakRef(backend.get("gone").untyped_storage())  # type: ignore[no-untyped-call]
    backend.delete("gone")
    _require("gone" not in dict(backend.entries()), "delete", "a deleted key is still listed")
    _require(not isinstance(backend, MemoryBackend) or memory.expired(), "delete", "the memory of a deleted value is still alive")  # type: ignore[no-untyped-call]
    _compare(backend, "kept", make_value(seed=1), "delete", "another key, after a delete")


def _check_odd_keys(backend: Backend) -> None:
    values = {key: make_value(seed=seed) for seed, key in enumerate(ODD_KEYS)}
    for key, value in values.items():
        with _rule("odd keys", f"put of {key[:40]!r}"):
            backend.put(key, value)
    for key, value in values.items():
        _compare(backend, key, value, "odd keys", repr(key[:40]))
    _compare_entries(backend, {key: TensorSpec.of(value) for key, value in values.items()}, "odd keys")
    for key in values:
        with _rule("odd keys", f"delete of {key[:40]!r}"):
            backend.delete(key)
    _compare_entries(backend, {}, "odd keys")


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
    _compare(backend, "key", old, "atomic put", "the older value, after a put that failed")
    _compare_entries(backend, {"key": TensorSpec.of(old)}, "atomic put")


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
    _compare_entries(backend, {}, "threads")


def _one_turn(backend: Backend, key: str, value: torch.Tensor) -> None:
    backend.put(key, value)
    if bits(backend.get(key)) != bits(value):
        raise ValueError(f"another value came back for {key!r}")
    backend.delete(key)


def _check_memory(backend: Backend) -> None:
    if not isinstance(backend, MemoryBackend):
        return
    backend.put("key", make_value(seed=1))
    live = backend.get("key")
    _require(live.device.type == backend.device.type, "live memory", f"get returned a tensor on {live.device}, device is {backend.device}")
    overwrite(live, seed=2)
    _require(bits(backend.get("key")) == bits(live), "live memory", "get must return the stored memory itself, not a copy")
    mine = make_value(layout="transposed", seed=3).to(backend.device)
    for key in ("key", "new"):
        backend.adopt(key, mine)
        _require(backend.get(key).data_ptr() == mine.data_ptr(), "adopt", "after adopt, get must return the adopted memory itself")
        _compare(backend, key, mine, "adopt", "an adopted tensor")
    _compare_entries(backend, dict.fromkeys(("key", "new"), TensorSpec.of(mine)), "adopt")
    for name, value in some_values():
        _check_allocate(backend, TensorSpec.of(value), name)


def _check_allocate(backend: MemoryBackend, spec: TensorSpec, name: str) -> None:
    with _rule("allocate", name):
        first, second = backend.allocate("a", spec), backend.allocate("b", spec)
        place = raw_bytes(first).fill_(1), raw_bytes(second).fill_(0)
    _require(TensorSpec.of(first) == spec, "allocate", f"asked for {spec}, got {TensorSpec.of(first)}")
    _require(first.device.type == backend.device.type, "allocate", f"the memory is on {first.device}, device is {backend.device}")
    _require(bool((place[0] == 1).all()), "allocate", f"two pieces of memory for {name} overlap")
    backend.adopt("key", second)
    _require(backend.get("key").data_ptr() == second.data_ptr(), "allocate", "what allocate returned must be what adopt stores")


def _check_reopen(backend: Backend, reopen: Callable[[Backend], Backend]) -> None:
    values = dict(some_values()) | {key: make_value(seed=seed) for seed, key in enumerate(ODD_KEYS)}
    for key, value in values.items():
        backend.put(key, value)
    backend.put("gone", make_value())
    backend.delete("gone")
    backend.put("replaced", make_value(seed=1))
    backend.put("replaced", values.setdefault("replaced", make_value(seed=2)))
    for attempt in ("first", "second"):
        with _rule("reopen"):
            backend = reopen(backend)
        _compare_entries(backend, {key: TensorSpec.of(value) for key, value in values.items()}, "reopen")
        for key, value in values.items():
            _compare(backend, key, value, "reopen", f"{key[:40]!r} after the {attempt} reopening")
    backend.close()


_BACKEND_CHECKS: tuple[Callable[[Backend], None], ...] = (
    _check_missing, _check_values, _check_overwrite, _check_put_copies, _check_get_is_private, _check_memory,
    _check_get_survives, _check_delete, _check_atomic_put, _check_odd_keys, _check_threads,
)  # fmt: skip


def check_policy(make_policy: Callable[[], Policy], *, events: int = 2000, seed: int = 0) -> None:
    """Raise `ConformanceError` for the first rule of `Policy` that breaks under `events` random events."""
    policy, other, present = make_policy(), make_policy(), set[str]()
    _compare_victims(policy, present, "fresh")
    other.insert("of another tier", 1)
    rng = random.Random(seed)
    for _ in range(events):
        event = rng.choice(("insert", "insert", "access", "access", "remove", "insert again"))
        key = f"key {rng.randrange(24)}"
        if event in ("access", "remove", "insert again") and present:
            key = rng.choice(sorted(present))
        elif event != "insert" or key in present:
            continue
        _tell(policy, event, key, rng.randrange(1000), present)
        _compare_victims(policy, present, event)
    _compare_victims(other, {"of another tier"}, "independence")
    for key in sorted(present):
        _tell(policy, "remove", key, 0, present)
    _compare_victims(policy, set(), "remove")


def _tell(policy: Policy, event: str, key: str, nbytes: int, present: set[str]) -> None:
    """Report one event to the policy and to the model."""
    with _rule(event, f"{event} of {key!r}"):
        if event.startswith("insert"):
            policy.insert(key, nbytes)
            present.add(key)
        elif event == "access":
            policy.access(key)
        else:
            policy.remove(key)
            present.discard(key)


def _compare_victims(policy: Policy, present: set[str], rule: str) -> None:
    with _rule(rule, "victims()"):
        first = list(policy.victims())
    _require(isinstance(policy.victims(), Iterator), "iterator", "victims() must return an iterator")
    twice = [key for key, count in Counter(first).items() if count > 1]
    _require(not twice, rule, f"victims() yields {twice} twice")
    _require(set(first) == present, rule, f"victims() and the tier differ in {sorted(set(first) ^ present)}")
    next(policy.victims(), None)  # looking at one victim is no event
    _require(list(policy.victims()) == first, "stable order", "victims() changed its order without an event")
