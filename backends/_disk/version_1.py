"""Blobs as version 1 of the disk format wrote them: named for their key, without checksums of their data, and without an index."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping

from tierstore.backends._disk.blob import parse_head, raw_entry, spec_in, tensor_entry
from tierstore.backends._disk.rows import Row
from tierstore.backends._lock import key_fields, key_from
from tierstore.checksum import checksum
from tierstore.spec import TensorSpec, dtype_name


def decode_head_1(head: bytes, blob: str) -> Row:
    """Return the row for a blob of version 1; raise `ValueError` unless all of its header agrees, and with the file's name."""
    header = parse_head(head)
    key = key_from(header["__metadata__"], "key")
    spec = spec_in(header["__metadata__"])
    if header["__metadata__"] != _metadata(key, spec):
        raise ValueError("the metadata does not match its checksum or version")
    if header["data"] not in (tensor_entry(spec), raw_entry(spec)):
        raise ValueError("the tensor entry does not match the metadata")
    if blob != hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]:
        raise ValueError("the file is named for another key")
    return Row(key, blob, len(head), spec, b"", checksum(head), 0, 1)


def _metadata(key: str, spec: TensorSpec) -> dict[str, str]:
    fields = key_fields(key, "key") | {
        "tierstore": "1",
        "dtype": dtype_name(spec.dtype),
        "shape": json.dumps(spec.shape),
        "stride": json.dumps(spec.stride),
    }
    return fields | {"crc32": _checksum(fields)}


def _checksum(fields: Mapping[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(sorted(fields.items())).encode()):08x}"
