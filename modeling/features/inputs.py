"""From joined caches to what heads read: each cache's side normalised and scaled, and the caches of a side put side by
side. The statistics belong to a run, hence `Preprocessing` is fitted once, on training rows, and saved with it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from feats.errors import UsageError
from feats.source import SIDES
from modeling.features.joined import FeatureSet, Ragged
from modeling.features.normalizer import Moments, Normalizer
from modeling.heads.base import Batch
from modeling.heads.config import HeadConfig
from modeling.heads.registry import head_class


@dataclass(frozen=True)
class Inputs:
    """N rows as heads read them, float32 on one device. A side that isn't there is None."""

    image: Tensor | None = None  # (N, Dv)
    text: Tensor | None = None  # (N, Dt)
    image_views: Tensor | None = None  # (N, K, Dv)
    image_tokens: Tensor | None = None  # (N, P, Dv')
    text_tokens: Ragged | None = None  # N texts of Dt' wide tokens

    @property
    def widths(self) -> dict[str, int]:
        """What `heads.build_head` asks for."""
        found = {side: getattr(self, side).shape[1] for side in SIDES if getattr(self, side) is not None}
        if self.image_tokens is not None:
            found |= {"image_tokens": self.image_tokens.shape[2], "image_positions": self.image_tokens.shape[1]}
        if self.text_tokens is not None:
            found["text_tokens"] = self.text_tokens.values.shape[1]
        return found

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        there = next(x for x in (self.image, self.text, self.image_tokens, self.text_tokens) if x is not None)
        return there.device if isinstance(there, Tensor) else there.values.device

    def __len__(self) -> int:
        counts = [len(x) for x in (self.image, self.text, self.image_tokens) if x is not None]
        if self.text_tokens is not None:
            counts.append(len(self.text_tokens.offsets) - 1)
        return counts[0]  # all are equal

    @property
    def n_bytes(self) -> int:
        """Of all values."""
        values = [getattr(self, f.name) for f in fields(self)]
        tensors = [x.values if isinstance(x, Ragged) else x for x in values if x is not None]
        return sum(x.numel() * x.element_size() for x in tensors)

    def for_head(self, config: HeadConfig) -> "Inputs":
        """Without what the head doesn't read: it needn't be gathered. Raises `UsageError` when what it needs isn't
        there."""
        head = head_class(config.head)
        head.require(config, self.widths)
        read = head.read_features(config.sides)
        if "image" in read:
            read.add("image_views")
        return Inputs(**{name: getattr(self, name) for name in read})

    def take(self, rows: Tensor) -> "Inputs":
        """Some rows (R,) int64, copied."""
        taken: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            x = getattr(self, name)
            if x is not None:
                taken[name] = x.take(rows) if isinstance(x, Ragged) else x[rows]
        return Inputs(**taken)

    @staticmethod
    def concatenated(parts: Sequence["Inputs"]) -> "Inputs":
        """The rows of several, one after the other."""
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {}
        for name in (f.name for f in fields(Inputs)):
            values = [getattr(part, name) for part in parts]
            if isinstance(values[0], Ragged):
                lengths = torch.cat([x.offsets.diff() for x in values])
                joined[name] = Ragged(torch.cat([x.values for x in values]), F.pad(lengths.cumsum(0), (1, 0)))
            elif values[0] is not None:
                joined[name] = torch.cat(values)
        return Inputs(**joined)

    def batch(self, rows: Tensor | None = None, views: Tensor | None = None) -> Batch:
        """Rows (M, B) int64 as a batch; without, all rows for one model, dense features uncopied. `views` (N,) or
        (M, N) int64 says which view of the rows' pictures to take, 0 the picture itself."""
        image, text, image_tokens = (_rows_of(x, rows) for x in (self.image, self.text, self.image_tokens))
        if image is not None and views is not None:
            if rows is None or self.image_views is None:
                raise ValueError("which views to take, but no rows to take them of, or no views among the features")
            chosen = (views[rows] if views.dim() == 1 else views.gather(1, rows))[..., None]
            other = self.image_views[rows, (chosen[..., 0] - 1).clamp(min=0)]
            image = torch.where(chosen > 0, other, image)
        text_tokens = mask = None
        if self.text_tokens is not None:
            rows = torch.arange(len(self), device=self.device)[None] if rows is None else rows
            text_tokens, mask = self.text_tokens.padded(rows.reshape(-1))
            if not mask.shape[1]:  # texts without a single token: as if one among them had some
                text_tokens, mask = F.pad(text_tokens, (0, 0, 0, 1)), F.pad(mask, (0, 1))
            text_tokens = text_tokens.view(*rows.shape, *text_tokens.shape[1:])
            mask = mask.view(*rows.shape, -1)
        return Batch(image, text, image_tokens, text_tokens, mask)


@dataclass(frozen=True)
class Preprocessing:
    """How a run's features are made from caches: the caches of each side, and of each cache its normalisation, a
    factor behind it (`scales`, 1 where not named), and the statistics: `normalizers` by "image/clip", "text/vader",
    "image_tokens/clip"."""

    caches: dict[str, list[str]]  # {"image": [...], "text": [...]}
    scales: dict[str, float]
    normalizers: dict[str, Normalizer]

    @classmethod
    def fit(
        cls,
        features: FeatureSet,
        rows: Tensor,
        norms: Mapping[str, str] | str = "none",
        scales: Mapping[str, float] | None = None,
    ) -> "Preprocessing":
        """Statistics of the training `rows` (M,) int64 only. `norms`: one for all caches, or by cache name.

        Raises `UsageError` for norms or scales of caches that aren't there, and for token features in more than one
        cache of a side."""
        caches, scales, kinds = _checked(features, norms, scales)
        normalizers = {}
        for key, kind in kinds.items():
            of, name = key.split("/", 1)
            x = getattr(features, of)[name]
            if of in SIDES:
                normalizers[key] = Normalizer.fit(kind, x, rows)
                continue
            values, of_rows = (x.values, _tokens_of(x, rows)) if isinstance(x, Ragged) else _flat(x, rows)
            normalizers[key] = Normalizer.fit(kind, values, of_rows)
        return cls(caches, scales, normalizers)

    @classmethod
    def fit_blocks(
        cls,
        shell: FeatureSet,
        blocks: Callable[[], Iterable[FeatureSet]],
        norms: Mapping[str, str] | str = "none",
        scales: Mapping[str, float] | None = None,
    ) -> "Preprocessing":
        """As `fit`, of training rows that `blocks` reads, once and only where there are statistics to take; of the
        `shell` names are read only."""
        caches, scales, kinds = _checked(shell, norms, scales)
        moments = {key: Moments() for key, kind in kinds.items() if Normalizer.has_statistics(kind)}
        for block in blocks() if moments else ():
            for key, of_key in moments.items():
                kind, name = key.split("/", 1)
                x = getattr(block, kind)[name]
                of_key.add(x.values if isinstance(x, Ragged) else x.reshape(-1, x.shape[-1]))
        return cls(
            caches,
            scales,
            {k: Normalizer.of_moments(moments[k]) if k in moments else Normalizer(kind) for k, kind in kinds.items()},
        )

    def only(self, sides: Sequence[str]) -> "Preprocessing":
        """Of some sides only: a head that reads the text alone needs no image cache to predict."""
        return Preprocessing(
            {side: names if side in sides else [] for side, names in self.caches.items()},
            {name: x for name, x in self.scales.items() if any(name in self.caches[side] for side in sides)},
            {key: n for key, n in self.normalizers.items() if key.startswith(tuple(sides))},
        )

    def for_head(self, config: HeadConfig) -> "Preprocessing":
        """Of what a head reads: its sides, and token features only if it uses them."""
        kept, read = self.only(config.sides), head_class(config.head).read_features(SIDES)
        unread = {f"{side}_tokens" for side in SIDES} - read
        return replace(
            kept, normalizers={key: n for key, n in kept.normalizers.items() if key.split("/")[0] not in unread}
        )

    def apply(self, features: FeatureSet) -> Inputs:
        """The features as heads read them, float32. More caches or token features than the own ones do no harm."""
        joined: dict[str, Tensor] = {}
        text_tokens: Ragged | None = None
        for side, names in self.caches.items():
            parts = [self.normalised(side, name, getattr(features, side)[name]) for name in names]
            if parts:
                joined[side] = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
            for name in names:
                tokens = f"{side}_tokens"
                x = getattr(features, tokens).get(name)
                if x is None or f"{tokens}/{name}" not in self.normalizers:
                    continue
                if isinstance(x, Ragged):
                    text_tokens = replace(x, values=self.normalised(tokens, name, x.values))
                else:
                    joined[tokens] = self.normalised(tokens, name, x)
        if any(name in features.views for name in self.caches["image"]):
            joined["image_views"] = self._views(features)
        return Inputs(**joined, text_tokens=text_tokens)

    def _views(self, features: FeatureSet) -> Tensor:
        """(N, K, Dv) of all image caches; one without views gives the picture itself, one with fewer repeats them."""
        of_cache = {name: features.views.get(name, features.image[name][:, None]) for name in self.caches["image"]}
        count = max(views.shape[1] for views in of_cache.values())
        parts = [
            self.normalised("image", name, views[:, torch.arange(count) % views.shape[1]])
            for name, views in of_cache.items()
        ]
        return torch.cat(parts, -1)

    def normalised(self, kind: str, name: str, x: Tensor) -> Tensor:
        """Features (..., D) of a cache as heads read them; `kind` is image, text, image_tokens or text_tokens."""
        scale = self.scales.get(name, 1.0)
        x = self.normalizers[f"{kind}/{name}"].apply(x)
        return x if scale == 1 else x * scale

    def to(self, device: torch.device | str) -> "Preprocessing":
        """The same with its statistics on `device`."""
        return replace(self, normalizers={key: n.to(device) for key, n in self.normalizers.items()})

    @property
    def kinds(self) -> dict[str, str]:
        """The normalisation of each of `normalizers`."""
        return {key: n.kind for key, n in self.normalizers.items()}

    def state(self) -> dict[str, Tensor]:
        """The statistics by name, e.g. "image/clip/mean": what a run's tensors hold."""
        return {f"{key}/{name}": t for key, n in self.normalizers.items() for name, t in n.state().items()}

    @classmethod
    def from_state(
        cls,
        caches: dict[str, list[str]],
        scales: dict[str, float],
        kinds: Mapping[str, str],
        state: Mapping[str, Tensor],
    ) -> "Preprocessing":
        """Back from its fields, `kinds` and `state()`."""
        parts: dict[str, dict[str, Tensor]] = {key: {} for key in kinds}
        for name, tensor in state.items():
            key, _, statistic = name.rpartition("/")
            parts[key][statistic] = tensor
        return cls(caches, scales, {key: Normalizer.from_state(kind, parts[key]) for key, kind in kinds.items()})


def _checked(
    features: FeatureSet, norms: Mapping[str, str] | str, scales: Mapping[str, float] | None
) -> tuple[dict[str, list[str]], dict[str, float], dict[str, str]]:
    """The caches of each side, the scales, and the normalisation of each of `Preprocessing.normalizers`."""
    caches = {side: list(getattr(features, side)) for side in SIDES}
    names = {name for of_side in caches.values() for name in of_side}
    norms = dict.fromkeys(names, norms) if isinstance(norms, str) else norms
    scales = dict(scales or {})
    for setting, given in (("norm", norms), ("scale", scales)):
        if set(given) - names:
            unknown = ", ".join(sorted(set(given) - names))
            raise UsageError(f"`{setting}` names {unknown}; the caches in use are {', '.join(sorted(names))}")
    for name, factor in scales.items():
        if not 0 < factor < math.inf:
            raise UsageError(f"`scale` of {name} {factor:g}: expected a finite number above 0")
    kinds = {f"{side}/{name}": norms.get(name, "none") for side in SIDES for name in caches[side]}
    for side in SIDES:
        of_side = getattr(features, f"{side}_tokens")
        if len(of_side) > 1:
            raise UsageError(f"{', '.join(of_side)} all hold {side} tokens; name one cache with tokens per side")
        kinds |= {f"{side}_tokens/{name}": norms.get(name, "none") for name in of_side}
    return caches, scales, kinds


def _rows_of(x: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """x[rows], (M, B, ...), faster; all of them, (1, N, ...), where `rows` is None."""
    if x is None or rows is None:
        return x if x is None else x[None]
    return x.index_select(0, rows.reshape(-1)).view(*rows.shape, *x.shape[1:])


def _flat(tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (N, P, D) as (N * P, D), and where those of `rows` are."""
    per_row = tokens.shape[1]
    return tokens.flatten(0, 1), (rows[:, None] * per_row + torch.arange(per_row, device=rows.device)).flatten()


def _tokens_of(texts: Ragged, rows: Tensor) -> Tensor:
    """Where in `texts.values` the tokens of `rows` are."""
    lengths = texts.offsets.diff()[rows]
    ends = lengths.cumsum(0)
    place = torch.arange(int(lengths.sum()), device=rows.device) - (ends - lengths).repeat_interleave(lengths)
    return texts.offsets[rows].repeat_interleave(lengths) + place
