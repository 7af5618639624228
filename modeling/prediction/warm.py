"""Runs and their encoders kept in memory: raw pairs are predicted as they come, several at once where several wait."""

import feats.threads  # noqa: F401

# isort: split

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from feats.acceleration import resolve_device
from feats.encoders.base import Encoder
from feats.errors import RowError, UsageError
from feats.extraction.encode import encode_prepared
from feats.extraction.plan import Plan, make_plan
from feats.extraction.preparation import Images, Texts, prepare_texts
from feats.images import as_rgb, decode_image, read_image
from feats.records import Record
from feats.source import SIDES
from feats.strings import Labels, Strings
from modeling.choices import TIE, VoteSettings
from modeling.features.joined import FeatureSet, Ragged, Rows
from modeling.prediction.cached import combine
from modeling.prediction.raw_pairs import SPLIT, as_trained, encoder_for, wanted_caches
from modeling.runs.folder import load_run
from modeling.runs.run import Run

Picture = Path | str | bytes | Image.Image | None  # a file, its bytes, or the picture itself
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class BatchSettings:
    """Pairs that wait together are encoded together: at most `size`, the first of them waiting `delay` seconds for
    others."""

    size: int = 16
    delay: float = 0.005


@dataclass(frozen=True)
class Answer:
    """What the runs say of a pair: its class, and each class's probability (the share of votes under majority)."""

    label: str
    probabilities: dict[str, float]


class _Waiting(NamedTuple):
    picture: Picture
    text: str | None
    answer: Future[Answer]


class WarmPredictor:
    """One run or several that vote, loaded once with the encoders of their caches. Usable from any thread.

    A pair's probabilities are those of the same pair encoded by the ordinary extraction; of pairs in one batch they may
    differ in the last bits, as an encoder's products do.

        with WarmPredictor("saved/runs/mine") as predictor:
            [answer] = predictor.predict_pairs([("x.jpg", "so happy")])
    """

    def __init__(
        self,
        runs: Run | Path | str | Sequence[Run],
        *,
        voting: VoteSettings = VoteSettings(),
        weights: Mapping[str, str] = {},
        device: torch.device | str = "auto",
        batches: BatchSettings = BatchSettings(),
    ):
        """Load everything and predict once. `weights` gives a cache's encoder a file or folder.

        Raises `UsageError` for what is no run, an encoder that can't be loaded as the run's caches say, runs that want
        different ones under one name, an unknown `tie`, and a device that can't be used."""
        if isinstance(runs, (Path, str)):
            runs = load_run(runs)
        loaded = [runs] if isinstance(runs, Run) else list(runs)
        device = resolve_device(device) if isinstance(device, str) else device
        self.classes = loaded[0].classes
        if voting.tie is not None and voting.tie not in self.classes:
            raise UsageError(f"`tie` {voting.tie}: no such class; there are {', '.join(self.classes)}")
        tie = voting.tie or (TIE if TIE in self.classes else None)
        self._vote, self._tie = voting.vote, None if tie is None else self.classes.index(tie)
        self.plans = _plans(loaded, weights, device)
        self.runs = [run.to(device) for run in loaded]
        self.device, self.batches = device, batches
        self._at_work = Lock()
        self._waiting: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._closed = False
        # The first forward pass takes several times as long as the next ones.
        self.predict_pairs([(Image.new("RGB", (8, 8)), "a")])
        self._worker = Thread(target=self._work, name="warm-predictor", daemon=True)
        self._worker.start()

    def __enter__(self) -> "WarmPredictor":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def encoders(self) -> dict[str, Encoder]:
        """By cache."""
        return {name: plan.encoder for name, plan in self.plans.items()}

    def predict_pairs(self, pairs: Sequence[tuple[Picture, str | None]]) -> list[Answer]:
        """What the runs say of each pair, in batches in the given order. Of a side that no run reads, None will do.

        Raises `RowError` with the reason for the first pair that can't be encoded."""
        answers = []
        for low in range(0, len(pairs), self.batches.size):
            for k, answer in enumerate(self._predict(pairs[low : low + self.batches.size]), low):
                if isinstance(answer, RowError):
                    raise RowError(f"pair {k}: {answer}" if len(pairs) > 1 else str(answer))
                answers.append(answer)
        return answers

    def submit(self, picture: Picture, text: str | None) -> Future[Answer]:
        """A pair's answer as soon as it is there, together with what others submit at the same time. The future raises
        `RowError` with the reason for a pair that can't be encoded. Raises `RuntimeError` after `close`."""
        if self._closed:
            raise RuntimeError("this predictor is closed")
        answer: Future[Answer] = Future()
        self._waiting.put(_Waiting(picture, text, answer))
        return answer

    def close(self) -> None:
        """Answer what waits, then take no more."""
        if not self._closed:
            self._closed = True
            self._waiting.put(None)
        self._worker.join()

    # -- batches -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        going_on = True
        while going_on:
            batch, going_on = self._next_batch()
            batch = [one for one in batch if one.answer.set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                found = self._predict([(one.picture, one.text) for one in batch])
            except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
                for one in batch:
                    one.answer.set_exception(error)
                continue
            for one, answer in zip(batch, found, strict=True):
                if isinstance(answer, RowError):
                    one.answer.set_exception(answer)
                else:
                    one.answer.set_result(answer)

    def _next_batch(self) -> tuple[list[_Waiting], bool]:
        """What waits, and whether more may come."""
        first = self._waiting.get()
        if first is None:
            return [], False
        batch, until = [first], time.monotonic() + self.batches.delay
        while len(batch) < self.batches.size:
            try:
                one = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                break
            if one is None:
                return batch, False
            batch.append(one)
        return batch, True

    # -- from pairs to answers ---------------------------------------------------------------------------------

    def _predict(self, pairs: Sequence[tuple[Picture, str | None]]) -> list[Answer | RowError]:
        """The answer to each pair of a batch, or why there is none."""
        with self._at_work:
            records = [Record(str(k), None, _text(text)) for k, (_, text) in enumerate(pairs)]
            errors, prepared = self._prepare(pairs, records)
            arrays = {}
            for name, plan in self.plans.items():
                own = _for(plan, records, prepared[name])
                block = encode_prepared(own, np.arange(len(records)), iter(prepared[name]))
                arrays[name] = block.arrays
                for record, reason in block.reasons.items():
                    errors.setdefault(int(record), f"{name}: {reason}")
            probabilities, predicted = self._say(arrays, len(records))
        answers: list[Answer | RowError] = []
        for k, (of_row, best) in enumerate(zip(probabilities.tolist(), predicted.tolist(), strict=True)):
            if k not in errors and not np.isfinite(of_row).all():
                errors[k] = "the probabilities aren't finite; train again"
            found = Answer(self.classes[best], dict(zip(self.classes, of_row, strict=True)))
            answers.append(RowError(errors[k]) if k in errors else found)
        return answers

    def _prepare(
        self, pairs: Sequence[tuple[Picture, str | None]], records: Sequence[Record]
    ) -> tuple[dict[int, str], dict[str, list[Texts | Images]]]:
        """Why pairs can't be encoded, by their number; and by cache what its encoder is run on."""
        pixels = {
            name: torch.zeros(len(records), 1, *side.blank().shape, dtype=torch.uint8)
            for name, encoder in self.encoders.items()
            if (side := encoder.image) is not None
        }
        errors: dict[int, str] = {}
        for row, (picture, text) in enumerate(pairs):
            lacking = self._lacking(picture, text)
            if lacking:
                errors[row] = lacking
            elif pixels:
                # One picture at a time: decoded ones may be large.
                try:
                    image = _decoded(picture)
                    for name, of_cache in pixels.items():
                        of_cache[row, 0] = self.encoders[name].image_side().to_bytes(image)
                except RowError as error:
                    errors[row] = str(error)
        prepared: dict[str, list[Texts | Images]] = {}
        for name, plan in self.plans.items():
            prepared[name] = (
                [] if plan.encoder.text is None else [prepare_texts(plan.encoder.text, records, plan.text_clean)]
            )
            if name in pixels:
                prepared[name] += [_images(chunk) for chunk in pixels[name].split(plan.batch_size)]
        return errors, prepared

    def _lacking(self, picture: Picture, text: str | None) -> str:
        """What a run reads and isn't given, or can't be read; '' if all is there."""
        for side, given in (("image", picture), ("text", text)):
            read = list(dict.fromkeys(name for run in self.runs for name in run.source.of(side)))
            if read and given is None:
                return f"no {side}, which {', '.join(read)} reads"
        if text is not None and not _is_unicode(text):
            return "the text holds a lone surrogate"
        return ""

    def _say(self, arrays: Mapping[str, Arrays], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities (N, C) and predictions (N,), by the classes of the first run."""
        votes = np.empty((len(self.runs), count, len(self.classes)))
        for run, own in zip(self.runs, votes, strict=True):
            said = run.probabilities(_features(run, arrays, count).to(self.device))
            own[:] = said[:, [run.classes.index(name) for name in self.classes]]
        return combine(votes, np.ones(votes.shape[:2], bool), self._vote, self._tie)


def _plans(runs: Sequence[Run], weights: Mapping[str, str], device: torch.device) -> dict[str, Plan]:
    """For each cache that any run reads, its encoder and how it encodes: the plan of an extraction of no rows."""
    plans = {}
    for name, run in wanted_caches(runs, weights).items():
        encoder = encoder_for(name, run, runs, weights.get(name), device)
        plans[name] = make_plan(encoder, [], as_trained(name, run, 1))
    return plans


def _for(plan: Plan, records: Sequence[Record], prepared: Sequence[Texts | Images]) -> Plan:
    """The plan with these rows in place of its own: with token vectors each text has room for its own."""
    counts = None
    if "text_tokens" in plan.features:
        counts = np.array([t.length for t in prepared[0].tokens], np.int64) if isinstance(prepared[0], Texts) else None
    return replace(plan, records=records, token_counts=counts, texts=None)


def _text(text: str | None) -> str | None:
    """What can be encoded: other texts are refused, but stand in a batch until then."""
    return "" if text is not None and not _is_unicode(text) else text


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _decoded(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return as_rgb(picture)
    if isinstance(picture, bytes):
        if not picture:
            raise RowError("picture file is empty")
        return decode_image(picture)
    return read_image(None if picture is None else Path(picture))[0]


def _images(pixels: torch.Tensor) -> Images:
    """One batch of pictures; what can't be shown was noted before."""
    return Images(pixels, np.zeros(len(pixels), np.uint64), np.zeros(len(pixels), np.int64), {})


def _features(run: Run, arrays: Mapping[str, Arrays], count: int) -> FeatureSet:
    """What encoders made of a batch, as if it were joined from the run's caches."""

    def of(dataset: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(arrays[name][dataset]) for name in names if dataset in arrays[name]}

    unknown = np.zeros(count, np.uint64)
    rows = Rows(Strings.of(map(str, range(count))), Labels.of([""] * count), unknown, unknown)
    image, text = (run.source.of(side) if run.source.tokens else () for side in SIDES)
    return FeatureSet(
        split=SPLIT,
        rows=rows,
        image=of("image_feats", run.source.image),
        text=of("text_feats", run.source.text),
        views={},
        image_tokens=of("image_tokens", image),
        text_tokens={
            name: Ragged(values, _offsets(arrays[name]["n_tokens"])) for name, values in of("text_tokens", text).items()
        },
        source=run.source,
        left_out={},
        dataset=rows,
    )


def _offsets(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
