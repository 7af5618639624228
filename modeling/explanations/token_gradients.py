"""Which words of a text speak for a class, by integrated gradients on its token embeddings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from captum.attr import IntegratedGradients
from torch import Tensor

from feats.encoders.base import TextSide
from modeling.explanations.maps import as_array
from modeling.explanations.perturbing import BATCH, PerturbedText

TOLERANCE = 1e-3  # of the log-odds: what may be missing of their difference to the baseline
FIRST_STEPS, MOST_STEPS = 16, 1024


@dataclass(frozen=True)
class Completeness:
    """How well attributions add up: their sum, and the target's log-odds less the baseline's, which it should be."""

    steps: int
    total: float
    difference: float

    @property
    def error(self) -> float:
        """What is missing or too much."""
        return abs(self.total - self.difference)

    @property
    def complete(self) -> bool:
        """Within `TOLERANCE`."""
        return self.error <= TOLERANCE


def integrated_gradients(text: PerturbedText) -> tuple[np.ndarray, Completeness]:
    """Integrated gradients of the target's log-odds by words, (U,), and how complete they are.

    Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, ICML 2017. The path goes straight from the
    embedded text, as it enters the first block, to the same with padding in place of each word's tokens; a word's
    figure is the sum of its tokens'. Gauss-Legendre steps are doubled from `FIRST_STEPS` until the sum of all is the
    difference of the log-odds to `TOLERANCE`, up to `MOST_STEPS`.
    """
    model, side = text.model, text.model.text_side(text.part)
    blocks = side.blocks
    assert blocks is not None and side.padding is not None
    ids = side.tokenize([text.text])[0].ids
    words = word_tokens(side, text.text, text.spans, ids)

    def log_odds(embedded: Tensor) -> Tensor:
        repeated = [ids] * len(embedded)
        return text.log_odds_of(model.with_lengths(blocks.above(embedded, repeated, 0), repeated))

    with torch.no_grad():
        embedded = blocks.below([ids], 0)
        baseline = embedded.clone()
        empty = blocks.below([padded(ids, words, side.padding)], 0)
        for low, high in words:  # special tokens stay, also where a network numbers positions by what is no padding
            baseline[:, low:high] = empty[:, low:high]
        difference = float(log_odds(embedded) - log_odds(baseline))
    of_tokens, completeness = _until_complete(log_odds, embedded, baseline, difference)
    return np.array([of_tokens[low:high].sum() for low, high in words]), completeness


def _until_complete(
    log_odds: Callable[[Tensor], Tensor], embedded: Tensor, baseline: Tensor, difference: float
) -> tuple[np.ndarray, Completeness]:
    """Attributions by tokens (L,)."""
    gradients, steps = IntegratedGradients(log_odds), FIRST_STEPS
    while True:
        found = gradients.attribute(embedded, baseline, n_steps=steps, internal_batch_size=BATCH)
        of_tokens = as_array(found.double().sum(-1)[0])
        completeness = Completeness(steps, float(of_tokens.sum()), difference)
        if completeness.complete or steps >= MOST_STEPS:
            return of_tokens, completeness
        steps *= 2


def padded(ids: Any, words: Sequence[tuple[int, int]], padding: int) -> Any:
    """Token ids, a list or an array, with `padding` in place of every word's."""
    changed = ids.copy()
    for low, high in words:
        changed[low:high] = [padding] * (high - low)
    return changed


def word_tokens(side: TextSide, text: str, spans: Sequence[tuple[int, int]], ids: Any) -> list[tuple[int, int]]:
    """Which tokens are each word's, from where to where; none of a word behind the encoder's limit.

    Found by what the text up to each word's end is tokenised to, which needs to know nothing of the tokenizer: what
    that shares with the whole text's beginning is the words' so far. A token across two words is the second's.
    """
    empty, *beginnings = side.tokenize(["", *(text[:high] for _, high in spans)])
    end = len(ids) - _shared(empty.ids[::-1], ids[::-1])
    bounds = [min(_shared(empty.ids, ids), end)]
    for beginning in beginnings:
        bounds.append(max(bounds[-1], min(_shared(beginning.ids, ids), end)))
    return list(zip(bounds, bounds[1:]))


def _shared(a: Any, b: Any) -> int:
    """How many ids two sequences begin with alike."""
    count = min(len(a), len(b))
    return next((k for k in range(count) if a[k] != b[k]), count)
