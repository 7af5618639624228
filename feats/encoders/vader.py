"""VADER, a lexicon and rules for sentiment in social media text; everything comes inside the package.

Hutto & Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import vaderSentiment.vaderSentiment
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from feats.encoders.base import Encoder, Features, Loading, TextSide, Tokens
from feats.encoders.weights import sha256_of
from feats.errors import UsageError

SCORES = ("pos", "neu", "neg", "compound")
MAX_WORDS = 1000  # the analyser's time grows with the square of their number
LEXICONS = ("vader_lexicon.txt", "emoji_utf8_lexicon.txt")


def load(model: str, weights: str | None, how: Loading) -> Encoder:
    """Load VADER: the scores pos, neu, neg in [0, 1] and compound in [-1, 1] of the raw text, (B, 4) float32.

    Nothing is computed in `how.dtype`: the encoder's is float32. Raises `UsageError` for another model name, for
    `weights` (the package has its own) and for tokens (there are no token vectors).
    """
    if model != "vader":
        raise UsageError(f"unknown model {model!r}; there is vader")
    if weights is not None:
        raise UsageError(f"VADER brings its own lexicon and takes no weights, but got {weights}; leave out `weights`")
    if how.tokens:
        raise UsageError("VADER has no token features; leave out `tokens`")
    folder = Path(vaderSentiment.vaderSentiment.__file__).parent
    digest = hashlib.sha256("".join(sha256_of(folder / name) for name in LEXICONS).encode()).hexdigest()
    if how.expected_sha256 not in (None, digest):
        raise UsageError(f"{folder} holds other lexicons (weights_sha256 {digest}, expected {how.expected_sha256})")
    analyzer = SentimentIntensityAnalyzer()

    def forward(texts: list[str]) -> Features:
        scores = [analyzer.polarity_scores(text) for text in texts]
        return {"feats": torch.tensor([[score[name] for name in SCORES] for score in scores], device=how.device)}

    return Encoder(
        identity={
            "model": "vader",
            "version": version("vaderSentiment"),
            "max_length": MAX_WORDS,
            "weights_sha256": digest,
        },
        loading=replace(how, dtype=torch.float32),
        text=TextSide(tokenize=tokenize, forward=forward),
    )


def tokenize(texts: Sequence[str]) -> list[Tokens]:
    """The texts' first `MAX_WORDS` words: the analyser splits them itself. The length is their number, at least 1."""
    return [_one(text) for text in texts]


def _one(text: str) -> Tokens:
    words = text.split(maxsplit=MAX_WORDS)
    if len(words) <= MAX_WORDS:
        return Tokens(text, max(len(words), 1))
    return Tokens(" ".join(words[:MAX_WORDS]), MAX_WORDS, truncated=True)
