"""Keeps tensors in one SQLite file."""

import json
import sqlite3
import threading
from collections.abc import Iterator

import torch

from tierstore import Backend, TensorSpec
from tierstore.spec import raw_bytes, typed_view


class SQLiteBackend(Backend):
    """`place` is a path, or a URL "sqlite://path". The lock is held during each statement."""

    def __init__(self, place: str) -> None:
        self.place = str(place).removeprefix("sqlite://")
        self._lock = threading.Lock()
        self._database = sqlite3.connect(self.place, check_same_thread=False, isolation_level=None)
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL"):  # a power loss may cost the last values, no more
            self._run(f"PRAGMA {pragma}")
        self._run("CREATE TABLE IF NOT EXISTS tensors (key BLOB PRIMARY KEY, spec TEXT, data BLOB)")

    def put(self, key: str, tensor: torch.Tensor) -> None:
        data = raw_bytes(tensor).cpu().numpy().tobytes()  # what fails here has changed nothing
        spec = json.dumps([str(tensor.dtype).removeprefix("torch."), tensor.shape, tensor.stride()])
        self._run("INSERT OR REPLACE INTO tensors VALUES (?, ?, ?)", _bytes(key), spec, data)

    def get(self, key: str) -> torch.Tensor:
        for spec, data in self._run("SELECT spec, data FROM tensors WHERE key = ?", _bytes(key)):
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8, device="cpu")
            return typed_view(raw, _spec(spec))
        raise KeyError(key)

    def delete(self, key: str) -> None:
        if not self._run("DELETE FROM tensors WHERE key = ? RETURNING 1", _bytes(key)):
            raise KeyError(key)

    def entries(self) -> Iterator[tuple[str, TensorSpec]]:
        return ((key.decode("utf-8", "surrogatepass"), _spec(spec)) for key, spec in self._run("SELECT key, spec FROM tensors"))

    def close(self) -> None:
        self._database.close()

    def _run(self, statement: str, *values: object) -> list[tuple]:
        with self._lock:
            return self._database.execute(statement, values).fetchall()


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")


def _spec(text: str) -> TensorSpec:
    dtype, shape, stride = json.loads(text)
    return TensorSpec(getattr(torch, dtype), tuple(shape), tuple(stride))
