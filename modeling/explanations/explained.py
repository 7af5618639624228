"""A run with its encoders, differentiable from what enters an encoder to the run's probabilities.

    picture, text --encoders--> features by part --preprocessing and heads, as of caches--> logits

All is computed in float32, with networks as they are saved: nothing is folded, replaced or trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from feats.acceleration import full_products
from feats.encoders.base import Encoder, Features, ImageSide, TextSide
from feats.encoders.registry import ENCODERS
from feats.errors import RowError, UsageError
from feats.images import as_rgb, read_image
from feats.records import TarSlice
from feats.source import SIDES
from feats.text import clean
from modeling.features.joined import FeatureSet, Ragged, Rows
from modeling.heads.registry import head_class
from modeling.runs.encoders import check_weights, encoder_of
from modeling.runs.run import Member, Run

NOBODY = Rows.of([], [], np.zeros(0, np.uint64), np.zeros(0, np.uint64))


@dataclass(frozen=True)
class Pair:
    """One pair as the encoders of a run read it, by part ("image/clip", "text/minilm")."""

    pixels: dict[str, Tensor] = field(default_factory=dict)  # (H, W, 3) uint8, after preprocessing
    texts: dict[str, str] = field(default_factory=dict)  # cleaned


class ExplainedModel:
    """A run's encoders and heads as one function of a pair. `parts` are its encoders' sides by "image/clip",
    "text/minilm", ...; features of a part are those that its side gives, and "lengths" (B,) of its texts' tokens."""

    def __init__(self, run: Run, encoders: Mapping[str, Encoder], device: torch.device):
        self.run, self.encoders, self.device = run, encoders, device
        self.classes = run.classes
        self.members = [frozen(member.to(device)) for member in run.members]
        self.parts: dict[str, ImageSide | TextSide] = {}
        for side in SIDES:
            for name in run.source.of(side):
                encoder = encoders[name]
                self.parts[f"{side}/{name}"] = encoder.image_side() if side == "image" else encoder.text_side()
        for part in self.parts.values():
            if part.network is not None:
                part.network.requires_grad_(False)  # gradients are wanted of what passes through, not of weights

    def encoder_of(self, part: str) -> Encoder:
        """The encoder that a part is a side of."""
        return self.encoders[part.partition("/")[2]]

    def image_side(self, part: str) -> ImageSide:
        """A part that reads pictures."""
        return self.encoder_of(part).image_side()

    def text_side(self, part: str) -> TextSide:
        """A part that reads texts."""
        return self.encoder_of(part).text_side()

    def read(self, image: Image.Image | None, text: str | None) -> Pair:
        """A pair as the parts read it; what no part reads may be None."""
        pixels, texts = {}, {}
        for part, side in self.parts.items():
            if isinstance(side, ImageSide):
                assert image is not None
                pixels[part] = side.to_bytes(as_rgb(image))
            else:
                name = part.partition("/")[2]
                texts[part] = clean(text or "", self.run.source.fingerprints[name]["text_clean"] or "none")
        return Pair(pixels, texts)

    def to_pixels(self, part: str, pixels: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) uint8 as a part's network takes them, (B, 3, H, W)."""
        return self.encoder_of(part).to_pixels(pixels)

    def of_texts(self, part: str, texts: Sequence[str]) -> Features:
        """A part's features of cleaned texts."""
        side = self.text_side(part)
        return self.of_ids(part, [tokens.ids for tokens in side.tokenize(list(texts))])

    def of_ids(self, part: str, ids: list[Any]) -> Features:
        """A part's features of tokenised texts."""
        return self.with_lengths(self.text_side(part).forward(ids), ids)

    def with_lengths(self, features: Features, ids: list[Any]) -> Features:
        """Features of texts, with how many of their tokens are real."""
        if "tokens" not in features:
            return features
        return {**features, "lengths": torch.tensor([len(row) for row in ids], device=self.device)}

    @torch.no_grad()
    @full_products(torch.float32)
    def features(self, pair: Pair) -> dict[str, Features]:
        """What the parts make of a pair."""
        found = {part: self.of_texts(part, [text]) for part, text in pair.texts.items()}
        for part, pixels in pair.pixels.items():
            found[part] = self.image_side(part).forward(self.to_pixels(part, pixels[None]))
        return {part: found[part] for part in self.parts}

    # -- from features to probabilities ------------------------------------------------------------------------

    def logits(self, features: Mapping[str, Features]) -> Tensor:
        """(B, C) float32, whose softmax is the run's calibrated probabilities: of one head its logits over the
        temperature, of an ensemble the logarithm of what it says together."""
        of_members = [self._of_member(member, features) for member in self.members]
        if self.run.stacking is not None:
            return self._stacked(of_members)
        if len(self.members) == 1:
            return of_members[0] / self.members[0].temperature
        each = [(z / member.temperature).log_softmax(-1) for z, member in zip(of_members, self.members, strict=True)]
        return torch.stack(each).logsumexp(0)

    def log_odds(self, features: Mapping[str, Features], target: int) -> Tensor:
        """log p / (1 - p) of a class, (B,): what explanations explain. Unlike a class's logit it doesn't change when
        all logits do, and unlike the probability its differences don't vanish near 0 and 1."""
        logits = self.logits(features)
        others = [k for k in range(len(self.classes)) if k != target]
        return logits[:, target] - logits[:, others].logsumexp(-1)

    def with_part(self, features: Mapping[str, Features], part: str, changed: Features) -> dict[str, Features]:
        """The features of a pair with B others in place of one part's."""
        count = len(changed["feats"])
        repeated = {
            name: {key: x.expand(count, *x.shape[1:]) for key, x in of_part.items()}
            for name, of_part in features.items()
        }
        return {**repeated, part: changed}

    def inputs_of(self, member: Member, features: Mapping[str, Features]) -> FeatureSet:
        """The features as those of caches, for a member's preprocessing."""
        by_side: dict[str, dict[str, Any]] = {kind: {} for kind in ("image", "text", "image_tokens", "text_tokens")}
        for part, out in features.items():
            side, _, name = part.partition("/")
            by_side[side][name] = out["feats"].float()
            if "tokens" in out:
                tokens = out["tokens"].float()
                by_side[f"{side}_tokens"][name] = tokens if side == "image" else _ragged(tokens, out["lengths"])
        return FeatureSet("raw", NOBODY, by_side["image"], by_side["text"], {}, by_side["image_tokens"],
                          by_side["text_tokens"], self.run.source, {}, NOBODY)  # fmt: skip

    def _of_member(self, member: Member, features: Mapping[str, Features]) -> Tensor:
        inputs = member.preprocessing.apply(self.inputs_of(member, features)).for_head(member.config.head)
        return member.head(inputs.batch())[0].float()

    def _stacked(self, of_members: Sequence[Tensor]) -> Tensor:
        stacking = self.run.stacking
        assert stacking is not None
        groups = sorted({member.group for member in self.members})
        opinions = []
        for group in groups:
            own = [z for z, member in zip(of_members, self.members, strict=True) if member.group == group]
            centred = [z.double() - z.double().mean(-1, keepdim=True) for z in own]
            opinions.append(torch.stack(centred).mean(0))
        weight, bias = stacking.weight.to(self.device), stacking.bias.to(self.device)
        return torch.cat(opinions, -1) @ weight + bias


def frozen(member: Member) -> Member:
    """The member with its head in use, not in training."""
    member.head.eval().requires_grad_(False)
    return member


def _ragged(tokens: Tensor, lengths: Tensor) -> Ragged:
    """Tokens (B, L, D), of which the first `lengths` (B,) of a row are real."""
    real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return Ragged(tokens[real], torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))


def load_explained(run: Run, device: torch.device, weights: Mapping[str, str] = {}) -> ExplainedModel:
    """The very encoders of a run's caches, as their fingerprints say, with its heads. `weights` gives a cache's encoder
    a file or folder. Raises `UsageError` when an encoder can't be loaded."""
    check_weights(weights, run.source.names)
    read = {kind for m in run.members for kind in head_class(m.config.head.head).read_features(m.config.head.sides)}
    tokens = {
        key.partition("/")[2]
        for member in run.members
        for key in member.preprocessing.normalizers
        if "_tokens/" in key and key.partition("/")[0] in read
    }
    encoders = {}
    for name in run.source.names:
        fingerprint = run.source.fingerprints[name]
        spec = ENCODERS.get(fingerprint["encoder"])
        encoders[name] = encoder_of(
            name,
            fingerprint,
            weights.get(name) or run.encoder_weights(name),
            device=device,
            tokens=name in tokens,
            trainable=spec is not None and spec.trainable,
            trained_by=run.named,
        )
    return ExplainedModel(run, encoders, device)


def read_picture(path: Path | TarSlice | None) -> Image.Image:
    """A picture file. Raises `UsageError` when there is none to be had."""
    try:
        return read_image(path)[0]
    except RowError as error:
        raise UsageError(f"{path}: {error}; give a picture as `image`") from None
