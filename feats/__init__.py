"""Stage 1: image-text pairs -> encoders -> HDF5 feature caches.

    from feats import read_dataset, load_encoder, extract, FeatureStore

The names below are found when they are first used: reading a cache needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feats.cache_reader import CacheError as CacheError, Frame as Frame, MissingRowsError as MissingRowsError
    from feats.encoders.base import Encoder as Encoder
    from feats.encoders.registry import ENCODERS as ENCODERS, load_encoder as load_encoder
    from feats.errors import RowError as RowError, UsageError as UsageError
    from feats.extraction.local import extract as extract
    from feats.extraction.settings import ExtractionSettings as ExtractionSettings
    from feats.extraction.summary import Summary as Summary
    from feats.records import DataSet as DataSet, Record as Record, read_dataset as read_dataset
    from feats.source import Source as Source
    from feats.store import FeatureStore as FeatureStore

# Public name -> its home.
_HOMES = {
    "ENCODERS": "feats.encoders.registry",
    "CacheError": "feats.cache_reader",
    "DataSet": "feats.records",
    "Encoder": "feats.encoders.base",
    "ExtractionSettings": "feats.extraction.settings",
    "FeatureStore": "feats.store",
    "Frame": "feats.cache_reader",
    "MissingRowsError": "feats.cache_reader",
    "Record": "feats.records",
    "RowError": "feats.errors",
    "Source": "feats.source",
    "Summary": "feats.extraction.summary",
    "UsageError": "feats.errors",
    "extract": "feats.extraction.local",
    "load_encoder": "feats.encoders.registry",
    "read_dataset": "feats.records",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
