"""Which weights a finetuning keeps: the best epoch's, a soup of several, or some between these and the start. All are
chosen on validation rows alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from modeling.finetuning.checkpoint import Tensors, WorkFolder
from modeling.finetuning.data import TuneData
from modeling.finetuning.distributed import Team
from modeling.finetuning.model import PairModel
from modeling.finetuning.parameters import load_plain
from modeling.finetuning.predicting import figures_of, predict, score_of
from modeling.finetuning.settings import TuneSettings
from modeling.training.config import is_better

WISE_FT_SHARES = tuple(k / 10 for k in range(1, 10))  # of the way from the start to the tuned weights

History = Sequence[Mapping[str, Any]]  # a row an epoch, the start's first


@dataclass(frozen=True)
class Candidate:
    """Weights that may be kept, in words, too; `epoch` None: of several. `score` is the monitored figure, turned so
    that more is better."""

    state: Tensors
    words: str
    epoch: int | None
    score: float
    logits: np.ndarray  # (len(val), C) float32


def best_epoch(history: History, settings: TuneSettings) -> int:
    """The last epoch that bettered all before it by more than `min_gain`; 0, the start, where none did."""
    best = history[0]
    for row in history[1:]:
        score, so_far = (score_of(of, settings.monitor) for of in (row, best))
        if is_better(score, so_far, settings.min_gain):
            best = row
    return int(best["epoch"])


def epochs_in_question(history: History, settings: TuneSettings) -> list[int]:
    """The epochs whose weights may be kept: the best, and the best few for a soup."""
    return [best_epoch(history, settings), *_ranked(history, settings)[: settings.soup]]


def _ranked(history: History, settings: TuneSettings) -> list[int]:
    """The epochs after the start, the best first."""
    ranked = sorted(history[1:], key=lambda row: (-score_of(row, settings.monitor), row["epoch"]))
    return [int(row["epoch"]) for row in ranked]


class Choice:
    """Tries weights of a model, without adapters, on the validation rows of `data`. `start` are those it began with;
    those of epochs lie in `work`."""

    def __init__(
        self,
        model: PairModel,
        data: TuneData,
        settings: TuneSettings,
        work: WorkFolder,
        team: Team,
        history: History,
        start: Tensors,
    ):
        self.model, self.data, self.settings, self.work, self.team = model, data, settings, work, team
        self.history, self.start = history, start
        self.tried: list[tuple[str, float]] = []  # soups and interpolations, in words, with their scores

    def best(self) -> Candidate:
        """The candidate of the highest figure; of equals the one that was tried first. The model then holds it."""
        best = self._of_epoch(best_epoch(self.history, self.settings))
        if self.settings.soup:
            best = self._better(best, self._soups())
        if self.settings.wise_ft and best.epoch != 0:
            best = self._better(best, (self._between(share, best) for share in WISE_FT_SHARES))
        load_plain(self.model, best.state)
        return best

    def _better(self, best: Candidate, others: Iterable[Candidate]) -> Candidate:
        """One by one: the weights of all at once wouldn't fit beside a large model."""
        chosen = best
        for other in others:
            self.tried.append((other.words, other.score))
            chosen = other if other.score > chosen.score else chosen
        return chosen

    def _judged(self, state: Tensors, words: str, epoch: int | None = None) -> Candidate:
        load_plain(self.model, state)
        rows, at_once = self.data.val, self.settings.rows_to_predict
        logits = predict(self.model, self.data.reader, rows, self.team, at_once=at_once)
        figures = figures_of(logits, self.data.labels[list(self.data.val)])
        return Candidate(state, words, epoch, score_of(figures, self.settings.monitor), logits)

    def _of_epoch(self, epoch: int) -> Candidate:
        state = self.work.load_epoch(epoch, self.model.device) if epoch else self.start
        return self._judged(state, f"epoch {epoch}" if epoch else "the start, which no epoch bettered", epoch)

    def _soups(self) -> Iterator[Candidate]:
        """Greedy soup (Wortsman et al. 2022): from the best epoch down, each is mixed in unless that worsens the
        figure."""
        first, *others = _ranked(self.history, self.settings)[: self.settings.soup]
        mixed, members = self._of_epoch(first), [first]
        for epoch in others:
            more = self.work.load_epoch(epoch, self.model.device)
            share = 1 / (len(members) + 1)
            words = f"the mean of epochs {', '.join(map(str, [*members, epoch]))}"
            candidate = self._judged(_between(mixed.state, more, share), words)
            yield candidate
            if candidate.score >= mixed.score:
                mixed = candidate
                members.append(epoch)

    def _between(self, share: float, tuned: Candidate) -> Candidate:
        """WiSE-FT (Wortsman et al. 2022): weights on the straight way from the start to the tuned ones."""
        words = f"{share:g} of the way from the start to {tuned.words}"
        return self._judged(_between(self.start, tuned.state, share), words)


def _between(a: Tensors, b: Tensors, share: float) -> Tensors:
    """Weights `share` of the way from `a` to `b`; counts are `b`'s."""
    return {name: torch.lerp(a[name], x, share) if x.is_floating_point() else x for name, x in b.items()}
