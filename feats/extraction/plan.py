"""What an extraction will do, decided before it does it: rows by blocks, batches, shapes, fingerprint."""

import importlib.metadata
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from feats.acceleration import compiled, compiling_pays, dtype_name
from feats.encoders.base import Encoder
from feats.errors import UsageError
from feats.extraction.preparation import Texts, prepare_texts
from feats.extraction.settings import ExtractionSettings
from feats.images import AUGMENTATION
from feats.records import Record
from feats.source import data_identity

BLOCK_BATCHES = 8  # batches per block: sorting by length wants many texts, losing little on a kill wants few
VERSIONS = ("torch", "torchvision", "transformers", "clip-anytorch", "pillow", "ftfy", "h5py", "numpy")


@dataclass(frozen=True)
class Plan:
    """Everything that decides what blocks hold, whoever encodes them, in whatever order.

    `blocks` are row numbers (R,), ascending; `features` maps datasets to the shape of one row. With `compiled` the
    encoder's image side runs compiled, on batches of full size only. With token vectors, `token_counts` (N,) is the
    number of them that each text has room for, and `texts` are all rows' texts, already prepared where counting them
    took that.
    """

    encoder: Encoder
    records: Sequence[Record]
    settings: ExtractionSettings
    fingerprint: Mapping[str, Any]
    features: Mapping[str, tuple[int, ...]]
    batch_size: int
    block_rows: int
    compiled: bool
    blocks: tuple[np.ndarray, ...]
    token_counts: np.ndarray | None = None
    texts: Texts | None = None

    @property
    def text_clean(self) -> str:
        """The cleaning level of texts."""
        return text_clean_of(self.encoder, self.settings)

    @property
    def kept(self) -> dict[str, Any]:
        """What a cache remembers, for a later run to compute the remaining rows just as this one would have."""
        return {"batch_size": self.batch_size, "compiled": self.compiled, "block_rows": self.block_rows}


def make_plan(encoder: Encoder, records: Sequence[Record], settings: ExtractionSettings) -> Plan:
    """The plan of a new cache: shapes are measured, texts counted where that is needed, compiling is tried where it
    pays. Warns where it pays and fails."""
    encoder, features, kept = decide(encoder, len(records), settings)
    return plan_rows(encoder, records, settings, kept=kept, features=features)


def decide(
    encoder: Encoder, rows: int, settings: ExtractionSettings
) -> tuple[Encoder, dict[str, tuple[int, ...]], dict[str, Any]]:
    """What doesn't depend on which `rows` they are, only on how many: the encoder, compiled where that pays, the shapes
    of one row's features, and `Plan.kept`. Warns where compiling pays and fails."""
    size = settings.batch_size or default_batch_size(encoder)
    with torch.inference_mode():
        features = _measure(encoder, settings)
        faster = _compiled_if_it_pays(encoder, size, rows * (1 + settings.views))
    kept = {"batch_size": size, "compiled": faster is not None, "block_rows": block_rows_of(size)}
    return faster or encoder, features, kept


def block_rows_of(batch_size: int) -> int:
    """Rows of a block: a power of two, `BLOCK_BATCHES` batches at least."""
    return 1 << (batch_size * BLOCK_BATCHES - 1).bit_length()


def plan_rows(
    encoder: Encoder,
    records: Sequence[Record],
    settings: ExtractionSettings,
    *,
    kept: Mapping[str, Any],
    features: Mapping[str, tuple[int, ...]],
) -> Plan:
    """The plan of a new cache of `records`, the rest decided: `encoder` is compiled if `kept` says so. Texts are
    counted where that is needed."""
    texts = None
    if "text_tokens" in features:
        texts = prepare_texts(encoder.text_side(), records, text_clean_of(encoder, settings))
    rows, step = np.arange(len(records)), kept["block_rows"]
    return Plan(
        encoder=encoder,
        records=records,
        settings=settings,
        fingerprint=fingerprint_of(encoder, records, settings),
        features=features,
        **kept,
        blocks=tuple(rows[low : low + step] for low in range(0, len(rows), step)),
        token_counts=np.array([t.length for t in texts.tokens], np.int64) if texts else None,
        texts=texts,
    )


def resume_plan(
    encoder: Encoder,
    records: Sequence[Record],
    settings: ExtractionSettings,
    *,
    kept: Mapping[str, Any],
    features: Mapping[str, tuple[int, ...]],
    blocks: Sequence[np.ndarray],
    token_counts: np.ndarray | None,
) -> Plan:
    """The plan of a run that goes on with a cache: `kept`, `features` and `token_counts` are the cache's, `blocks` the
    rows still to do. Raises `UsageError` where the cache was begun with a compiled forward pass that fails here."""
    if settings.batch_size is not None:
        kept = {**kept, "batch_size": settings.batch_size}
    return Plan(
        encoder=as_begun(encoder, kept) if blocks else encoder,
        records=records,
        settings=settings,
        fingerprint=fingerprint_of(encoder, records, settings),
        features=features,
        **kept,
        blocks=tuple(blocks),
        token_counts=token_counts,
    )


def as_begun(encoder: Encoder, kept: Mapping[str, Any]) -> Encoder:
    """The encoder to go on with what was begun with `kept`. Raises `UsageError` where that takes a compiled forward
    pass that fails here."""
    if not kept["compiled"]:
        return encoder
    with torch.inference_mode():
        faster, why_not = _compiled(encoder, kept["batch_size"])
    if faster is None:
        raise UsageError(f"it was begun with a compiled forward pass, which fails here ({why_not})")
    return faster


def fingerprint_of(encoder: Encoder, records: Sequence[Record], settings: ExtractionSettings) -> dict[str, Any]:
    """Everything that decides the features' values, as JSON values, but for the rows' contents, which caches keep
    hashes of."""
    views = {"count": settings.views, "seed": settings.views_seed, **AUGMENTATION}
    return {
        **encoder.identity,
        "text_clean": text_clean_of(encoder, settings) if encoder.text else None,
        "tokens": encoder.tokens,
        "views": views if encoder.image and settings.views else None,
        "dtype": dtype_name(encoder.dtype),
        "data": data_identity(record.id for record in records),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}},
    }


def text_clean_of(encoder: Encoder, settings: ExtractionSettings) -> str:
    """The cleaning level asked for, else the encoder's own."""
    return encoder.text_clean if settings.text_clean is None else settings.text_clean


def default_batch_size(encoder: Encoder) -> int:
    """256 on a GPU. On a CPU, maps of convolutional nets stay in the cache in small batches: EfficientNet-Lite runs a
    fifth faster in 16s than in 64s; a transformer's products want the larger."""
    if encoder.device.type == "cuda":
        return 256
    return 16 if encoder.image and encoder.image.channels_last else 64


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _measure(encoder: Encoder, settings: ExtractionSettings) -> dict[str, tuple[int, ...]]:
    """The shapes of one row's features, of a dummy row."""
    shapes: dict[str, tuple[int, ...]] = {}
    if encoder.image:
        out = encoder.image.forward(encoder.to_pixels(encoder.image.blank()[None]))
        shapes["image_feats"] = tuple(out["feats"].shape[1:])
        if settings.views:
            shapes["image_views"] = (settings.views, *shapes["image_feats"])
        if encoder.tokens:
            shapes["image_tokens"] = tuple(out["tokens"].shape[1:])
    if encoder.text:
        out = encoder.text.forward([t.ids for t in encoder.text.tokenize(["a"])])
        shapes["text_feats"] = tuple(out["feats"].shape[1:])
        if encoder.tokens:
            shapes["text_tokens"] = tuple(out["tokens"].shape[2:])
    return shapes


def _compiled_if_it_pays(encoder: Encoder, size: int, images: int) -> Encoder | None:
    """The encoder with a compiled image side; None where that doesn't pay or fails."""
    side = encoder.image
    if side is None or not compiling_pays(side.forward, encoder.to_pixels(side.blank()[None]), images):
        return None
    faster, why_not = _compiled(encoder, size)
    if faster is None:
        warnings.warn(f"the forward pass isn't compiled, which costs some speed ({why_not})", stacklevel=1)
    return faster


def _compiled(encoder: Encoder, size: int) -> tuple[Encoder | None, str]:
    """A copy of the encoder whose image side is compiled for batches of `size`; None and the reason if that fails."""
    side = encoder.image_side()
    blank = side.blank()
    fast, why_not = compiled(side.forward, encoder.to_pixels(blank.expand(size, *blank.shape)))
    return (None, why_not) if fast is None else (replace(encoder, image=replace(side, forward=fast)), "")
