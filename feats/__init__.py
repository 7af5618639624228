"""Stage 1: image-text pairs -> encoders -> HDF5 feature caches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feats.encoders.base import Encoder
    from feats.encoders.registry import ENCODERS, load_encoder
    from feats.errors import RowError, UsageError
    from feats.extraction.local import Summary, extract
    from feats.extraction.settings import ExtractionSettings
    from feats.records import DataSet, Record, read_dataset
    from feats.source import Source
    from feats.store import CacheError, FeatureStore, Frame, MissingRowsError

# Public name -> its home, imported when the name is first asked for: reading a cache needs no torch.
_HOMES = {
    "ENCODERS": "feats.encoders.registry",
    "CacheError": "feats.store",
    "DataSet": "feats.records",
    "Encoder": "feats.encoders.base",
    "ExtractionSettings": "feats.extraction.settings",
    "FeatureStore": "feats.store",
    "Frame": "feats.store",
    "MissingRowsError": "feats.store",
    "Record": "feats.records",
    "RowError": "feats.errors",
    "Source": "feats.source",
    "Summary": "feats.extraction.local",
    "UsageError": "feats.errors",
    "extract": "feats.extraction.local",
    "load_encoder": "feats.encoders.registry",
    "read_dataset": "feats.records",
}
__all__ = [
    "ENCODERS",
    "CacheError",
    "DataSet",
    "Encoder",
    "ExtractionSettings",
    "FeatureStore",
    "Frame",
    "MissingRowsError",
    "Record",
    "RowError",
    "Source",
    "Summary",
    "UsageError",
    "extract",
    "load_encoder",
    "read_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
