"""Compressed tiers: what comes back, what is counted, what is kept as it is, damage, and crashes between two steps."""

from __future__ import annotations

import itertools
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.samples import assert_identical, dtype_samples
from tierstore import BackendError, BudgetError, CorruptionError, Tier, TieredStore, TierStoreError, open_backend, tiered
from tierstore.backend import Backend, ReadOnlyBackend, SizingBackend, VolatileBackend
from tierstore.backends._codecs import BitShuffledLZ4, BytePlanesZstd, Codec, codec_named
from tierstore.backends.codec import BLOCK, CompressedBackend
from tierstore.spec import TensorSpec, raw_bytes
from tierstore.testing import DictBackend, Faults, InjectedError, check_backend, wrap
from tierstore.testing.values import make_value

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

CODECS = ("lz4", "zstd")


def compressed(inner: Backend | None = None, codec: str = "lz4") -> CompressedBackend:
    backend = open_backend("compressed", DictBackend() if inner is None else inner, codec=codec)
    assert isinstance(backend, CompressedBackend)
    return backend


def weights(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return what trained weights look like to a codec: a normal distribution around zero."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)


def forms(backend: CompressedBackend) -> dict[str, str]:
    """Return the form of each value by its key, read from the inner keys as anybody can."""
    return {inner.split(" ", 5)[5]: inner.split(" ", 1)[0] for inner, _ in backend.inner.entries()}


# -- codecs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [BitShuffledLZ4(), BytePlanesZstd()], ids=lambda codec: codec.name)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_codec_gives_back_every_block(codec: Codec, data: st.DataObject) -> None:
    itemsize = data.draw(st.sampled_from((1, 2, 4, 8)))
    element = st.sampled_from((bytes(itemsize), b"\x3c" * itemsize)) | st.binary(min_size=itemsize, max_size=itemsize)
    block = np.frombuffer(b"".join(data.draw(st.lists(element, min_size=1, max_size=300))), np.uint8)
    frame = codec.encode(block, itemsize)
    out = np.empty_like(block)
    codec.decode(memoryview(frame), out, itemsize)
    assert out.tobytes() == block.tobytes()


@pytest.mark.parametrize("codec", [BitShuffledLZ4(), BytePlanesZstd()], ids=lambda codec: codec.name)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_frame_raises_or_fills_the_block_and_nothing_else(codec: Codec, data: st.DataObject) -> None:
    """Frames stand behind a checksum, so this is about frames that somebody made on purpose."""
    block = weights(500).view(torch.uint8).numpy()
    frame = bytearray(codec.encode(block, 2))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    del frame[data.draw(st.integers(0, len(frame))) :]
    memory = np.full(len(block) + 64, 7, np.uint8)
    with suppress(ValueError):
        codec.decode(memoryview(bytes(frame)), memory[32:-32], 2)
    assert set(memory[:32]) == set(memory[-32:]) == {7}


def test_planes_that_do_not_shrink_are_kept() -> None:
    block = weights(100_000).view(torch.uint8).numpy()
    frame = BytePlanesZstd().encode(block, 2)
    mantissas, exponents = struct.unpack_from("<2I", frame)
    assert mantissas == 0
    assert 0 < exponents < 50_000
    assert len(frame) == 8 + 100_000 + exponents


def test_an_unknown_codec_is_an_error_that_lists_them() -> None:
    with pytest.raises(ValueError, match="'lzma'; there are 'lz4', 'zstd'"):
        codec_named("lzma")
    with pytest.raises(BackendError, match="'lzma'"):
        open_backend("compressed", DictBackend(), codec="lzma")


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("inner", ["dict", "device"])
def test_it_keeps_the_contract(inner: str, codec: str) -> None:
    check_backend(lambda: compressed(DictBackend() if inner == "dict" else open_backend("device", "cpu"), codec))


def test_over_a_disk_it_outlives_the_process(tmp_path: Path) -> None:
    number = itertools.count()

    def reopen(old: Backend) -> Backend:
        old.close()
        return compressed(open_backend("disk", old.inner.path))  # type: ignore[attr-defined]

    check_backend(lambda: compressed(open_backend("disk", tmp_path / str(next(number)))), reopen=reopen)


@pytest.mark.parametrize("codec", CODECS)
def test_every_dtype_comes_back_from_several_blocks(codec: str) -> None:
    backend = compressed(codec=codec)
    for name, sample in dtype_samples().items():
        value = raw_bytes(sample).repeat(1 + 5 * BLOCK // 2 // sample.nbytes).view(sample.dtype)
        backend.put("key", value)
        assert_identical(backend.get("key"), value)
        assert forms(backend) == {"key": codec}, name
    backend.close()


def test_what_is_stored_is_smaller_and_counted() -> None:
    value = weights(3 * BLOCK // 2 + 7)
    for codec, ratio in (("lz4", 0.85), ("zstd", 0.72)):
        backend = compressed(open_backend("device", "cpu"), codec)
        backend.put("key", value)
        (held,) = [spec.nbytes for _, spec in backend.inner.entries()]
        assert backend.stored_bytes("key") == held < ratio * value.nbytes
        assert dict(backend.entries()) == {"key": TensorSpec.of(value)}
        backend.close()


@pytest.mark.parametrize("size", [0, 1, 5, 1000, BLOCK, 3 * BLOCK])
def test_noise_is_kept_as_it_is(size: int) -> None:
    noise = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    backend = compressed()
    backend.put("key", noise)
    assert forms(backend) == {"key": "raw"}
    assert backend.stored_bytes("key") == size
    assert_identical(backend.get("key"), noise)
    backend.close()


def test_a_value_whose_samples_shrink_and_whose_whole_does_not_is_kept_as_it_is() -> None:
    value = torch.randint(0, 256, (4 * BLOCK,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    for start in (0, len(value) // 2, len(value) - (256 << 10)):
        value[start : start + (256 << 10)] = 0
    backend = compressed()
    backend.put("key", value)
    assert forms(backend) == {"key": "raw"}
    backend.close()


def test_samples_spare_the_rest_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = BitShuffledLZ4.encode
    monkeypatch.setattr(BitShuffledLZ4, "encode", lambda codec, block, itemsize: seen.append(len(block)) or encode(codec, block, itemsize))
    backend = compressed()
    backend.put("key", torch.randint(0, 256, (4 * BLOCK,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)))
    assert seen == [256 << 10] * 3
    backend.close()


def test_the_form_may_change_from_put_to_put() -> None:
    backend = compressed()
    for value in (weights(5000), torch.randn(3), weights(70, 3).t(), weights(5000), torch.zeros(()), weights(5000)):
        backend.put("a key with spaces ", value)
        assert_identical(backend.get("a key with spaces "), value)
        assert len(list(backend.inner.entries())) == 1


def test_what_get_returns_is_no_alias_of_memory() -> None:
    backend = compressed(open_backend("device", "cpu"))
    noise = make_value(torch.uint8, size=5000, seed=1)
    backend.put("raw", noise)
    backend.get("raw").zero_()
    assert_identical(backend.get("raw"), noise)


def test_the_kind_of_the_inner_backend_shows() -> None:
    class Source(DictBackend, ReadOnlyBackend):
        pass

    assert not isinstance(compressed(), VolatileBackend | ReadOnlyBackend)
    assert isinstance(compressed(open_backend("device", "cpu")), VolatileBackend)
    assert isinstance(compressed(Source()), ReadOnlyBackend)
    assert all(isinstance(compressed(inner), SizingBackend) for inner in (DictBackend(), open_backend("device", "cpu"), Source()))
    with pytest.raises(TierStoreError, match="got str"):
        open_backend("compressed", "disk")


# -- counted by what it really takes ----------------------------------------------------------------------------------


def test_a_compressed_tier_holds_more_than_its_budget_of_tensors() -> None:
    values = {str(number): weights(1000, 1000) + number / 1000 for number in range(6)}
    size = values["0"].nbytes
    ram = compressed(open_backend("device", "cpu"), "zstd")
    store = TieredStore([Tier("gpu", open_backend("device", "cpu"), size), Tier("ram", ram, 5 * size)])
    for key, value in values.items():
        store.put(key, value)
    for key, value in [*values.items()] * 2:
        assert_identical(store.get(key), value)
    used = store.stats().tiers["ram"]
    assert used.used_bytes == sum(ram.stored_bytes(key) for key, _ in ram.entries()) < 4.2 * size
    assert used.peak_bytes <= 5 * size
    assert used.entries >= 5
    store.close()
    plain = TieredStore([Tier("gpu", open_backend("device", "cpu"), size), Tier("ram", open_backend("pinned"), 4 * size)])
    for key in "01234":
        plain.put(key, values[key])
    with pytest.raises(BudgetError):  # the comparison that makes the above mean something
        plain.put("5", values["5"])
    plain.close()


def test_the_budget_holds_while_nobody_knows_the_size_yet() -> None:
    """Zeros take next to nothing, but room for all of them has to be there until they are written."""
    zeros = torch.zeros(1000)
    ram = compressed(open_backend("device", "cpu"))
    store = TieredStore([Tier("gpu", open_backend("device", "cpu"), 4000), Tier("ram", ram, 5000)])
    for number in range(8):
        store.put(str(number), zeros)
    assert store.stats().tiers["ram"].used_bytes < 2000
    assert 4000 < store.stats().tiers["ram"].peak_bytes <= 5000
    with pytest.raises(BudgetError):
        store.put("large", torch.zeros(1300))  # 5200 bytes, though they would take 60
    store.close()


def test_a_failed_write_gives_all_of_the_room_back() -> None:
    faults = Faults()
    ram = wrap(compressed(open_backend("device", "cpu")), faults)
    store = TieredStore([Tier("gpu", open_backend("device", "cpu"), 4000), Tier("ram", ram, 9000)])
    store.put("a", torch.zeros(1000))
    faults.arm("put")
    with pytest.raises(InjectedError):
        store.put("b", torch.zeros(1000))
    assert store.stats().tiers["ram"].used_bytes == 0
    store.put("b", torch.zeros(1000))
    assert 0 < store.stats().tiers["ram"].used_bytes < 200
    store.close()


def test_a_value_written_in_place_needs_room_for_what_it_may_grow_to() -> None:
    store = TieredStore([Tier("only", compressed(DictBackend()), 6000)])
    store.put("a", torch.zeros(1000))
    store.put("b", torch.zeros(1000))
    noise = make_value(torch.float32, size=500, seed=1)
    with store.lease("a"):
        store.put("a", noise.reshape(-1))
    assert_identical(store.get("a"), noise.reshape(-1))
    with store.lease("b"), pytest.raises(BudgetError):
        store.put("b", noise.reshape(-1))
    assert_identical(store.get("b"), torch.zeros(1000))
    used = store.stats().tiers["only"].used_bytes
    assert 4000 < used < 4200
    store.close()
    assert used == store.tiers[0].ledger.used


def test_a_reopened_tier_counts_what_it_really_takes(tmp_path: Path) -> None:
    def open_store(budget: int) -> TieredStore:
        disk = compressed(open_backend("disk", tmp_path))
        return TieredStore([Tier("cpu", open_backend("device", "cpu"), 8000), Tier("disk", disk, budget)])

    with open_store(9000) as store:
        for number in range(5):
            store.put(str(number), torch.zeros(1000) + number)
    with open_store(4000) as store:
        assert store.stats().tiers["disk"].used_bytes < 1000
        for number in range(5):
            assert_identical(store.get(str(number)), torch.zeros(1000) + number)
    with pytest.raises(BudgetError) as caught:
        open_store(100)
    assert 100 < caught.value.required_bytes < 1000


def test_flushing_fits_as_long_as_it_really_does(tmp_path: Path) -> None:
    disk = compressed(open_backend("disk", tmp_path))
    store = TieredStore([Tier("cpu", open_backend("device", "cpu")), Tier("disk", disk, 10_000)])
    for number in range(5):
        store.put(str(number), torch.zeros(1000))  # 20 kB of tensors
    store.flush()
    assert len(dict(disk.entries())) == 5
    for number in range(5, 8):
        store.put(str(number), make_value(torch.uint8, size=2000))
    with pytest.raises(BudgetError, match="flushing"):
        store.flush()
    assert {str(number) for number in range(5)} <= dict(disk.entries()).keys()
    store.close(flush=False)


# -- damage and crashes -----------------------------------------------------------------------------------------------


def payload_of(inner: DictBackend) -> torch.Tensor:
    ((_, payload),) = inner._values.values()
    return payload


@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_bit_is_found(codec: str) -> None:
    inner = DictBackend()
    backend = compressed(inner, codec)
    backend.put("key", torch.arange(500))
    assert forms(backend) == {"key": codec}
    payload = payload_of(inner)
    for position, bit in itertools.product(range(len(payload)), range(8)):
        payload[position] ^= 1 << bit
        with pytest.raises(CorruptionError) as caught:
            backend.get("key")
        assert caught.value.key == "key"
        payload[position] ^= 1 << bit
    assert_identical(backend.get("key"), torch.arange(500))


def test_forged_payloads_are_refused_without_memory_for_them() -> None:
    inner = DictBackend()
    backend = compressed(inner)
    backend.put("key", weights(5000))
    ((inner_key, (spec, payload)),) = inner._values.items()
    body = payload[8:].numpy().tobytes()
    for forged in (
        b"", b"\0" * 7, b"\xff" * 4, struct.pack("<I", 2**32 - 1), struct.pack("<2I", 1, 2**32 - 1) + body[8:],
        struct.pack("<I", 0), struct.pack("<3I", 2, 4, len(body) - 16) + body[8:], body + b"\0",
    ):  # fmt: skip
        whole = struct.pack("<Q", xxhash.xxh3_64_intdigest(forged)) + forged if len(forged) != 7 else forged
        raw = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
        inner._values[inner_key] = TensorSpec.of(raw), raw
        with pytest.raises(CorruptionError, match="'key'"):
            backend.get("key")
    inner._values[inner_key] = spec, payload
    assert_identical(backend.get("key"), weights(5000))


def test_a_backend_with_values_of_its_own_is_refused() -> None:
    for key in ("layer.weight", "lz4 float32 3 1 0", "lz4 float32 x 1 0 key", "lzma float32 3 1 0 key", "lz4 float99 3 1 0 key"):
        inner = DictBackend()
        inner.put(key, torch.zeros(3))
        with pytest.raises(BackendError, match="not written through a compressed tier"):
            compressed(inner)


def test_of_two_values_that_a_crash_left_the_later_one_counts() -> None:
    inner = DictBackend()
    backend = compressed(inner)
    backend.put("key", torch.zeros(100))
    older = dict(inner._values)
    backend.put("key", weights(40, 5))
    for values in (older | inner._values, inner._values | older):
        both = DictBackend()
        both._values = dict(values)
        again = compressed(both)
        assert_identical(again.get("key"), weights(40, 5))
        assert len(both._values) == 1


def test_a_replacement_that_cannot_remove_the_older_value_changes_nothing() -> None:
    faults = Faults()
    backend = compressed(wrap(DictBackend(), faults))
    backend.put("key", torch.zeros(100))
    faults.arm("delete")
    with pytest.raises(InjectedError):
        backend.put("key", weights(40, 5))
    assert_identical(backend.get("key"), torch.zeros(100))
    assert len(list(backend.inner.entries())) == 1
    backend.put("key", weights(40, 5))
    assert_identical(backend.get("key"), weights(40, 5))


def test_a_lookup_of_rows_brings_a_compressed_table_in_once(tmp_path: Path) -> None:
    """Its rows cannot be read by themselves, so that each lookup would decompress all of it."""
    model, ids = torch.nn.Sequential(torch.nn.Embedding(4096, 128), torch.nn.Linear(128, 128)), torch.tensor([3, 77])
    with torch.no_grad():
        model[0].weight.mul_(0.01)
        expected = model(ids)
        with tiered(model, cpu="2200KiB", disk=compressed(open_backend("disk", tmp_path / "d"))) as session:
            session.offload(model)
            for _ in range(3):
                assert torch.equal(model(ids), expected)
            assert session.tier_of("0.weight") == "cpu"
            assert session.stats().links["disk->cpu"].bytes == sum(weight.nbytes for weight in model.parameters())
        assert torch.equal(model(ids), expected)
