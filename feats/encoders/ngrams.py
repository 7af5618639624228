"""Hashed character n-grams of a text: no weights, nothing fitted, any language, hashtags and emoji as they are.

Weinberger et al., Feature Hashing for Large Scale Multitask Learning, ICML 2009.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import normalize

from feats.encoders.base import Encoder, Features, Loading, TextSide, Tokens
from feats.errors import UsageError

LENGTHS = (2, 5)  # of the n-grams, in characters; a word has a blank before and after it
MAX_CHARACTERS = 10_000  # up to four n-grams each
MAX_COLUMNS = 65_536  # rows are dense
PROBE = "Déjà vu: a GOOD day, #sunny 😀!"


def load(model: str, weights: str | None, how: Loading, *, columns: int) -> Encoder:
    """Make the encoder: the text's character n-grams hashed into `columns`, (B, columns) float32.

    The text is lower-cased; of each word with a blank on either side, every 2 to 5 neighbouring characters are an
    n-gram. The 32-bit hash h of its UTF-8 bytes (MurmurHash3, seed 0) adds +1 (h >= 0) or -1 to column |h| mod
    `columns`. A column's sum v becomes sign(v) log(1 + |v|), and the row is scaled to length one. A text without any
    character has no n-grams: its row is zeros, and that is its true encoding, as in VADER.

    Nothing is computed in `how.dtype`: the encoder's is float32. Raises `UsageError` for another model name, for
    weights (there are none), for tokens (there are no token vectors) and for `columns` outside 1 ... `MAX_COLUMNS`.
    """
    if model != "ngrams":
        raise UsageError(f"unknown model {model!r}; there is ngrams")
    if weights is not None or how.expected_sha256 is not None:
        raise UsageError(
            f"hashing n-grams takes no weights, but got {weights or how.expected_sha256}; leave out `weights`"
        )
    if how.tokens:
        raise UsageError("hashed n-grams have no token features; leave out `tokens`")
    if not 1 <= columns <= MAX_COLUMNS:
        raise UsageError(f"`hash_columns` {columns}: expected a number from 1 to {MAX_COLUMNS}")
    vectorizer = HashingVectorizer(
        analyzer="char_wb", ngram_range=LENGTHS, n_features=columns, lowercase=True, alternate_sign=True, norm=None
    )

    def forward(texts: list[str]) -> Features:
        sums = vectorizer.transform(texts)  # sparse, float64
        sums.data = np.sign(sums.data) * np.log1p(np.abs(sums.data))
        return {"feats": torch.from_numpy(normalize(sums).astype(np.float32).toarray()).to(how.device)}

    return Encoder(
        identity={
            "model": "ngrams",
            "analyzer": "char_wb, lower case",
            "ngram_range": list(LENGTHS),
            "columns": columns,
            "hash": "murmurhash3, signed",
            "weighting": "sign(v) log(1 + |v|), normalised",
            "max_length": MAX_CHARACTERS,
            "probe_sha256": _probe_sha256(vectorizer),
        },
        loading=replace(how, dtype=torch.float32),
        text=TextSide(tokenize=tokenize, forward=forward),
    )


def tokenize(texts: Sequence[str]) -> list[Tokens]:
    """The texts' first `MAX_CHARACTERS` characters. The length is their number, at least 1."""
    return [
        Tokens(text[:MAX_CHARACTERS], min(max(len(text), 1), MAX_CHARACTERS), len(text) > MAX_CHARACTERS)
        for text in texts
    ]


def _probe_sha256(vectorizer: HashingVectorizer) -> str:
    """What scikit-learn makes of one text. It tells apart versions that split or hash differently, and only those."""
    sums = vectorizer.transform([PROBE]).toarray()[0]
    return hashlib.sha256(json.dumps(sums.astype(int).tolist()).encode()).hexdigest()
