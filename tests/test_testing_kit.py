"""The kit finds the mistake in each deliberately broken class and names the right rule; sound classes pass."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tierstore.backend import Backend, FileBackend, FileExtent, MappedBackend, MemoryBackend, ReadingBackend, SizingBackend
from tierstore.planning.classic import LRU
from tierstore.planning.names import policy_factory
from tierstore.planning.policy import Foresight, Policy
from tierstore.registry import open_backend
from tierstore.spec import TensorSpec, raw_bytes, typed_view
from tierstore.testing import ConformanceError, Delays, DictBackend, Faults, InjectedError, check_backend, check_policy, wrap
from tierstore.testing.conformance import BACKEND_RULES, POLICY_RULES
from tierstore.testing.faults import Call, Moment
from tierstore.testing.values import DTYPES, LAYOUTS, bits, make_value, overwrite


def device_backend() -> MemoryBackend:
    backend = open_backend("device", "cpu")
    assert isinstance(backend, MemoryBackend)
    return backend


DeviceBackend = type(device_backend())
RamBackend = type(open_backend("ram"))


# -- sound backends pass ----------------------------------------------------------------------------------------------


class Kept(DictBackend):
    """Outlives its `close`, as a file would."""

    def reopened(self) -> Kept:
        other = Kept()
        other._values = dict(self._values)
        return other


SOUND = [
    DictBackend,
    device_backend,
    lambda: open_backend("pinned"),
    lambda: open_backend("ram"),
    lambda: Filed(),
    lambda: Reads(),
    lambda: Sizes(),
]


@pytest.mark.parametrize("make", SOUND)
def test_sound_backends_pass(make: Callable[[], Backend]) -> None:
    check_backend(make)


def test_a_sound_persistent_backend_passes() -> None:
    check_backend(Kept, reopen=lambda old: old.reopened())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["disk", "zarr"])
def test_built_in_persistent_backends_pass(name: str, tmp_path: Path) -> None:
    number = itertools.count()

    def reopen(old: Backend) -> Backend:
        old.close()
        return open_backend(name, old.path)  # type: ignore[attr-defined]

    check_backend(lambda: open_backend(name, tmp_path / str(next(number))), reopen=reopen)


@pytest.mark.parametrize("make", [DictBackend, device_backend])
def test_wrapped_backends_pass(make: Callable[[], Backend]) -> None:
    check_backend(lambda: wrap(wrap(make(), Faults()), Delays(longest=0.0001)))


# -- broken backends are caught ---------------------------------------------------------------------------------------


class LosesDtype(DictBackend):
    def put(self, key: str, tensor: torch.Tensor) -> None:
        super().put(key, tensor.view(torch.uint8) if tensor.dtype is torch.float8_e5m2 and tensor.dim() else tensor)


class LosesShape(DictBackend):
    def get(self, key: str) -> torch.Tensor:
        found = super().get(key)
        return found if found.dim() else found.reshape(1)


class LosesStride(DictBackend):
    def get(self, key: str) -> torch.Tensor:
        found = super().get(key)
        return found.contiguous() if found.dtype is torch.float32 else found


class LosesBits(DictBackend):
    def put(self, key: str, tensor: torch.Tensor) -> None:
        super().put(key, tensor.float().double() if tensor.dtype is torch.float64 and tensor.is_contiguous() else tensor)


class RefusesDtype(DictBackend):
    def put(self, key: str, tensor: torch.Tensor) -> None:
        if tensor.dtype is torch.complex64:
            raise TypeError("what is complex64?")
        super().put(key, tensor)


class AliasesCaller(DictBackend):
    def put(self, key: str, tensor: torch.Tensor) -> None:
        raw_bytes(tensor).to("cpu")
        if tensor.is_meta:
            raise ValueError("no data")
        self._values[key] = TensorSpec.of(tensor), raw_bytes(tensor)


class HandsOutItsMemory(DictBackend):
    def get(self, key: str) -> torch.Tensor:
        spec, raw = self._values[key]
        return typed_view(raw, spec)


class ReusesMemory(DictBackend):
    """Writes a new value of the same size over the old one, which a reader may still hold."""

    def __init__(self) -> None:
        super().__init__()
        self._handed: dict[str, torch.Tensor] = {}

    def put(self, key: str, tensor: torch.Tensor) -> None:
        if key in self._handed and raw_bytes(self._handed[key]).numel() == TensorSpec.of(tensor).nbytes:
            raw_bytes(self._handed[key]).copy_(raw_bytes(tensor))
        super().put(key, tensor)

    def get(self, key: str) -> torch.Tensor:
        self._handed[key] = super().get(key)
        return self._handed[key]


class ClearsOnDelete(ReusesMemory):
    def put(self, key: str, tensor: torch.Tensor) -> None:
        DictBackend.put(self, key, tensor)

    def delete(self, key: str) -> None:
        super().delete(key)
        if key in self._handed:
            raw_bytes(self._handed[key]).zero_()


class ReturnsNoneForMissing(DictBackend):
    def get(self, key: str) -> torch.Tensor:
        return super().get(key) if key in self._values else torch.empty(0)


class WrongErrorForMissing(DictBackend):
    def get(self, key: str) -> torch.Tensor:
        if key not in self._values:
            raise FileNotFoundError(key)
        return super().get(key)


class DeletesMissingInSilence(DictBackend):
    def delete(self, key: str) -> None:
        self._values.pop(key, None)


class KeepsTheFirstValue(DictBackend):
    def put(self, key: str, tensor: torch.Tensor) -> None:
        if key not in self._values:
            super().put(key, tensor)


class ListsOldSpec(DictBackend):
    def __init__(self) -> None:
        super().__init__()
        self._first: dict[str, TensorSpec] = {}

    def put(self, key: str, tensor: torch.Tensor) -> None:
        super().put(key, tensor)
        self._first.setdefault(key, TensorSpec.of(tensor))

    def delete(self, key: str) -> None:
        super().delete(key)
        del self._first[key]

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        return iter(self._first.items())


class DenseEntries(DictBackend):
    """Counts the bytes of a sliced tensor as if it were packed, so a ledger comes up short."""

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        for key, spec in super().entries():
            yield key, spec if spec.dense else TensorSpec.of(torch.empty(spec.shape, dtype=spec.dtype))


class ForgetsEmpty(DictBackend):
    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        return ((key, spec) for key, spec in super().entries() if spec.nbytes)


class ListsTwice(DictBackend):
    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        return itertools.chain(super().entries(), itertools.islice(super().entries(), 1))


class ListsDeleted(DictBackend):
    def __init__(self) -> None:
        super().__init__()
        self._ever: dict[str, TensorSpec] = {}

    def put(self, key: str, tensor: torch.Tensor) -> None:
        super().put(key, tensor)
        self._ever[key] = TensorSpec.of(tensor)

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        return iter(self._ever.items())


class FoldsCase(DictBackend):
    def put(self, key: str, tensor: torch.Tensor) -> None:
        super().put(key.lower(), tensor)

    def get(self, key: str) -> torch.Tensor:
        return super().get(key.lower())

    def delete(self, key: str) -> None:
        super().delete(key.lower())


class ShortKeys(DictBackend):
    def put(self, key: str, tensor: torch.Tensor) -> None:
        if len(key.encode()) > 255:
            raise OSError(36, "File name too long")
        super().put(key, tensor)


class NormalisesUnicode(FoldsCase):
    def put(self, key: str, tensor: torch.Tensor) -> None:
        DictBackend.put(self, key.replace("e\u0301", "\u00e9"), tensor)

    def get(self, key: str) -> torch.Tensor:
        return DictBackend.get(self, key.replace("e\u0301", "\u00e9"))

    def delete(self, key: str) -> None:
        DictBackend.delete(self, key.replace("e\u0301", "\u00e9"))


class DropsBeforeWriting(DictBackend):
    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._values.pop(key, None)
        super().put(key, tensor)


class RecordsBeforeWriting(DictBackend):
    """The key is there before its bytes are, so a failed first put leaves an entry behind."""

    def put(self, key: str, tensor: torch.Tensor) -> None:
        spec = TensorSpec.of(tensor)
        self._values.setdefault(key, (spec, torch.zeros(spec.nbytes, dtype=torch.uint8)))
        super().put(key, tensor)


class StoresNothingForNothing(DictBackend):
    def put(self, key: str, tensor: torch.Tensor) -> None:
        if not tensor.is_meta:
            super().put(key, tensor)


class SharesABuffer(DictBackend):
    """One scratch buffer for all threads."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer = torch.empty(1 << 16, dtype=torch.uint8)
        self._turn = threading.Event()

    def put(self, key: str, tensor: torch.Tensor) -> None:
        spec = TensorSpec.of(tensor)
        self._buffer[: spec.nbytes].copy_(raw_bytes(tensor))
        self._turn.wait(0.001)
        self._values[key] = spec, self._buffer[: spec.nbytes].clone()


class LosesOnReopen(Kept):
    def reopened(self) -> Kept:
        other = super().reopened()
        other._values = {key: value for key, value in other._values.items() if value[0].nbytes}
        return other


class RevivesOnReopen(Kept):
    def __init__(self) -> None:
        super().__init__()
        self._deleted: dict[str, tuple[TensorSpec, torch.Tensor]] = {}

    def delete(self, key: str) -> None:
        self._deleted[key] = self._values[key]
        super().delete(key)

    def reopened(self) -> Kept:
        other = super().reopened()
        other._values |= self._deleted
        return other


class CopyingMemory(DeviceBackend):  # type: ignore[valid-type, misc]
    def get(self, key: str) -> torch.Tensor:
        live: torch.Tensor = super().get(key)
        return typed_view(raw_bytes(live).clone(), TensorSpec.of(live))


class CopyingAdopt(DeviceBackend):  # type: ignore[valid-type, misc]
    def adopt(self, key: str, tensor: torch.Tensor) -> None:
        self.put(key, tensor)


class OwnPut(DeviceBackend):  # type: ignore[valid-type, misc]
    """Does not use `allocate` itself, so that a mistake there shows only there."""

    def put(self, key: str, tensor: torch.Tensor) -> None:
        self.adopt(key, typed_view(raw_bytes(tensor).to("cpu", copy=True), TensorSpec.of(tensor)))


class AllocatesOnce(OwnPut):
    def allocate(self, key: str, spec: TensorSpec, phase: int = 0) -> torch.Tensor:
        place: torch.Tensor = self.__dict__.setdefault("place", torch.empty(1 << 20, dtype=torch.uint8))
        return typed_view(place, spec)


class AllocatesDense(OwnPut):
    def allocate(self, key: str, spec: TensorSpec, phase: int = 0) -> torch.Tensor:
        return torch.empty(spec.shape, dtype=spec.dtype)


class Scatters(RamBackend):  # type: ignore[valid-type, misc]
    """Adopts what it is given where that lies."""

    def adopt(self, key: str, tensor: torch.Tensor) -> None:
        self._tensors[key] = tensor


class NeverDivides(RamBackend):  # type: ignore[valid-type, misc]
    def divides(self, nbytes: int) -> bool:
        return False


class LeavesHoles(RamBackend):  # type: ignore[valid-type, misc]
    def complete(self, memory: torch.Tensor, parts: Mapping[int, FileExtent | torch.Tensor]) -> None:
        super().complete(memory, {})


class LeakingMemory(DeviceBackend):  # type: ignore[valid-type, misc]
    def delete(self, key: str) -> None:
        self.__dict__.setdefault("bin", []).append(self.get(key))
        super().delete(key)


class WritesToCaller(DictBackend):
    """Turns the bytes around in the tensor that it was given."""

    def put(self, key: str, tensor: torch.Tensor) -> None:
        super().put(key, tensor)
        raw_bytes(tensor).copy_(raw_bytes(tensor).flip(0))


class ReturnsParameters(DictBackend):
    def get(self, key: str) -> torch.Tensor:
        return torch.nn.Parameter(super().get(key), requires_grad=False)


class WantsGradients(DictBackend):
    def get(self, key: str) -> torch.Tensor:
        found = super().get(key)
        return found.requires_grad_(found.dtype is torch.float32)


class FollowsTheDefaultDevice(DictBackend):
    def get(self, key: str) -> torch.Tensor:
        spec, raw = self._values[key]
        copy = torch.empty(spec.nbytes, dtype=torch.uint8)
        return typed_view(copy.copy_(raw), spec)


class TruncatesLarge(DictBackend):
    """Takes one read call for all of the file."""

    def get(self, key: str) -> torch.Tensor:
        found = super().get(key)
        raw_bytes(found)[4 << 20 :] = 0
        return found


class Filed(DictBackend, FileBackend):
    """Also writes each value to a file of its own, behind eight bytes of something else."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = TemporaryDirectory()
        self._count = itertools.count()
        self._paths: dict[str, Path] = {}

    def put(self, key: str, tensor: torch.Tensor) -> None:
        super().put(key, tensor)
        self._paths[key] = self.place(key)
        self._paths[key].write_bytes(b"8 bytes." + raw_bytes(tensor).numpy().tobytes())

    def place(self, key: str) -> Path:
        return Path(self._folder.name, str(next(self._count)))

    def delete(self, key: str) -> None:
        super().delete(key)
        self._paths.pop(key).unlink()

    def extent(self, key: str) -> FileExtent:
        return FileExtent(str(self._paths[key]), 8, self._values[key][0].nbytes)

    def close(self) -> None:
        self._folder.cleanup()


class ForgetsItsHeader(Filed):
    def extent(self, key: str) -> FileExtent:
        return replace(super().extent(key), offset=0)


class CountsElements(Filed):
    """Takes the elements' bytes for the bytes that they span."""

    def extent(self, key: str) -> FileExtent:
        spec = self._values[key][0]
        return replace(super().extent(key), nbytes=torch.Size(spec.shape).numel() * spec.dtype.itemsize)


class WritesInPlace(Filed):
    def place(self, key: str) -> Path:
        return self._paths.get(key) or super().place(key)


class Reads(DictBackend, ReadingBackend):
    def read_into(self, key: str, out: torch.Tensor) -> None:
        out.copy_(self._values[key][1])


class ReadsTheFirstPart(Reads):
    def read_into(self, key: str, out: torch.Tensor) -> None:
        out[: 1 << 20] = self._values[key][1][: 1 << 20]


class ReadsWholePages(Reads):
    """Rounds up to what its device likes, past the end of the memory that is not its own."""

    def read_into(self, key: str, out: torch.Tensor) -> None:
        super().read_into(key, out)
        end = out.storage_offset() + out.numel()
        torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage(), end, (16,), (1,)).zero_()


class ReadsNothing(Reads):
    def read_into(self, key: str, out: torch.Tensor) -> None:
        if key in self._values:
            super().read_into(key, out)


class Sizes(DictBackend, SizingBackend):
    """Counts a value of zeros as one byte."""

    def stored_bytes(self, key: str) -> int:
        raw = self._values[key][1]
        return len(raw) if raw.any() else min(1, len(raw))


class CountsItsHeader(Sizes):
    def stored_bytes(self, key: str) -> int:
        return super().stored_bytes(key) + 16


class CountsTheFirstValue(Sizes):
    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[str, int] = {}

    def stored_bytes(self, key: str) -> int:
        return self._sizes.setdefault(key, super().stored_bytes(key))


class GuessesASize(Sizes):
    def stored_bytes(self, key: str) -> int:
        return self._values[key][0].nbytes // 2


class SizesAnything(Sizes):
    def stored_bytes(self, key: str) -> int:
        return super().stored_bytes(key) if key in self._values else 0


class KeepsDeleted(DictBackend):
    def __init__(self) -> None:
        super().__init__()
        self._bin: list[object] = []

    def delete(self, key: str) -> None:
        self._bin.append(self._values[key])
        super().delete(key)


class KeepsReplaced(KeepsDeleted):
    def put(self, key: str, tensor: torch.Tensor) -> None:
        self._bin.append(self._values.get(key))
        super().put(key, tensor)

    def delete(self, key: str) -> None:
        DictBackend.delete(self, key)


class FailingClose(DictBackend):
    def close(self) -> None:
        raise RuntimeError("already gone")


class LeavesAThread(DictBackend):
    """Starts one at the first put, and ends it never (a test ends it, so that no other test sees it)."""

    over = threading.Event()

    def put(self, key: str, tensor: torch.Tensor) -> None:
        super().put(key, tensor)
        if "_thread" not in self.__dict__:
            self.__dict__["_thread"] = thread = threading.Thread(target=self.over.wait, name="as all others", daemon=True)
            thread.start()


class LeavesAFile(DictBackend):
    def __init__(self) -> None:
        super().__init__()
        os.open(os.devnull, os.O_RDONLY)


BROKEN_BACKENDS = {
    LosesDtype: "dtype", LosesShape: "shape", LosesStride: "stride", LosesBits: "bits", RefusesDtype: "bits",
    AliasesCaller: "put copies", WritesToCaller: "put only reads", HandsOutItsMemory: "get is private", ReusesMemory: "get survives",
    ClearsOnDelete: "get survives", ReturnsParameters: "plain tensor", WantsGradients: "plain tensor",
    FollowsTheDefaultDevice: "plain tensor", TruncatesLarge: "large values",
    ReturnsNoneForMissing: "missing key", WrongErrorForMissing: "missing key", DeletesMissingInSilence: "missing key",
    KeepsTheFirstValue: "overwrite", ListsOldSpec: "overwrite", DenseEntries: "entries", ForgetsEmpty: "entries",
    ListsTwice: "missing key", ListsDeleted: "missing key", FoldsCase: "odd keys", ShortKeys: "odd keys", NormalisesUnicode: "odd keys",
    DropsBeforeWriting: "atomic put", RecordsBeforeWriting: "atomic put", StoresNothingForNothing: "atomic put", SharesABuffer: "threads",
    LosesOnReopen: "reopen", RevivesOnReopen: "reopen", CopyingMemory: "live memory",
    CopyingAdopt: "adopt", AllocatesOnce: "allocate", AllocatesDense: "allocate", LeakingMemory: "delete",
    Scatters: "pieces", NeverDivides: "pieces", LeavesHoles: "pieces",
    ForgetsItsHeader: "extent", CountsElements: "extent", WritesInPlace: "extent",
    ReadsTheFirstPart: "read into", ReadsWholePages: "read into", ReadsNothing: "read into",
    CountsItsHeader: "stored bytes", CountsTheFirstValue: "stored bytes", GuessesASize: "stored bytes", SizesAnything: "stored bytes",
    KeepsDeleted: "release", KeepsReplaced: "release", FailingClose: "close", LeavesAThread: "close", LeavesAFile: "close",
}  # fmt: skip


def test_every_rule_has_a_specimen_that_breaks_it() -> None:
    assert {*BROKEN_BACKENDS.values(), "fresh"} == BACKEND_RULES
    assert {*BROKEN_POLICIES.values()} == POLICY_RULES


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    """A specimen may leave a file open, and not keep it."""
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    LeavesAThread.over.clear()
    yield
    for path in Path("/proc/self/fd").iterdir():
        if path.name not in before and path.is_symlink() and str(path.readlink()) == os.devnull:
            os.close(int(path.name))
    LeavesAThread.over.set()


@pytest.mark.parametrize(("broken", "rule"), BROKEN_BACKENDS.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_backend_is_caught(broken: type[Backend], rule: str) -> None:
    reopen = (lambda old: old.reopened()) if issubclass(broken, Kept) else None
    with pytest.raises(ConformanceError) as caught:
        check_backend(broken, reopen=reopen)
    assert caught.value.rule == rule, caught.value
    assert isinstance(caught.value, AssertionError)
    assert repr(rule) in str(caught.value)


def test_a_backend_that_is_not_fresh_is_noticed() -> None:
    shared = DictBackend()
    with pytest.raises(ConformanceError) as caught:
        check_backend(lambda: shared)
    assert caught.value.rule == "fresh"


# -- policies ---------------------------------------------------------------------------------------------------------


class Forgetful(LRU):
    """Loses a key that is inserted again."""

    def insert(self, key: str, nbytes: int) -> None:
        if key in self._order:
            del self._order[key]
        else:
            super().insert(key, nbytes)


class Listed(Policy):
    """A correct policy in the plainest way, for mistakes to be made in."""

    def __init__(self) -> None:
        self._keys: list[str] = []

    def insert(self, key: str, nbytes: int) -> None:
        if key not in self._keys:
            self._keys.append(key)

    def access(self, key: str) -> None:
        self._keys.remove(key)
        self._keys.append(key)

    def remove(self, key: str) -> None:
        self._keys.remove(key)

    def victims(self) -> Iterator[str]:
        return iter(self._keys)


class Twice(Listed):
    def insert(self, key: str, nbytes: int) -> None:
        self._keys.append(key)


class NeverRemoves(Listed):
    def remove(self, key: str) -> None:
        pass


class AccessInserts(Listed):
    def access(self, key: str) -> None:
        self._keys.append(key)


class RefusesAccess(Listed):
    def access(self, key: str) -> None:
        raise KeyError(key)


class Consumes(Listed):
    def victims(self) -> Iterator[str]:
        while self._keys:
            yield self._keys.pop(0)


class Rotates(Listed):
    def victims(self) -> Iterator[str]:
        self._keys = self._keys[1:] + self._keys[:1]
        return iter(list(self._keys))


class ReturnsList(Listed):
    def victims(self) -> Iterator[str]:
        return list(self._keys)  # type: ignore[return-value]


class SharedState(Listed):
    _everybody: list[str] = []  # noqa: RUF012  (the mistake)

    def __init__(self) -> None:
        self._keys = self._everybody


class Hides(Listed):
    def victims(self) -> Iterator[str]:
        return iter(self._keys[:10])


class NeverEmpty(Listed):
    def __init__(self) -> None:
        super().__init__()
        self._keys = ["example"]


class ForgetsBatches(Listed):
    def access_all(self, keys: list[str]) -> None:
        self._keys = [key for key in self._keys if key not in keys]


class Seer(Listed, Foresight):
    """Expects each key again after all others."""

    def __init__(self) -> None:
        super().__init__()
        self._gone: list[str] = []

    def remove(self, key: str) -> None:
        super().remove(key)
        self._gone.append(key)

    def insert(self, key: str, nbytes: int) -> None:
        super().insert(key, nbytes)
        self._gone = [other for other in self._gone if other != key]

    @property
    def plan(self) -> None:
        return None

    def would_move(self, budget: int) -> None:
        return None

    def wanted(self) -> str | None:
        return self._gone[0] if self._gone else None

    def spare(self) -> Iterator[str]:
        return iter(self._keys[:1])

    def budget(self, nbytes: int | None) -> None:
        pass

    def together(self, keys: Sequence[str]) -> None:
        pass

    def timed(self, now: Callable[[], float]) -> None:
        pass

    def waited(self, seconds: float) -> None:
        pass


class WantsWholeSeconds(Seer):
    def waited(self, seconds: float) -> None:
        range(seconds)  # type: ignore[call-overload]


class WantsWhatIsThere(Seer):
    def wanted(self) -> str | None:
        return self._keys[0] if self._keys else None


class SparesWhatHasGone(Seer):
    def spare(self) -> Iterator[str]:
        return iter(self._keys + self._gone)


class SparesTwice(Seer):
    def spare(self) -> Iterator[str]:
        return iter(self._keys * 2)


BROKEN_POLICIES = {
    Forgetful: "insert again", Twice: "insert again", NeverRemoves: "remove", AccessInserts: "access", RefusesAccess: "access",
    Consumes: "stable order", Rotates: "stable order", ReturnsList: "iterator", Hides: "insert", NeverEmpty: "fresh",
    SharedState: "independence", ForgetsBatches: "access all", WantsWhatIsThere: "wanted", SparesWhatHasGone: "spare", SparesTwice: "spare",
    WantsWholeSeconds: "told",
}  # fmt: skip


@pytest.mark.parametrize("make", [LRU, Listed, Seer, *map(policy_factory, ("fifo", "mru", "tinylfu", "auto"))])
def test_sound_policies_pass(make: Callable[[], Policy]) -> None:
    for seed in range(5):
        check_policy(make, events=400, seed=seed)


@pytest.mark.parametrize(("broken", "rule"), BROKEN_POLICIES.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_policy_is_caught(broken: type[Policy], rule: str) -> None:
    SharedState._everybody.clear()
    with pytest.raises(ConformanceError) as caught:
        check_policy(broken)
    assert caught.value.rule == rule, caught.value


# -- faults and delays ------------------------------------------------------------------------------------------------


class Mapped(DictBackend, MappedBackend):
    pass


@pytest.mark.parametrize("make", [DictBackend, device_backend, Mapped])
def test_wrapping_keeps_the_capability(make: Callable[[], Backend]) -> None:
    backend, wrapped = make(), wrap(make(), Faults())
    for capability in (MemoryBackend, MappedBackend):
        assert isinstance(wrapped, capability) is isinstance(backend, capability)


@pytest.mark.parametrize("moment", ["before", "halfway"])
@pytest.mark.parametrize("call", ["put", "get", "delete"])
@pytest.mark.parametrize("make", [DictBackend, device_backend])
def test_an_injected_fault_leaves_everything_as_it_was(make: Callable[[], Backend], call: Call, moment: Moment) -> None:
    faults = Faults()
    backend = wrap(make(), faults)
    value = make_value(layout="sliced", seed=1)
    backend.put("key", value)
    live = backend.get("key")
    faults.arm(call, 1, moment=moment)
    act = {
        "put": lambda: backend.put("key", make_value(seed=2)),
        "get": lambda: backend.get("key"),
        "delete": lambda: backend.delete("key"),
    }
    with pytest.raises(InjectedError, match=call):
        act[call]()
    assert dict(backend.entries()) == {"key": TensorSpec.of(value)}
    assert bits(backend.get("key")) == bits(value)
    assert not isinstance(backend, MemoryBackend) or backend.get("key") is live
    act[call]()  # one arming, one failure
    assert faults.fired == 1


def test_a_failed_first_put_leaves_no_entry() -> None:
    for moment in ("before", "halfway"):
        faults = Faults()
        backend = wrap(DictBackend(), faults)
        faults.arm("put", moment=moment)  # type: ignore[arg-type]
        with pytest.raises(InjectedError):
            backend.put("key", make_value())
        assert not list(backend.entries())


def test_the_nth_call_fails_and_conditions_choose() -> None:
    faults = Faults()
    backend = wrap(DictBackend(), faults)
    faults.arm("put", 3)
    faults.arm_if(lambda call, key: key == "cursed")
    backend.put("a", make_value())
    with pytest.raises(InjectedError):
        backend.put("cursed", make_value())
    with pytest.raises(InjectedError):
        backend.put("b", make_value())
    faults.arm("get")
    faults.disarm()
    backend.get("a")
    assert faults.calls["put"] == 3


def test_a_closed_gate_holds_the_chosen_calls() -> None:
    delays = Delays(None)
    backend = wrap(DictBackend(), delays)
    delays.gated = lambda call, key: key == "slow"
    delays.gate.clear()
    backend.put("quick", make_value())
    assert not delays.entered.is_set()
    thread = threading.Thread(target=backend.put, args=("slow", make_value()))
    thread.start()
    assert delays.entered.wait(10)
    assert "slow" not in dict(backend.entries())
    delays.gate.set()
    thread.join(10)
    assert "slow" in dict(backend.entries())


# -- values -----------------------------------------------------------------------------------------------------------


def test_values_cover_what_torch_offers() -> None:
    expected = {
        torch.bool,
        torch.uint8,
        torch.uint64,
        torch.float16,
        torch.bfloat16,
        torch.complex128,
        torch.float8_e4m3fn,
        torch.float8_e8m0fnu,
    }
    assert expected <= set(DTYPES)
    assert torch.quint8 not in DTYPES
    by_layout = {name: make_value(layout=name, size=4) for name in LAYOUTS}
    assert by_layout["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert by_layout["transposed"].t().is_contiguous()
    assert by_layout["sliced"].storage_offset() > 0
    assert by_layout["expanded"].stride()[0] == 0
    assert by_layout["empty"].numel() == 0
    assert by_layout["scalar"].dim() == 0


def test_bits_are_of_the_elements() -> None:
    base = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    assert bits(base.t()) == bits(base.t().contiguous())
    assert bits(base[:, 1:3]) == bits(base[:, 1:3].clone())
    assert bits(torch.tensor(float("nan"))) == bits(torch.tensor(float("nan")))
    assert bits(torch.tensor(0.0)) != bits(torch.tensor(-0.0))


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "scalar", "empty"])
def test_overwrite_stays_inside_the_tensor(layout: str) -> None:
    value = make_value(torch.int64, layout, seed=1)
    before = bits(value)
    overwrite(value, seed=2)
    assert bits(value) != before or not before


def test_the_package_needs_no_hypothesis() -> None:
    """Backend authors run the conformance kit with torch alone; only `stateful` imports hypothesis."""
    code = "import sys; sys.modules['hypothesis'] = None; import tierstore.testing, tierstore.testing.twin"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
