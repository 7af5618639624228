"""What a report is made from: the run's folder; its caches and its raw pairs, where these are still there."""

import base64
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feats.errors import RowError, UsageError
from feats.images import picture_size, read_reduced
from feats.parts import open_cache
from feats.records import Record
from modeling.features.inputs import Inputs
from modeling.features.joined import FeatureSet
from modeling.features.leaks import Leaks, find_leaks
from modeling.features.loading import load_features
from modeling.runs.config import read_config
from modeling.runs.folder import read_report
from modeling.runs.pairs import DataPlace, records_of
from modeling.runs.run import Member, Report, Run

JPEG_QUALITY = 70


@dataclass(frozen=True)
class Material:
    """Of one saved run. `features` are its training caches' rows, None with `no_features` saying why; `records` its raw
    pairs by id, None with `no_records`."""

    run: Run
    config: Mapping[str, Any]
    report: Report
    features: FeatureSet | None
    no_features: str
    records: Mapping[str, Record] | None
    no_records: str
    command: str = ""  # that makes this page
    tokens: Mapping[str, int] = field(default_factory=dict)  # of each text, by id
    truncated: int = 0

    @property
    def classes(self) -> list[str]:
        """In the run's order."""
        return self.run.classes

    @property
    def member(self) -> Member:
        """The one whose inside is shown."""
        return self.run.members[0]

    @cached_property
    def labels(self) -> np.ndarray:
        """Of the validation rows, (N,) integers."""
        return np.array([self.classes.index(tag) for tag in self.report.tags], np.int64)

    @property
    def probabilities(self) -> np.ndarray:
        """Of the validation rows as they are stored, (N, C)."""
        return self.report.probabilities

    @cached_property
    def right(self) -> np.ndarray:
        """Which validation rows are predicted right, (N,) bool."""
        found: np.ndarray = self.probabilities.argmax(1) == self.labels
        return found

    def text(self, name: str) -> str:
        """A row's raw text, '' where there is none to be had."""
        record = None if self.records is None else self.records.get(name)
        return "" if record is None else record.text or ""

    def leaks(self) -> Leaks | None:
        """What the parts of the split have in common; None without features."""
        return None if self.features is None else find_leaks(self.features, self.run.splits)

    def inputs(self, rows: np.ndarray) -> Inputs:
        """What the first member reads of rows of `features`, by number."""
        assert self.features is not None
        chosen = torch.from_numpy(rows)
        own = self.features.only({"views": ()}).with_tensors(lambda x: x[chosen], lambda x: x.take(chosen))
        return self.member.preprocessing.apply(own).for_head(self.member.config.head)


def gather(run: Run, feats: Path | None = None, data: DataPlace = DataPlace(), command: str = "") -> Material:
    """Read all there is of a saved run. Raises `UsageError` for a damaged run, and for caches or data that were named
    and can't be used; where they are gone and weren't named, the material goes without."""
    config, report = read_config(run.folder), read_report(run.folder)
    features, no_features = _features(run, feats)
    records, no_records = (None, no_features) if features is None else _records(features, data)
    tokens, truncated = ({}, 0) if features is None else _token_counts(features)
    return Material(run, config, report, features, no_features, records, no_records, command, tokens, truncated)


def _features(run: Run, feats: Path | None) -> tuple[FeatureSet | None, str]:
    try:
        source = run.source
        folder = run.feature_folder(feats)
        data = load_features(folder, "train", source.image, source.text, views=False, tokens=source.tokens)
        run.check(data, same_rows=True)
        return run.with_own_labels(data), ""
    except UsageError as error:
        if feats is not None:
            raise
        return None, str(error)


def _records(features: FeatureSet, data: DataPlace) -> tuple[Mapping[str, Record] | None, str]:
    try:
        return {record.id: record for record in records_of(features.source, data)}, ""
    except UsageError as error:
        if data != DataPlace():
            raise
        return None, str(error)


def _token_counts(features: FeatureSet) -> tuple[dict[str, int], int]:
    """Tokens of each text by id and how many texts were cut, by the first text cache that counts any."""
    for name in features.source.text:
        with open_cache(features.source.path(name, features.split)) as store:
            counts, cut = store.facts("n_tokens"), store.facts("truncated")
            if counts.any():
                return dict(zip(store.ids.tolist(), counts.tolist(), strict=True)), int((cut > 0).sum())
    return {}, 0


# -- pictures ---------------------------------------------------------------------------------------------------


def thumbnails(records: Sequence[Record], side: int, budget: int) -> list[str]:
    """A JPEG within `side` x `side` pixels as a data address for each record, in order; '' for pictures that can't be
    read, and for all once `budget` bytes of addresses are full."""
    found: list[str] = []
    spent = 0
    with ThreadPoolExecutor(2) as pool:
        for low in range(0, len(records), 64):
            block = records[low : low + 64]
            if spent >= budget:
                found += [""] * len(block)
                continue
            for address in pool.map(lambda record: _thumbnail(record, side), block):
                spent += len(address)
                found.append(address if spent <= budget else "")
    return found


def _thumbnail(record: Record, side: int) -> str:
    try:
        image = read_reduced(record.image_path, side)
    except RowError:
        return ""
    image.thumbnail((side, side))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def megapixels(record: Record) -> float | None:
    """A picture's size by its header alone; None where it can't be read."""
    try:
        width, height = picture_size(record.image_path)
    except RowError:
        return None
    return width * height / 1e6
