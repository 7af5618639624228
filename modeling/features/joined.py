"""Feature caches joined by id into tensors. No encoder, no picture, no text."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from feats.errors import UsageError
from feats.escapes import few
from feats.names import cache_path, checked_cache
from feats.source import SIDES
from feats.strings import Labels, Strings
from modeling.choices import FEATS
from modeling.features.duplicates import Duplicates, duplicate_groups
from modeling.features.target import Target


@dataclass(frozen=True)
class FeatureSource:
    """Which caches features are joined from: `<folder>/<name>_<split>.h5` or its parts, for each side the names of
    some.

    `tokens`: whether token features are read. `fingerprints` say what made each cache, `contents` which rows it
    holds (`FeatureStore.content_digest`), `parameters` how many the encoder of each side has (absent where a cache
    doesn't tell); all are filled in when they are read. Raises `UsageError` for a name that leads out of the folder."""

    folder: Path = FEATS
    image: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    tokens: bool = False
    fingerprints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)
    contents: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    parameters: Mapping[str, Mapping[str, int]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in self.text:
            checked_cache(name, "ttype")
        for name in (*self.image, *self.fingerprints, *self.contents):
            checked_cache(name, "vtype")

    def path(self, name: str, split: str) -> Path:
        """Where a cache lies. Raises `UsageError` for a name that leads elsewhere."""
        return cache_path(self.folder, name, split)

    def of(self, side: str) -> tuple[str, ...]:
        """The caches of a side, "image" or "text"."""
        return {"image": self.image, "text": self.text}[side]

    @property
    def names(self) -> list[str]:
        """All caches, each once."""
        return list(dict.fromkeys([*self.image, *self.text]))


@dataclass(frozen=True)
class Rows:
    """Rows without their features. `tags` are '' where unknown. `image_hash` and `text_key` (N,) uint64 are equal for
    rows with the same picture file and the same text; 0 where no joined cache knows."""

    ids: Strings
    tags: Labels
    image_hash: np.ndarray
    text_key: np.ndarray

    @classmethod
    def of(cls, ids: Iterable[str], tags: Iterable[str], image_hash: np.ndarray, text_key: np.ndarray) -> "Rows":
        """Rows of any strings."""
        return cls(Strings.of(ids), Labels.of(tags), image_hash, text_key)

    @cached_property
    def labelled(self) -> "Rows":
        """Those with a label."""
        return self.take(np.flatnonzero(self.tags.known))

    @cached_property
    def duplicates(self) -> Duplicates | None:
        """The duplicate group of each row; None where no joined cache knows their contents."""
        if not self.image_hash.any() and not self.text_key.any():
            return None
        return Duplicates(self.ids, duplicate_groups(self.image_hash, self.text_key))

    def take(self, rows: np.ndarray) -> "Rows":
        """Some of the rows, by ascending numbers."""
        if len(rows) == len(self.ids):
            return self
        first, stop = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        some = slice(first, stop) if stop - first == len(rows) else rows
        return Rows(self.ids[some], self.tags[some], self.image_hash[some], self.text_key[some])


@dataclass(frozen=True)
class Ragged:
    """Token features of N texts of different lengths: `values` (ΣL, D), text i in rows offsets[i]:offsets[i + 1]."""

    values: torch.Tensor
    offsets: torch.Tensor  # (N + 1,) int64

    def padded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, L, D) of `rows` (B,) int64, zero behind each text's end, and which are real: mask (B, L)."""
        start, stop = self.offsets[rows], self.offsets[rows + 1]
        longest = int((stop - start).max()) if len(rows) else 0
        place = torch.arange(longest, device=rows.device)
        mask = place < (stop - start)[:, None]
        if not longest:
            return self.values.new_zeros(len(rows), 0, self.values.shape[1]), mask
        index = (start[:, None] + place).clamp(max=len(self.values) - 1)
        return self.values[index].masked_fill(~mask[..., None], 0), mask

    def take(self, rows: torch.Tensor) -> "Ragged":
        """The texts `rows` (M,) int64."""
        rows = rows.to(self.offsets.device)
        lengths = self.offsets.diff()[rows]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        place = torch.arange(int(offsets[-1]), device=rows.device)
        return Ragged(self.values[place + (self.offsets[rows] - offsets[:-1]).repeat_interleave(lengths)], offsets)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Ragged":
        """The same on `device`, the values in `dtype`."""
        return Ragged(self.values.to(device=device, dtype=dtype), self.offsets.to(device=device))


Values = TypeVar("Values", torch.Tensor, Ragged)


@dataclass(frozen=True)
class FeatureSet:
    """N rows that every joined cache has, in the first cache's order.

    The dictionaries are keyed by cache name; one cache may be in `image` and in `text`. Tensors are float16 as cached
    until `to`. `left_out` says of each row that is missing why; `dataset` holds all rows, those included: split it
    rather than `ids`, and every choice of caches over the same data gets the same split.
    """

    split: str
    rows: Rows
    image: dict[str, torch.Tensor]  # (N, Dv)
    text: dict[str, torch.Tensor]  # (N, Dt)
    views: dict[str, torch.Tensor]  # (N, K, Dv), of the image caches that have views
    image_tokens: dict[str, torch.Tensor]  # (N, P, Dv')
    text_tokens: dict[str, Ragged]
    source: FeatureSource
    left_out: dict[str, str]
    dataset: Rows = field(repr=False)
    told_by: tuple[str, ...] = ()  # other caches that told which pictures and texts are the same
    target: Target | None = field(default=None, repr=False)  # whose labels these are, None: the caches'
    corrections: Mapping[str, str] = field(default_factory=dict, repr=False)  # labels that `corrected` changed, by id

    def __len__(self) -> int:
        return len(self.rows.ids)

    @property
    def ids(self) -> Strings:
        """Of the N rows, in their order."""
        return self.rows.ids

    @property
    def tags(self) -> Labels:
        """The label of each row, '' where unknown."""
        return self.rows.tags

    @property
    def image_hash(self) -> np.ndarray:
        """(N,) uint64, see `Rows`."""
        return self.rows.image_hash

    @property
    def text_key(self) -> np.ndarray:
        """(N,) uint64, see `Rows`."""
        return self.rows.text_key

    @property
    def widths(self) -> dict[str, dict[str, int]]:
        """{"image": {cache: Dv}, "text": {cache: Dt}}."""
        return {side: {name: x.shape[1] for name, x in getattr(self, side).items()} for side in SIDES}

    def positions(self, ids: Sequence[str]) -> torch.Tensor:
        """Row numbers of `ids`, (len(ids),) int64. Raises `UsageError` naming those that aren't here, and why."""
        rows = self.ids.positions(ids)
        if (rows < 0).any():
            absent = [ids[k] for k in np.flatnonzero(rows < 0).tolist()]
            why = next((f"; {i} was left out ({self.left_out[i]})" for i in absent if i in self.left_out), "")
            raise UsageError(f"{few_rows(absent)} not among the {len(self)} {self.split} rows{why}")
        return torch.from_numpy(rows)

    def tags_of(self, ids: Sequence[str]) -> Labels:
        """The labels of `ids`, '' where unknown. Raises as `positions`."""
        return self.tags[self.positions(ids).numpy()]

    def labelled(self, ids: Sequence[str] | None = None) -> tuple[Strings, Labels]:
        """Those of `ids` (of all rows without) that have a label, and their labels. Raises `UsageError` if none has."""
        rows = np.arange(len(self)) if ids is None else self.positions(ids).numpy()
        kept = rows[self.tags.known[rows]]
        if not len(kept):
            raise UsageError(f"none of the {len(rows)} rows has a label; there is nothing to compare with")
        return self.ids[kept], self.tags[kept]

    def corrected(self, labels: Mapping[str, str]) -> "FeatureSet":
        """The same rows with other `labels`, by id, beside those that were corrected before. `dataset` keeps the
        caches' labels, and with them every split stays as it was."""
        corrections = {**self.corrections, **labels}
        rows = self.ids.positions(list(corrections))
        here = rows >= 0  # the others may be in quarantine
        changed = [label for label, there in zip(corrections.values(), here, strict=True) if there]
        tags = self.tags.with_changes(rows[here], changed)
        return replace(self, rows=replace(self.rows, tags=tags), corrections=corrections)

    def with_target(self, target: Target) -> "FeatureSet":
        """The same rows with the labels of another target, '' where it has none; in `dataset`, too: what is split is
        split by these."""
        rows = replace(self.rows, tags=target.tags(self.split, self.ids))
        dataset = replace(self.dataset, tags=target.tags(self.split, self.dataset.ids))
        return replace(self, rows=rows, dataset=dataset, target=target)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "FeatureSet":
        """The same rows with every tensor on `device`, the features in `dtype`."""
        return self.with_tensors(lambda x: x.to(device=device, dtype=dtype), lambda x: x.to(device, dtype))

    def with_tensors(
        self, dense: Callable[[torch.Tensor], torch.Tensor], ragged: Callable[[Ragged], Ragged]
    ) -> "FeatureSet":
        """The same caches with what two functions make of each tensor and of each text's tokens."""

        def of(tensors: dict[str, Values], change: Callable[[Values], Values]) -> dict[str, Values]:
            return {name: change(x) for name, x in tensors.items()}

        return replace(
            self,
            image=of(self.image, dense),
            text=of(self.text, dense),
            views=of(self.views, dense),
            image_tokens=of(self.image_tokens, dense),
            text_tokens=of(self.text_tokens, ragged),
        )

    def only(self, caches: Mapping[str, Collection[str]]) -> "FeatureSet":
        """Without some tensors: `caches` names those to keep of image, text, views, image_tokens or text_tokens; what
        it doesn't mention stays as it is."""

        def of(kind: str, tensors: dict[str, Values]) -> dict[str, Values]:
            return {name: x for name, x in tensors.items() if name in caches.get(kind, tensors)}

        return replace(
            self,
            image=of("image", self.image),
            text=of("text", self.text),
            views=of("views", self.views),
            image_tokens=of("image_tokens", self.image_tokens),
            text_tokens=of("text_tokens", self.text_tokens),
        )

    def require_tokens(self, side: str) -> None:
        """Raise `UsageError` when no cache of `side` ("image" or "text") holds token features."""
        if not getattr(self, f"{side}_tokens"):
            if not self.source.tokens:
                raise UsageError(
                    f"this head needs {side} tokens, and none were loaded; load the features with `tokens`"
                )
            names = ", ".join(getattr(self, side)) or "none"
            raise UsageError(
                f"this head needs {side} tokens, and no {side} cache has them (there: {names}); make one with "
                "`tokens`, e.g. python feats/clip_extract_feats.py `tokens` `name` clip_tokens"
            )

    def summary(self) -> str:
        """One line: rows, what was joined, and who was left out."""
        joined = [f"{side} {name} {width}" for side, widths in self.widths.items() for name, width in widths.items()]
        line = f"{self.split}: {len(self)} rows ({', '.join(joined)})"
        if self.left_out:
            some = "; ".join(f"{i} ({why})" for i, why in list(self.left_out.items())[:5])
            line += f"; left out {len(self.left_out)}: {some}{'; ...' if len(self.left_out) > 5 else ''}"
        return line


def source_of(
    folder: Path | str, image: str | Sequence[str] = (), text: str | Sequence[str] = (), tokens: bool = False
) -> FeatureSource:
    """Caches by name: one, or some of each side."""
    of_image, of_text = ((names,) if isinstance(names, str) else tuple(names) for names in (image, text))
    return FeatureSource(Path(folder), of_image, of_text, tokens)


def few_rows(ids: Sequence[str]) -> str:
    """How many they are, and which the first are: 2 rows: a, b."""
    return f"{len(ids)} row{'s' if len(ids) > 1 else ''}: {few(ids)}"
