"""What a run's training rows tell of a pair: how much each side matters beside their mean, and which are nearest."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from feats.encoders.base import Features
from feats.source import SIDES
from modeling.explanations.explained import ExplainedModel
from modeling.features.inputs import Inputs
from modeling.features.joined import FeatureSet, Ragged
from modeling.features.loading import load_features
from modeling.runs.run import Member, Run


@dataclass(frozen=True)
class SideImportance:
    """What is lost when a side's features become the training rows' mean: probability, and log-odds, of the target.
    Below 0: the side speaks against it."""

    side: str
    probability: float
    log_odds: float


@dataclass(frozen=True)
class Neighbour:
    """A training row, and the cosine of its features to the pair's, as the head reads them."""

    id: str
    label: str
    similarity: float


@dataclass(frozen=True)
class TrainingRows:
    """A run's cached training rows, of all folds."""

    features: FeatureSet

    @classmethod
    def of(cls, run: Run, folder: Path | None = None) -> "TrainingRows":
        """From the run's caches, or those in `folder`. Raises `UsageError` when they aren't there, or are others."""
        source = run.source
        data = load_features(
            run.feature_folder(folder), "train", source.image, source.text, views=False, tokens=source.tokens
        )
        run.check(data)
        trained = {name for split in run.splits for name in split.train}
        kept = torch.tensor([k for k, name in enumerate(data.ids) if name in trained], dtype=torch.int64)
        chosen = data.with_tensors(lambda x: x[kept], lambda x: x.take(kept))
        return cls(replace(chosen, rows=data.rows.take(kept.numpy())))

    def mean(self, part: str, device: torch.device) -> Features:
        """The mean of a part's features, (1, ...); of texts' tokens the mean token."""
        side, _, name = part.partition("/")
        found = {"feats": getattr(self.features, side)[name].float().mean(0, keepdim=True).to(device)}
        tokens = getattr(self.features, f"{side}_tokens").get(name)
        if isinstance(tokens, Ragged):
            found["tokens"] = tokens.values.float().mean(0)[None, None].to(device)
            found["lengths"] = torch.ones(1, dtype=torch.int64, device=device)
        elif tokens is not None:
            found["tokens"] = tokens.float().mean(0, keepdim=True).to(device)
        return found

    @torch.no_grad()
    def side_importance(
        self, model: ExplainedModel, features: Mapping[str, Features], target: int
    ) -> list[SideImportance]:
        """Each side of a pair, with all its encoders, against the training mean."""
        found = []
        whole = model.log_odds(features, target)
        for side in SIDES:
            parts = [part for part in features if part.startswith(f"{side}/")]
            if not parts:
                continue
            without = {**features, **{part: self.mean(part, model.device) for part in parts}}
            less = model.log_odds(without, target)
            drop = float(whole.sigmoid() - less.sigmoid())
            found.append(SideImportance(side, drop, float(whole - less)))
        return found

    @torch.no_grad()
    def nearest(self, model: ExplainedModel, features: Mapping[str, Features], count: int) -> list[Neighbour]:
        """The nearest rows, by the first head's inputs: normalised features, both sides side by side; of heads that
        read tokens their means."""
        [member, *_] = model.members
        rows = vectors(self._inputs(member, self.features.to(model.device)))
        own = vectors(self._inputs(member, model.inputs_of(member, features)))
        similarity = torch.nn.functional.cosine_similarity(rows, own)
        best = similarity.argsort(descending=True, stable=True)[:count].tolist()
        ids, tags = self.features.ids, self.features.tags
        return [Neighbour(ids[k], tags[k], float(similarity[k])) for k in best]

    @staticmethod
    def _inputs(member: Member, features: FeatureSet) -> Inputs:
        return member.preprocessing.apply(features).for_head(member.config.head)


def vectors(inputs: Inputs) -> Tensor:
    """A head's inputs as one vector a row, (N, D)."""
    found = [x for x in (inputs.image, inputs.text) if x is not None]
    if inputs.image_tokens is not None:
        found.append(inputs.image_tokens.mean(1))
    if inputs.text_tokens is not None:
        offsets = inputs.text_tokens.offsets
        found.append(torch.segment_reduce(inputs.text_tokens.values, "mean", offsets=offsets, initial=0.0))
    return torch.cat(found, -1)
