"""What a finetuning leaves: a run of the usual kind, with encoders of its own, and the comparison with its start."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feats.acceleration import dtype_name
from feats.encoders.saved import save_encoder
from feats.errors import UsageError
from feats.extraction.plan import fingerprint_of
from feats.extraction.settings import ExtractionSettings
from feats.source import SIDES
from modeling.choices import FEATS
from modeling.evaluation import metrics, text_tables
from modeling.experiments.measuring import TEMPERATURES, protocol, split_figures
from modeling.features.corrections import corrected_words
from modeling.features.joined import FeatureSource
from modeling.finetuning.data import TuneData, without
from modeling.finetuning.distributed import Team
from modeling.finetuning.lora import has_attention
from modeling.finetuning.model import hidden_of_nothing
from modeling.finetuning.predicting import predict
from modeling.finetuning.settings import TuneSettings
from modeling.finetuning.starts import Start, contents_of
from modeling.finetuning.tuning import Tuned
from modeling.heads.config import ablation_words
from modeling.runs.config import read_config
from modeling.runs.folder import load_run, read_report, run_name, save_run
from modeling.runs.listing import list_runs
from modeling.runs.run import OWN_CACHES, Finetuned, Report, Run
from modeling.runs.tables import ablation_tables, report_tables


@dataclass(frozen=True)
class Predicted:
    """Logits (n, C) of the tuned model: of the test rows, where the split has some, and of the validation rows with
    one side removed, by what is left (see `heads.config.ablation_words`)."""

    test: np.ndarray | None
    ablated: Mapping[str, np.ndarray]


def save_tuned(
    start: Start,
    tuned: Tuned,
    predicted: Predicted,
    settings: TuneSettings,
    runs: Path,
    work: Path,
    *,
    name: str | None = None,
    command: str | None = None,
    options: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] = {},
) -> Run:
    """Write the run of a finetuned model into the folder `runs`, as `name` or as its settings say; returns the run as
    it lies there. `work` is the finetuning's working folder. Raises as `save_run`."""
    names = [name for name, encoder in start.model.encoders.items() if encoder.save is not None]
    folder = work / "encoders"
    shutil.rmtree(folder, ignore_errors=True)  # of a finetuning that was interrupted just here
    places = {name: f"encoders/{name.replace('/', '-')}" for name in names}
    if len(set(places.values())) < len(names):
        raise UsageError(f"caches {', '.join(names)} are too alike to be folders; rename one")
    for cache in names:
        start.model.encoders[cache].text_clean = start.cleaning[cache]
    digests = {name: save_encoder(start.model.encoders[name], work / place) for name, place in places.items()}
    folder.mkdir(exist_ok=True)  # where nothing is learned there is none
    source = _source(start, digests, runs)
    labels = start.experiment.labels(start.split.val)
    temperature = metrics.fit_temperature(tuned.val_logits, labels, TEMPERATURES)
    head = start.model.head.cpu().eval()
    member = replace(
        start.member,
        config=settings.as_train_config(start.member.config.head),
        head=head,
        temperature=temperature,
        best_epoch=tuned.epoch,
        epochs=tuned.history[-1]["epoch"],
        facts={"chosen": tuned.chosen, "tried": tuned.tried},
    )
    kept = {**facts, **asdict(settings), "trained_parameters": tuned.trained_parameters, "chosen": tuned.chosen}
    pairs = start.records
    finetuned = Finetuned(places, str(Path(pairs.data).resolve()), pairs.layout, kept, pairs.columns)
    counts = start.experiment.training_rows()
    corrections = dict(start.experiment.features.corrections)
    classes = start.experiment.classes
    run = Run(classes, [member], source, start.split, counts, finetuned=finetuned, corrections=corrections)
    run = replace(run, target=start.experiment.features.target)
    cost = {name: facts[name] for name in ("seconds", "peak_bytes") if name in facts}
    cost["device"] = str(start.model.device)
    run = replace(run, report=_report(start, tuned, predicted, temperature, settings), cost=cost)
    path = runs / (name or run_name(run, label=f"{start.member.config.head.head}_tuned"))
    return save_run(run, path, numbered=True, command=command, options=options, encoders=folder)


def _source(start: Start, digests: Mapping[str, str], runs: Path) -> FeatureSource:
    """The caches that the tuned encoders would make."""
    fingerprints = {}
    for name, encoder in start.model.encoders.items():
        of_rows = fingerprint_of(encoder, start.records, ExtractionSettings(text_clean=start.cleaning[name]))
        dtype = dtype_name(start.model.autocast.get(name, torch.float32))
        fingerprints[name] = {**of_rows, "dtype": dtype}
        if name in digests:
            fingerprints[name]["weights_sha256"] = digests[name]
    image, text = (tuple(start.model.preprocessing.caches[side]) for side in SIDES)
    tokens = any("_tokens/" in key for key in start.model.preprocessing.normalizers)
    counted = {name: encoder.parameters for name, encoder in start.model.encoders.items()}
    return FeatureSource(runs / OWN_CACHES, image, text, tokens, fingerprints, parameters=counted)


def _report(start: Start, tuned: Tuned, predicted: Predicted, temperature: float, settings: TuneSettings) -> Report:
    experiment, split = start.experiment, start.split
    majority = experiment.majority(split)

    def figures(ids: Sequence[str], logits: np.ndarray) -> dict[str, Any]:
        raw, calibrated = metrics.softmax(logits), metrics.softmax(logits, temperature)
        return split_figures(experiment, ids, raw, calibrated, majority)

    found: dict[str, Any] = {"val": figures(split.val, tuned.val_logits)}
    if predicted.test is not None:
        found["test"] = figures(split.test, predicted.test)
    if predicted.ablated:
        found["ablation_eval"] = {words: figures(split.val, logits) for words, logits in predicted.ablated.items()}
    found["members"] = {"count": 1, "mean_std": metrics.mean_std([found["val"]])}
    found["protocol"] = f"{protocol(experiment)}; {tuned.chosen}, and temperature, chosen on the validation rows"
    found |= {"training_rows": experiment.training_rows(), "validation_rows": experiment.validation_rows()}
    found["leaks"] = experiment.leaks.as_json()
    history = [{"fold": "", "seed": settings.seed, **row} for row in tuned.history]
    tags = experiment.features.tags_of(split.val)
    probabilities = metrics.softmax(tuned.val_logits, temperature)
    test = None
    if predicted.test is not None:
        test = (split.test, experiment.features.tags_of(split.test), metrics.softmax(predicted.test, temperature))
    return Report(split.val, tags, probabilities, found, history, test)


def predicted_of(start: Start, data: TuneData, settings: TuneSettings, team: Team, ablated: bool) -> Predicted:
    """What the tuned model says beyond its validation rows; `ablated`: of these with one side removed, too."""
    model, reader = start.model, data.reader
    reader.fill(data.test)
    at_once = settings.rows_to_predict
    test = predict(model, reader, data.test, team, at_once=at_once) if data.test else None
    found = {}
    sides = [side for side in SIDES if model.preprocessing.caches[side]]
    if ablated and len(sides) == 2:
        for side in sides:
            hidden = hidden_of_nothing(model, side)
            left = ablation_words(tuple(other for other in SIDES if other != side))
            change = partial(without, side=side, reader=reader, hidden=hidden)
            found[left] = predict(model, reader, data.val, team, change, at_once)
    return Predicted(test, found)


def what_is_tuned(start: Start, settings: TuneSettings, hard: Sequence[str] = ()) -> dict[str, Any]:
    """All that decides what a finetuning comes to, as JSON values: another one mustn't go on from its checkpoints."""
    ids = json.dumps([start.split.train, start.split.val, start.split.test], default=list)
    head = b"".join(tensor.cpu().numpy().tobytes() for tensor in start.model.head.state_dict().values())
    free = ("micro_bs", "checkpoint_steps")  # how it fits into memory, and how it is kept
    preprocessing = start.model.preprocessing
    what = {
        "settings": {name: value for name, value in asdict(settings).items() if name not in free},
        "device": start.model.device.type,
        "dtypes": {name: dtype_name(dtype) for name, dtype in start.model.autocast.items()},
        "features": {"caches": preprocessing.caches, "scales": preprocessing.scales, "norms": preprocessing.kinds},
        "contents": contents_of(start),
        "head": asdict(start.member.config.head),
        "head_sha256": hashlib.sha256(head).hexdigest(),
        "encoders": {name: encoder.identity for name, encoder in start.model.encoders.items()},
        "cleaning": start.cleaning,
        "split_sha256": hashlib.sha256(ids.encode()).hexdigest(),
        "hard": list(hard),
    }
    copy: dict[str, Any] = json.loads(json.dumps(what))
    return copy


def finished_run(runs: Path, digest: str, name: str | None) -> Run | None:
    """The run that a finetuning of this digest left, under this name where it has one, if it did."""
    for path in list_runs(runs):
        finetuned = read_config(path).get("finetuned")
        named = name is None or re.fullmatch(rf"{re.escape(name)}(-\d+)?", path.name)
        if named and finetuned and finetuned["facts"].get("digest") == digest:
            return load_run(path)
    return None


def notes_of(start: Start, settings: TuneSettings, ablation_eval: bool) -> list[str]:
    """What of the settings does nothing for this model, and which labels are corrected."""
    corrected = corrected_words(start.experiment.features, start.experiment.splits)
    notes = [f"note: {corrected}; the caches keep theirs"] if corrected else []
    if settings.lora is not None:
        plain = [part for part, side in start.model.sides.items() if side.network is not None]
        frozen = [part for part in plain if not has_attention(start.model.parts[part])]
        notes += [f"note: {part} has no attention to adapt, and stays as it is" for part in frozen]
    if ablation_eval and len(start.model.sides) < 2:
        notes.append("note: a model of one side has none to leave out: no test-time ablation")
    return notes


def cache_folder(start: Start) -> Path:
    """Where caches lie: the run's, or the usual place."""
    return FEATS if start.run is None else start.experiment.features.source.folder


# -- tables -----------------------------------------------------------------------------------------------------


def start_line(start: Start) -> str:
    """What is begun with, and on which pairs."""
    begun = "a new model" if start.run is None else f"run {start.run.named}"
    left_out = len(start.experiment.features.left_out)
    return f"{begun} on {len(start.records) - left_out} pairs in {start.records.data}" + (
        f" ({left_out} left out)" if left_out else ""
    )


def model_line(start: Start) -> str:
    """Parameters of each part, and of all, in millions."""
    sizes = {part: sum(p.numel() for p in network.parameters()) for part, network in start.model.parts.items()}
    parts = ", ".join(f"{part} {size / 1e6:.3f} M" for part, size in sizes.items())
    dtypes = sorted({dtype_name(dtype) for dtype in start.model.autocast.values()})
    rows = f"{len(start.split.train)} training and {len(start.split.val)} validation rows"
    return f"model: {sum(sizes.values()) / 1e6:.3f} M parameters ({parts}); {rows}; products in {', '.join(dtypes)}"


def tables(start: Start, run: Run, monitor: str) -> str:
    """The figures of a tuned run: as any run's, with sides removed, and against the frozen head it began with."""
    assert run.report is not None and run.finetuned is not None
    found = [report_tables(run)]
    if "ablation_eval" in run.report.figures:
        found.append(ablation_tables(run))
    if start.run is not None and start.run.path is not None:
        found.append(against_start(start, read_report(start.run.path), run.report, monitor))
    facts = run.finetuned.facts
    found.append(
        f"{facts['trained_parameters'] / 1e6:.3f} M trained parameters, {facts['seconds']:.0f} s, "
        f"peak memory {facts['peak_bytes'] / 1e9:.2f} GB"
    )
    return "\n\n".join(found)


def against_start(start: Start, frozen: Report, tuned: Report, monitor: str) -> str:
    """The tuned model and the frozen head it began with on the same rows: the test part where both have predicted it,
    else the validation rows that also chose both. A paired bootstrap tells whether they differ."""
    part = "test" if frozen.test is not None and tuned.test is not None else "val"
    both = [report.test[2] if part == "test" and report.test else report.probabilities for report in (frozen, tuned)]
    labels = start.experiment.labels(getattr(start.split, part))
    predicted = np.stack([probabilities.argmax(1) for probabilities in both])
    figure = monitor if monitor in metrics.AVERAGES else "accuracy"
    drawn = metrics.resampled(labels, predicted, len(start.experiment.classes), figure)
    differences = drawn[:, 1] - drawn[:, 0]
    both_figures = (("frozen head", frozen.figures[part]), ("tuned", tuned.figures[part]))
    rows = [{part: metrics.marked(name, found.get("collapsed")), **found} for name, found in both_figures]
    low, high = np.quantile(differences, [0.025, 0.975])
    on = f"{len(labels)} {'test rows' if part == 'test' else 'validation rows, by which both were also chosen'}"
    return (
        f"{text_tables.format_table(rows, [part, *metrics.AVERAGES])}\n\n{figure} of the tuned model "
        f"{rows[1][figure] - rows[0][figure]:+.3f} to its frozen head's, 95 % {low:+.3f} to {high:+.3f}, "
        f"p {metrics.two_sided_p(differences):.3f} (paired bootstrap, {on})"
    )
