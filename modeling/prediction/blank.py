"""What encoders make of nothing: a black picture and an empty text, kept beside each cache as `<name>_blank.h5`.

A one-row cache by the ordinary extraction loop, of the very encoder that its neighbour's fingerprint tells of; later
calls need no encoder. It follows from the neighbour and is made anew when that is of other weights or cleaning.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from feats.cache_reader import DONE
from feats.errors import NoWeightsError, Remedy, UsageError
from feats.extraction.local import extract
from feats.extraction.settings import ExtractionSettings
from feats.images import hash64
from feats.leftovers import temporary_folder
from feats.records import Record
from feats.store import FeatureStore
from modeling.features.joined import FeatureSet, FeatureSource
from modeling.features.loading import load_features
from modeling.runs.encoders import encoder_of, essence

SPLIT = "blank"  # caches are <name>_blank.h5
ROW = "blank"  # the id of their one row
SIZE = 224  # of the black picture
_HEADER, _PIXELS = 54, 3 * SIZE * SIZE
# A BMP of 24 bits. Joined caches must be of the same picture, byte for byte, whenever they were made: no library
# writes it.
BLACK = (
    struct.pack("<2sIII", b"BM", _HEADER + _PIXELS, 0, _HEADER)
    + struct.pack("<IiiHHIIiiII", 40, SIZE, SIZE, 1, 24, 0, _PIXELS, 0, 0, 0, 0)
    + bytes(_PIXELS)
)


def blank_pair(source: FeatureSource, weights: Mapping[str, str], device: torch.device) -> FeatureSet:
    """One row: what the encoders of all caches of `source`, by its fingerprints, make of a black picture and an empty
    text. Encoded where it isn't there yet; `weights` gives a cache's encoder a file or folder.

    Raises `UsageError` for weights of other caches, when an encoder can't be loaded as the fingerprint says, and when
    another split named blank lies where the row is to be kept.
    """
    unknown = sorted(weights.keys() - set(source.names))
    if unknown:
        raise UsageError(f"`weights` names {', '.join(unknown)}; the caches in use are {', '.join(source.names)}")
    for name in source.names:
        path = source.path(name, SPLIT)
        if not _is_there(path, source.fingerprints[name]):
            _encode(name, source.fingerprints[name], path, weights.get(name), device)
    return load_features(source.folder, SPLIT, source.image, source.text, tokens=source.tokens, views=False)


def _is_there(path: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether a blank row by the encoder of `fingerprint` lies at `path`, of this very picture."""
    if not path.exists():
        return False
    with FeatureStore.open(path) as store:
        if store.ids.tolist() != [ROW]:
            raise UsageError(
                f"{path} holds other rows than the one black picture and empty text that are to be kept there; extract "
                "that split under another name, or take the training rows' mean with `absent` mean"
            )
        same = essence(store.fingerprint) == essence(fingerprint)
        tokens = bool(store.fingerprint.get("tokens")) == bool(fingerprint.get("tokens"))
        picture = store.facts("image_hash").tolist() in ([0], [hash64(BLACK)])  # 0: of an encoder of texts
        return same and tokens and picture and store.complete and bool((store.status == DONE).all())


def _encode(name: str, fingerprint: Mapping[str, Any], path: Path, weights: str | None, device: torch.device) -> None:
    try:
        encoder = encoder_of(name, fingerprint, weights, device=device, tokens=bool(fingerprint.get("tokens")))
    except NoWeightsError as error:
        mean = Remedy("take the training rows' mean", settings={"absent": "mean"})
        raise NoWeightsError(error.what, error.tried, (mean, *error.remedies)) from None
    except UsageError as error:
        raise UsageError(f"{error}; or take the training rows' mean with `absent` mean") from None
    settings = ExtractionSettings(workers=0, text_clean=fingerprint.get("text_clean") or "none")
    with temporary_folder() as folder:
        picture = folder / "black.bmp"
        picture.write_bytes(BLACK)
        extract(encoder, [Record(ROW, picture, "")], path, settings, overwrite=True)
