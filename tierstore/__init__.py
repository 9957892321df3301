"""A tiered tensor store for PyTorch: run any model inside a byte budget for each tier."""

from tierstore.backend import (
    Backend,
    DistantBackend,
    FileBackend,
    FileExtent,
    MappedBackend,
    MemoryBackend,
    ReadingBackend,
    ReadOnlyBackend,
    SizingBackend,
    SourceBackend,
    VolatileBackend,
)
from tierstore.checkpoint.meta import on_meta
from tierstore.errors import (
    BackendError,
    BudgetError,
    CheckpointError,
    ClosedError,
    CorruptionError,
    MissingKeyError,
    ModelError,
    ReadOnlyError,
    RemoteError,
    SizeError,
    StorageError,
    TierStoreError,
    UnsupportedTensorError,
)
from tierstore.planning.classic import LRU
from tierstore.planning.policy import Policy
from tierstore.pretrained import from_pretrained
from tierstore.registry import backend_class, backend_names, open_backend
from tierstore.running import Tiered
from tierstore.session import tiered
from tierstore.sizes import format_size, parse_size
from tierstore.spec import TensorSpec
from tierstore.stats import LinkStats, Stats, TierStats
from tierstore.store import TieredStore
from tierstore.tier import Tier

__all__ = [
    "LRU",
    "Backend",
    "BackendError",
    "BudgetError",
    "CheckpointError",
    "ClosedError",
    "CorruptionError",
    "DistantBackend",
    "FileBackend",
    "FileExtent",
    "LinkStats",
    "MappedBackend",
    "MemoryBackend",
    "MissingKeyError",
    "ModelError",
    "Policy",
    "ReadOnlyBackend",
    "ReadOnlyError",
    "ReadingBackend",
    "RemoteError",
    "SizeError",
    "SizingBackend",
    "SourceBackend",
    "Stats",
    "StorageError",
    "TensorSpec",
    "Tier",
    "TierStats",
    "TierStoreError",
    "Tiered",
    "TieredStore",
    "UnsupportedTensorError",
    "VolatileBackend",
    "backend_class",
    "backend_names",
    "format_size",
    "from_pretrained",
    "on_meta",
    "open_backend",
    "parse_size",
    "tiered",
]
