"""Remote tiers: over a real S3 server that misbehaves, over http, memory and files; counts of requests are exact."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors
import torch
from aiobotocore.session import AioSession
from fsspec.implementations.memory import MemoryFileSystem

from tests.remote_servers import Fault, Script, fault_proxy, file_server, s3_server
from tests.samples import assert_identical
from tierstore import BackendError, ClosedError, CorruptionError, ReadOnlyError, RemoteError, Tier, TieredStore, open_backend, tiered
from tierstore.backend import Backend
from tierstore.backends._object import StoredObject, checksum_of, read_head
from tierstore.backends._retry import Retries, passes
from tierstore.backends.remote import RemoteBackend, RemoteSource
from tierstore.spec import TensorSpec
from tierstore.testing import check_backend
from tierstore.testing.conformance import ODD_KEYS
from tierstore.testing.values import make_value, some_values

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

BUCKET = "bucket"
VALUE = r"^[^?]*/values/"


@dataclass
class FakeTime:
    """A clock that only sleeping moves."""

    now: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def retries(self, **options: Any) -> Retries:
        settings = {"attempts": 4} | options
        return Retries(clock=lambda: self.now, sleep=self.sleep, rng=random.Random(0), **settings)


@dataclass
class S3:
    """An S3 server behind a proxy that does what `script` says."""

    upstream: tuple[str, int]
    url: str
    script: Script
    time: FakeTime = field(default_factory=FakeTime)
    session: AioSession = field(default_factory=AioSession)  # reads its tables of services once
    _places: Iterator[int] = field(default_factory=itertools.count)

    def options(self, *, patience: float = 60, **options: Any) -> dict[str, Any]:
        config = {"read_timeout": patience}
        storage = {"key": "testing", "secret": "testing", "endpoint_url": self.url, "config_kwargs": config, "session": self.session}
        return {"storage_options": storage, "retries": self.time.retries()} | options

    def place(self) -> str:
        return f"s3://{BUCKET}/{os.getpid()}-{next(self._places)}"

    def open(self, place: str | None = None, **options: Any) -> RemoteBackend:
        backend = open_backend("remote", place or self.place(), **self.options(**options))
        assert isinstance(backend, RemoteBackend)
        return backend

    def ask(self, method: str, path: str) -> bytes:
        """Ask the server itself, past the proxy."""
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        connection.request(method, f"/{BUCKET}{path}")
        answer = connection.getresponse().read()
        connection.close()
        return answer


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with s3_server(BUCKET) as address:
        yield address


@pytest.fixture(scope="module")
def proxied(server: tuple[str, int]) -> Iterator[S3]:
    with fault_proxy(server) as (url, script):
        yield S3(server, url, script)


@pytest.fixture
def s3(proxied: S3) -> S3:
    proxied.script.forget()
    proxied.time = FakeTime()
    return proxied


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    """A place in fsspec's memory that nobody else uses."""
    yield f"memory:/{tmp_path}"
    if fsspec.filesystem("memory").exists(str(tmp_path)):
        fsspec.filesystem("memory").rm(str(tmp_path), recursive=True)


def objects(place: str) -> list[str]:
    """Return what lies below a place in memory or in files, by its path in it."""
    fs, root = fsspec.core.url_to_fs(place)
    fs.invalidate_cache()
    return sorted(path.removeprefix(root).lstrip("/") for path in fs.find(root))


# -- values -----------------------------------------------------------------------------------------------------------


def reopened(old: Backend) -> Backend:
    assert isinstance(old, RemoteBackend)
    old.close()
    return open_backend("remote", old.url)


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_it_keeps_the_contract(protocol: str, tmp_path: Path, memory: str) -> None:
    place = memory if protocol == "memory" else f"file://{tmp_path}"
    number = itertools.count()
    check_backend(lambda: open_backend("remote", f"{place}/{next(number)}"), reopen=reopened)


@pytest.mark.stress
def test_it_keeps_the_contract_on_s3(s3: S3) -> None:
    def reopen(old: Backend) -> Backend:
        assert isinstance(old, RemoteBackend)
        old.close()
        return s3.open(old.url)

    check_backend(s3.open, reopen=reopen)


def test_every_dtype_and_odd_key_comes_back_from_s3(s3: S3) -> None:
    values = dict(some_values()) | {key: make_value(seed=seed) for seed, key in enumerate(ODD_KEYS)}
    backend = s3.open()
    for key, value in values.items():
        backend.put(key, value)
    backend.close()
    again = s3.open(backend.url)
    assert dict(again.entries()) == {key: TensorSpec.of(value) for key, value in values.items()}
    for key, value in values.items():
        assert_identical(again.get(key), value)
    again.close()
    assert not s3.time.pauses


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "scalar", "empty"])
def test_stock_safetensors_opens_an_object(layout: str, tmp_path: Path) -> None:
    backend = open_backend("remote", f"file://{tmp_path}")
    assert isinstance(backend, RemoteBackend)
    value = make_value(torch.bfloat16, layout, seed=3)
    backend.put("layers.0/\u00fc", value)
    with safetensors.safe_open(backend.object_of("layers.0/\u00fc").removeprefix("file://"), "pt") as file:
        found = file.get_tensor("data")
        metadata = file.metadata()
    assert (metadata["key"], json.loads(metadata["stride"])) == ("layers.0/\u00fc", list(value.stride()))
    if value.is_contiguous():
        assert found.dtype is torch.bfloat16
        assert torch.equal(found.view(torch.int16), value.view(torch.int16))
    else:
        assert found.dtype is torch.uint8
    backend.close()


def test_keys_are_never_paths(tmp_path: Path) -> None:
    backend = open_backend("remote", f"file://{tmp_path}/store")
    for key in ODD_KEYS:
        backend.put(key, torch.ones(1))
    backend.close()
    assert os.listdir(tmp_path) == ["store"]  # noqa: PTH208
    names = os.listdir(tmp_path / "store" / "values")  # noqa: PTH208
    assert len({name.casefold() for name in names}) == len(ODD_KEYS)
    assert all(len(name) < 100 and name.isascii() for name in names)


# -- retries ----------------------------------------------------------------------------------------------------------

PASSING: tuple[Fault, ...] = ("500", "503", "slowdown", "silence", "cut", "truncate", "shorten")
REQUESTS = {"cut": 2}  # for one attempt, else 1: aiohttp itself repeats a request whose connection is cut before an answer, once
PATIENCE = {"silence": 0.5}  # seconds; no other fault waits for anything


@pytest.mark.parametrize("fault", PASSING)
def test_a_read_is_tried_again_when_the_failure_passes(s3: S3, fault: Fault) -> None:
    backend = s3.open(patience=PATIENCE.get(fault, 60))
    value = torch.arange(1000)
    backend.put("key", value)
    s3.script.forget()
    s3.script.fail(fault, times=2 * REQUESTS.get(fault, 1), path=VALUE)
    assert_identical(backend.get("key"), value)
    assert s3.script.count("GET", VALUE) == 2 * REQUESTS.get(fault, 1) + 1
    assert len(s3.time.pauses) == 2
    backend.close()


@pytest.mark.parametrize("fault", ["500", "503", "slowdown", "silence", "cut"])
def test_a_write_is_tried_again_when_the_failure_passes(s3: S3, fault: Fault) -> None:
    backend = s3.open(patience=PATIENCE.get(fault, 60))
    s3.script.forget()
    s3.script.fail(fault, times=2 * REQUESTS.get(fault, 1), method="PUT", path=VALUE)
    backend.put("key", torch.arange(1000))
    assert s3.script.count("PUT", VALUE) == 2 * REQUESTS.get(fault, 1) + 1
    assert len(s3.time.pauses) == 2
    assert_identical(backend.get("key"), torch.arange(1000))
    backend.close()


@pytest.mark.parametrize("fault", PASSING)
def test_a_failure_that_stays_is_reported_after_as_many_attempts_as_are_allowed(s3: S3, fault: Fault) -> None:
    backend = s3.open(retries=s3.time.retries(attempts=3), patience=PATIENCE.get(fault, 60))
    backend.put("key", torch.arange(1000))
    s3.script.forget()
    s3.script.fail(fault, times=99, path=VALUE)
    with pytest.raises(RemoteError, match="failed 3 times") as caught:
        backend.get("key")
    assert caught.value.attempts == 3
    assert backend.object_of("key") in caught.value.operation
    assert s3.script.count("GET", VALUE) == 3 * REQUESTS.get(fault, 1)
    assert len(s3.time.pauses) == 2
    s3.script.forget()
    assert_identical(backend.get("key"), torch.arange(1000))
    backend.close()


@pytest.mark.parametrize(("fault", "error"), [("403", RemoteError), ("404", CorruptionError)])
def test_what_cannot_pass_is_not_tried_again(s3: S3, fault: Fault, error: type[Exception]) -> None:
    backend = s3.open()
    backend.put("key", torch.arange(1000))
    s3.script.forget()
    s3.script.fail(fault, times=99, path=VALUE)
    s3.script.fail(fault, times=99, path=VALUE, method="HEAD")
    with pytest.raises(error):
        backend.get("key")
    assert s3.script.count("GET", VALUE) == 1
    assert not s3.time.pauses
    s3.script.forget()
    backend.close()


def test_a_refused_write_keeps_the_older_value_and_is_not_tried_again(s3: S3) -> None:
    backend = s3.open()
    backend.put("key", torch.arange(10))
    s3.script.forget()
    s3.script.fail("403", method="PUT", path=VALUE)
    with pytest.raises(RemoteError, match="PermissionError"):
        backend.put("key", torch.zeros(10))
    assert s3.script.count("PUT") == 1
    assert_identical(backend.get("key"), torch.arange(10))
    backend.close()
    again = s3.open(backend.url)
    assert_identical(again.get("key"), torch.arange(10))
    again.close()


def test_a_bucket_that_is_not_there_is_named(s3: S3) -> None:
    backend = s3.open("s3://no-such-bucket/prefix")
    with pytest.raises(RemoteError, match=r"no-such-bucket.*has to exist"):
        backend.put("key", torch.zeros(1))
    with pytest.raises(RemoteError):
        backend.close()


def test_pauses_grow_are_random_and_bounded() -> None:
    time = FakeTime()
    retries = time.retries(attempts=12, first=1.0, longest=20.0, deadline=1e9)
    with pytest.raises(RemoteError):
        retries.call(refuse, "asking", retries.until())
    limits = [min(20.0, 2.0**number) for number in range(11)]
    assert len(time.pauses) == 11
    assert all(0 <= pause <= limit for pause, limit in zip(time.pauses, limits, strict=True))
    assert len(set(time.pauses)) == 11
    averages = [0.0] * 11
    for seed in range(400):
        time = FakeTime()
        retries = Retries(12, 1.0, 20.0, 1e9, clock=lambda time=time: time.now, sleep=time.sleep, rng=random.Random(seed))  # type: ignore[misc]
        with pytest.raises(RemoteError):
            retries.call(refuse, "asking", retries.until())
        averages = [average + pause / 400 for average, pause in zip(averages, time.pauses, strict=True)]
    assert averages == pytest.approx([limit / 2 for limit in limits], rel=0.1)


def refuse() -> None:
    raise ConnectionResetError("cut")


def test_no_attempt_begins_after_the_deadline(s3: S3) -> None:
    backend = s3.open(retries=s3.time.retries(attempts=1000, first=1.0, longest=4.0, deadline=30.0))
    backend.put("key", torch.arange(1000))
    s3.script.forget()
    s3.script.fail("503", times=9999, path=VALUE)
    with pytest.raises(RemoteError) as caught:
        backend.get("key")
    assert s3.script.count("GET", VALUE) == caught.value.attempts == len(s3.time.pauses) + 1
    assert 20 < s3.time.now <= 30
    s3.script.forget()
    backend.close()


class Answer(Exception):  # noqa: N818
    """What a library raises: a status in a place of its own."""


def with_status(name: str, value: object) -> Answer:
    error = Answer("answered")
    setattr(error, name, value)
    return error


def caused(error: OSError, cause: Exception) -> OSError:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (TimeoutError(), True), (ConnectionResetError(), True), (BrokenPipeError(), True), (OSError(16, "busy"), True),
        (FileNotFoundError(), False), (PermissionError(), False), (OSError(28, "full"), False), (OSError(5, "broken"), False),
        (ValueError("no credentials"), False), (KeyError("x"), False),
        *((with_status("status", status), True) for status in (408, 429, 500, 502, 503, 504)),
        *((with_status("status", status), False) for status in (400, 401, 403, 404, 409, 412, 416, 501)),
        (with_status("code", 503), True), (with_status("code", 403), False), (with_status("code", "NoSuchKey"), False),
        (with_status("response", {"ResponseMetadata": {"HTTPStatusCode": 503}}), True),
        (with_status("response", {"ResponseMetadata": {"HTTPStatusCode": 403}}), False),
        (caused(OSError(5, "odd"), with_status("response", {"ResponseMetadata": {"HTTPStatusCode": 502}})), True),
        (caused(OSError(16, "busy"), with_status("response", {"ResponseMetadata": {"HTTPStatusCode": 400}})), False),
    ],
    ids=repr,
)  # fmt: skip
def test_which_failures_pass(error: Exception, answer: bool) -> None:
    assert passes(error) is answer


# -- large values -----------------------------------------------------------------------------------------------------

PART = 5 << 20  # bytes; S3 takes no smaller parts


def test_a_large_value_is_read_in_ranges_at_once(s3: S3) -> None:
    backend = s3.open(part_bytes=PART)
    value = torch.arange(3 * PART // 8 // 2 * 2)
    backend.put("key", value)
    s3.script.forget()
    s3.script.fail("503", path=VALUE)
    s3.script.fail("truncate", path=VALUE)
    assert_identical(backend.get("key"), value)
    ranges = [seen.range for seen in s3.script.seen]
    assert len(ranges) == 5  # three, of which two came twice
    spans = sorted(tuple(map(int, text.removeprefix("bytes=").split("-"))) for text in set(ranges) if text)
    assert [stop - start + 1 for start, stop in spans] == [PART, PART, value.nbytes - 2 * PART]
    assert all(one[1] + 1 == two[0] for one, two in itertools.pairwise(spans))
    backend.close()


def test_a_failed_range_fails_the_read_when_no_other_is_under_way_any_more(s3: S3) -> None:
    backend = s3.open(part_bytes=1 << 16, retries=s3.time.retries(attempts=1))
    backend.put("key", torch.arange(1 << 16))
    out = torch.zeros(8 << 16, dtype=torch.uint8)
    s3.script.fail("503", path=VALUE)
    with pytest.raises(RemoteError):
        backend.read_into("key", out)
    after = out.clone()
    s3.script.forget()
    assert_identical(backend.get("key"), torch.arange(1 << 16))
    assert torch.equal(out, after)
    backend.close()


@pytest.mark.parametrize("failing", ["uploads", "partNumber=2", "uploadId=[^&]*$"])
def test_a_large_value_appears_at_once_or_not_at_all(s3: S3, failing: str) -> None:
    backend = s3.open(part_bytes=PART, retries=s3.time.retries(attempts=2))
    prefix = backend.url.removeprefix(f"s3://{BUCKET}/")
    value = torch.arange(2 * PART // 8 + 1)
    for method in ("PUT", "POST"):
        s3.script.fail("500", times=99, method=method, path=rf"{VALUE}.*{failing}")
    with pytest.raises(RemoteError, match="failed 2 times"):
        backend.put("key", value)
    assert "key" not in dict(backend.entries())
    assert b"<Key>" not in s3.ask("GET", f"?list-type=2&prefix={prefix}/values")
    assert prefix.encode() not in s3.ask("GET", "?uploads")  # no part is left to be paid for
    s3.script.forget()
    backend.put("key", value)
    assert s3.script.count("PUT", VALUE) == 3
    assert_identical(backend.get("key"), value)
    backend.close()


def test_an_upload_that_failed_in_its_middle_is_begun_again(s3: S3) -> None:
    backend = s3.open(part_bytes=PART)
    value = torch.arange(2 * PART // 8 + 1)
    s3.script.fail("503", method="PUT", path="partNumber=2")
    backend.put("key", value)
    assert s3.script.count("PUT", "partNumber=1") == 2
    assert_identical(backend.get("key"), value)
    backend.close()


def test_a_file_system_without_atomic_puts_never_shows_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_backend("remote", f"file://{tmp_path}", retries=FakeTime().retries())
    backend.put("key", torch.arange(10))
    moved = fsspec.implementations.local.LocalFileSystem.mv

    def mv(fs: object, source: str, target: str, **options: object) -> None:
        assert Path(source).name.startswith(".partial-")
        assert not Path(target).exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "mv", mv)
    with pytest.raises(RemoteError, match="No space left"):
        backend.put("key", torch.zeros(99))
    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "mv", moved)
    assert len(os.listdir(tmp_path / "values")) == 1  # noqa: PTH208
    (tmp_path / "values" / ".partial-0123").write_bytes(b"what a killed writer leaves")
    again = open_backend("remote", f"file://{tmp_path}")
    assert_identical(again.get("key"), torch.arange(10))


# -- the index --------------------------------------------------------------------------------------------------------


def test_opening_reads_the_index_and_nothing_else(s3: S3) -> None:
    backend = s3.open()
    for number in range(5):
        backend.put(str(number), torch.full((10,), number))
    backend.close()
    s3.script.forget()
    again = s3.open(backend.url)
    assert [(seen.method, seen.path.rpartition("/")[2]) for seen in s3.script.seen] == [("GET", "tierstore.json")]
    assert len(list(again.entries())) == 5
    again.close()
    assert s3.script.count("PUT") == 0  # nothing has changed


def test_the_index_is_gone_before_anything_changes(memory: str) -> None:
    backend = open_backend("remote", memory)
    backend.put("a", torch.zeros(1))
    assert "tierstore.json" not in objects(memory)
    backend.close()
    assert "tierstore.json" in objects(memory)
    again = open_backend("remote", memory)
    again.get("a")
    assert "tierstore.json" in objects(memory)
    again.delete("a")
    assert objects(memory) == []
    again.close()
    assert objects(memory) == ["tierstore.json"]


def test_a_lost_index_is_rebuilt(memory: str) -> None:
    backend = open_backend("remote", memory)
    values = {key: make_value(seed=seed) for seed, key in enumerate(ODD_KEYS)} | {"large head" * 900: torch.ones(3)}
    for key, value in values.items():
        backend.put(key, value)
    for end in ("killed", "closed"):  # a writer that was killed has left none
        again = open_backend("remote", memory)
        assert dict(again.entries()) == {key: TensorSpec.of(value) for key, value in values.items()}
        for key, value in values.items():
            assert_identical(again.get(key), value)
        if end == "closed":
            again.close()
            assert "tierstore.json" in objects(memory)


def test_of_two_values_that_a_crash_left_the_later_one_counts(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_backend("remote", memory)
    backend.put("key", torch.zeros(3))
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "rm_file", lambda fs, path: refuse_for_good())
        backend.put("key", torch.ones(3))  # complete all the same
    assert len(objects(memory)) == 2
    again = open_backend("remote", memory)
    assert_identical(again.get("key"), torch.ones(3))
    again.put("other", torch.zeros(1))
    again.close()
    assert len(objects(memory)) == 3
    third = open_backend("remote", memory)
    assert_identical(third.get("key"), torch.ones(3))
    third.close()


def refuse_for_good() -> None:
    raise PermissionError("no")


def test_a_deletion_whose_answer_was_lost_is_a_deletion(s3: S3) -> None:
    backend = s3.open()
    backend.put("key", torch.zeros(3))
    path = backend.object_of("key").removeprefix(f"s3://{BUCKET}")
    s3.ask("DELETE", path)
    backend.delete("key")
    with pytest.raises(KeyError):
        backend.get("key")
    backend.close()


@pytest.mark.parametrize("text", ["", "{", "[]", "nul\0", '{"format": "tierstore-remote", "version": 1, "values": [], "check": "no"}'])
def test_a_damaged_index_is_reported(memory: str, text: str) -> None:
    backend = open_backend("remote", memory)
    backend.put("key", torch.zeros(3))
    backend.close()
    fsspec.filesystem("memory").pipe_file(f"{memory.removeprefix('memory:/')}/tierstore.json", text.encode())
    with pytest.raises((CorruptionError, BackendError), match=r"tierstore\.json"):
        open_backend("remote", memory)


def test_a_flipped_bit_in_any_byte_of_an_index_is_found(memory: str) -> None:
    backend = open_backend("remote", memory)
    backend.put("key", torch.zeros(3))
    backend.close()
    fs, path = fsspec.filesystem("memory"), f"{memory.removeprefix('memory:/')}/tierstore.json"
    text = fs.cat_file(path)
    for position in range(len(text)):
        damaged = bytearray(text)
        damaged[position] ^= 1 << position % 8
        fs.pipe_file(path, bytes(damaged))
        with pytest.raises((CorruptionError, BackendError)):
            open_backend("remote", memory)


def test_something_else_and_another_version_are_refused(memory: str) -> None:
    fs = fsspec.filesystem("memory")
    for text, message in (('{"format": "other"}', "something else"), ('{"format": "tierstore-remote", "version": 2}', "has version 2")):
        fs.pipe_file(f"{memory.removeprefix('memory:/')}/tierstore.json", text.encode())
        with pytest.raises(BackendError, match=message):
            open_backend("remote", memory)


# -- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_byte_of_an_object_is_found(memory: str) -> None:
    backend = open_backend("remote", memory)
    assert isinstance(backend, RemoteBackend)
    backend.put("key", torch.arange(5))
    fs, path = fsspec.filesystem("memory"), backend.object_of("key").removeprefix("memory:/")
    whole = fs.cat_file(path)
    head = len(whole) - 40
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        fs.pipe_file(path, bytes(damaged))
        if position >= head:
            with pytest.raises(CorruptionError) as caught:
                backend.get("key")
            assert (caught.value.key, caught.value.file) == ("key", backend.object_of("key"))
        else:  # read only when there is no index
            with pytest.raises(CorruptionError, match=str(path)):
                open_backend("remote", memory)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b"", lambda data: data[:5]])
def test_an_object_of_another_length_is_found(memory: str, change: Callable[[bytes], bytes]) -> None:
    backend = open_backend("remote", memory, retries=FakeTime().retries())
    assert isinstance(backend, RemoteBackend)
    backend.put("key", torch.arange(5))
    fs, path = fsspec.filesystem("memory"), backend.object_of("key").removeprefix("memory:/")
    whole = fs.cat_file(path)
    fs.pipe_file(path, change(whole))
    if len(change(whole)) < len(whole):
        with pytest.raises(CorruptionError, match=r"'key'.*the object has \d+ bytes instead of \d+"):
            backend.get("key")
    with pytest.raises(CorruptionError):
        open_backend("remote", memory)
    fs.rm_file(path)
    with pytest.raises(CorruptionError, match="the object is missing"):
        backend.get("key")


def test_an_object_under_the_name_of_another_is_found(memory: str) -> None:
    backend = open_backend("remote", memory)
    assert isinstance(backend, RemoteBackend)
    backend.put("a", torch.arange(5))
    backend.put("b", torch.arange(5) + 1)
    fs = fsspec.filesystem("memory")
    one, other = (backend.object_of(key).removeprefix("memory:/") for key in "ab")
    fs.pipe_file(one, fs.cat_file(other))
    with pytest.raises(CorruptionError):
        backend.get("a")
    with pytest.raises(CorruptionError, match="named for another"):
        open_backend("remote", memory)


def test_a_head_says_everything_that_it_was_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ODD_KEYS:
        stored = StoredObject(key, TensorSpec(torch.float16, (3, 2), (1, 3)), 17, checksum_of(b"12"))
        assert read_head(stored.head()) == stored
        assert len(stored.head()) % 64 == 0
    monkeypatch.setattr("tierstore.backends._object._MAX_HEAD", 5000)
    with pytest.raises(BackendError, match="shorter key"):
        StoredObject("x" * 5000, TensorSpec(torch.float16, (), ()), 0, "").head()


# -- readers ----------------------------------------------------------------------------------------------------------


def test_several_machines_read_one_bucket(s3: S3) -> None:
    writer = s3.open()
    writer.put("key", torch.arange(1000))
    writer.close()
    readers = [open_backend("remote-source", writer.url, **s3.options()) for _ in range(3)]
    for reader in readers:
        assert isinstance(reader, RemoteSource)
        assert_identical(reader.get("key"), torch.arange(1000))
        for change in (lambda reader=reader: reader.put("key", torch.zeros(1)), lambda reader=reader: reader.delete("key")):
            with pytest.raises(ReadOnlyError, match="only reads"):
                change()
        reader.close()
    assert s3.script.count("PUT", r"key|values") == 1
    assert s3.script.count("DELETE") == 0


def test_http_reads_what_was_written_elsewhere(tmp_path: Path) -> None:
    writer = open_backend("remote", f"file://{tmp_path}/store")
    values = dict(some_values())
    for key, value in values.items():
        writer.put(key, value)
    with file_server(tmp_path) as (url, script):
        with pytest.raises(BackendError, match="close the store that wrote it"):
            open_backend("http", f"{url}/store")
        writer.close()
        script.forget()
        reader = open_backend("http", f"{url}/store", part_bytes=64)
        assert script.count("GET") == 1
        for key, value in values.items():
            assert_identical(reader.get(key), value)
        reader.close()
        with pytest.raises(BackendError, match="can only be read"):
            open_backend("remote", f"{url}/store")


def test_a_model_can_be_served_from_a_bucket_through_a_disk_cache(s3: S3, tmp_path: Path) -> None:
    values = {str(number): make_value(size=100, seed=number) for number in range(6)}
    writer = s3.open()
    for key, value in values.items():
        writer.put(key, value)
    writer.close()
    source = open_backend("remote-source", writer.url, **s3.options())
    s3.script.forget()
    disk = open_backend("disk", tmp_path)
    store = TieredStore([Tier("ram", open_backend("device", "cpu"), 1700), Tier("disk", disk), Tier("remote", source)])
    for _ in range(4):
        for key, value in values.items():
            assert_identical(store.get(key), value)
    assert s3.script.count("GET", VALUE) == len(values)  # once each, though RAM holds two
    assert len(list(disk.entries())) >= 4
    store.put("new", torch.zeros(3))
    store.close()
    assert s3.script.count("PUT") == 0
    again = TieredStore(
        [
            Tier("ram", open_backend("device", "cpu"), 1700),
            Tier("disk", open_backend("disk", tmp_path)),
            Tier("remote", open_backend("remote-source", writer.url, **s3.options())),
        ]
    )
    assert_identical(again.get("new"), torch.zeros(3))
    with pytest.raises(ReadOnlyError, match="tier 'remote' has it"):
        del again["0"]
    again.close()


def test_a_cache_that_is_full_or_fails_is_only_a_cache(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = open_backend("remote", memory)
    values = {str(number): make_value(size=100, seed=number) for number in range(6)}
    for key, value in values.items():
        remote.put(key, value)
    disk = open_backend("disk", tmp_path)
    store = TieredStore([Tier("ram", open_backend("device", "cpu"), 1700), Tier("disk", disk, 2000), Tier("remote", remote)])
    for _ in range(3):
        for key, value in values.items():
            assert_identical(store.get(key), value)
    assert 0 < store.stats().tiers["disk"].used_bytes <= 2000

    def full(key: str, tensor: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "put", full)
    for key, value in values.items():
        assert_identical(store.get(key), value)
    store.close()


def test_tiers_that_only_read_come_last(memory: str) -> None:
    open_backend("remote", memory).close()
    source, ram = open_backend("remote-source", memory), open_backend("device", "cpu")
    for tiers in ([Tier("remote", source)], [Tier("remote", source), Tier("ram", ram)]):
        with pytest.raises(Exception, match="come last"):
            TieredStore(tiers)


def test_a_model_runs_over_scratch_objects_that_go_at_the_end(memory: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        with tiered(model, cpu="40KB", disk=memory) as session:
            assert torch.equal(model(x), expected)
            assert session.stats().links["disk->cpu"].bytes > 0
            assert len(objects(memory)) > 3
        assert torch.equal(model(x), expected)
    assert objects(memory) == []


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(BackendError, match=r"gs:// needs a package.*pip install 'tierstore\[gcs\]'"):
        open_backend("remote", "gs://bucket/prefix")
    with pytest.raises(BackendError, match="nosuch"):
        open_backend("remote", "nosuch://bucket")
    with pytest.raises(BackendError, match="no URL"):
        open_backend("remote", "/a/directory")


def test_after_close_every_operation_says_so(memory: str) -> None:
    backend = open_backend("remote", memory)
    backend.put("key", torch.zeros(1))
    backend.close()
    backend.close()
    changes = (lambda: backend.put("key", torch.zeros(1)), lambda: backend.delete("key"))
    for operation in (*changes, lambda: backend.get("key"), backend.entries):
        with pytest.raises(ClosedError, match="closed; open it again"):
            operation()


USE_AFTER_FORK = """
import os, torch
from tierstore.errors import BackendError
from tierstore.registry import open_backend

backend = open_backend("remote", "memory://forked")
backend.put("key", torch.ones(1))
child = os.fork()
if not child:
    for use in (lambda: backend.get("key"), lambda: backend.put("key", torch.ones(1))):
        try:
            use()
        except BackendError as error:
            print(error, flush=True)
    backend.close()  # writes nothing: the values are the parent's
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(backend.get("key").item())
backend.close()
"""


def test_a_forked_child_is_refused() -> None:
    """In a process of its own: a child of this one would have the locks, and none of the threads, of all tests before."""
    result = subprocess.run([sys.executable, "-c", USE_AFTER_FORK], capture_output=True, text=True, timeout=300, check=True)
    first, second, third = result.stdout.splitlines()
    assert "open it again in the child" in first
    assert "open it again in the child" in second
    assert third == "1.0"


def test_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(RemoteError("reading x", 3, "timed out")))
    assert (str(error), error.attempts) == ("reading x failed 3 times: timed out", 3)
