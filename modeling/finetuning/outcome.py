"""What a finetuning leaves: a run of the usual kind, with encoders of its own, and the comparison with its start."""

import resource
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feats.acceleration import dtype_name
from feats.encoders.saved import save_encoder
from feats.errors import UsageError
from feats.extraction.plan import fingerprint_of
from feats.extraction.settings import ExtractionSettings
from feats.store import SIDES
from modeling.evaluation import metrics
from modeling.experiment import TEMPERATURES, protocol, split_figures
from modeling.features.joined import FeatureSource
from modeling.finetuning.settings import TuneSettings
from modeling.finetuning.starts import Start
from modeling.finetuning.tuning import Tuned
from modeling.heads.base import ablation_words
from modeling.runs.folder import save_run
from modeling.runs.run import OWN_CACHES, Finetuned, Report, Run


@dataclass(frozen=True)
class Predicted:
    """Logits (n, C) of the tuned model: of the test rows, where the split has some, and of the validation rows with
    one side removed, by what is left (see `heads.base.ablation_words`)."""

    test: np.ndarray | None
    ablated: Mapping[str, np.ndarray]


def save_tuned(
    start: Start,
    tuned: Tuned,
    predicted: Predicted,
    settings: TuneSettings,
    path: Path,
    work: Path,
    *,
    numbered: bool = True,
    command: str | None = None,
    facts: Mapping[str, Any] = {},
) -> Run:
    """Write the run folder of a finetuned model; returns the run as it lies there. `work` is the finetuning's working
    folder. Raises as `save_run`."""
    names = list(start.model.encoders)
    folder = work / "encoders"
    shutil.rmtree(folder, ignore_errors=True)  # of a finetuning that was interrupted just here
    places = {name: f"encoders/{name.replace('/', '-')}" for name in names}
    if len(set(places.values())) < len(names):
        raise UsageError(f"caches {', '.join(names)} are too alike to be folders; rename one")
    digests = {name: save_encoder(start.model.encoders[name], work / place) for name, place in places.items()}
    source = _source(start, digests, path)
    labels = start.experiment.labels(start.split.val)
    temperature = metrics.fit_temperature(tuned.val_logits, labels, TEMPERATURES)
    head = start.model.head.cpu().eval()
    member = replace(
        start.member,
        config=settings.as_train_config(start.member.config.head),
        head=head,
        temperature=temperature,
        best_epoch=tuned.epoch,
        facts={"chosen": tuned.chosen, "tried": tuned.tried},
    )
    kept = {**facts, **asdict(settings), "trained_parameters": tuned.trained_parameters, "chosen": tuned.chosen}
    pairs = start.records
    finetuned = Finetuned(places, str(pairs.data.resolve()), pairs.layout, kept)
    counts = start.experiment.training_rows()
    run = Run(start.experiment.classes, [member], source, start.split, counts, finetuned=finetuned)
    run = replace(run, report=_report(start, tuned, predicted, temperature, settings))
    return save_run(run, path, numbered=numbered, command=command, encoders=folder)


def _source(start: Start, digests: Mapping[str, str], path: Path) -> FeatureSource:
    """The caches that the tuned encoders would make."""
    fingerprints = {}
    for name, encoder in start.model.encoders.items():
        of_rows = fingerprint_of(encoder, start.records, ExtractionSettings(text_clean=start.cleaning[name]))
        dtype = dtype_name(start.model.autocast.get(name, torch.float32))
        fingerprints[name] = {**of_rows, "weights_sha256": digests[name], "dtype": dtype}
    image, text = (tuple(start.model.preprocessing.caches[side]) for side in SIDES)
    tokens = any("_tokens/" in key for key in start.model.preprocessing.normalizers)
    return FeatureSource(path / OWN_CACHES, image, text, tokens, fingerprints)


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
    found["training_rows"] = experiment.training_rows()
    history = [{"fold": "", "seed": settings.seed, **row} for row in tuned.history]
    tags = experiment.features.tags_of(split.val)
    return Report(split.val, tags, metrics.softmax(tuned.val_logits, temperature), found, history)


# -- tables -----------------------------------------------------------------------------------------------------


def against_start(start: Start, frozen: Report, tuned: Report, monitor: str) -> str:
    """The tuned model and the frozen head it began with on the same rows: test rows where there are some, else the
    validation rows that also chose the epoch, said so. A paired bootstrap tells whether they differ."""
    labels = start.experiment.labels(start.split.val)
    both = np.stack([report.probabilities.argmax(1) for report in (frozen, tuned)])
    figure = monitor if monitor in metrics.AVERAGES else "accuracy"
    drawn = metrics.resampled(labels, both, len(start.experiment.classes), figure)
    columns = ["val", *metrics.AVERAGES]
    rows = [{"val": name, **report.figures["val"]} for name, report in (("frozen head", frozen), ("tuned", tuned))]
    difference = rows[1][figure] - rows[0][figure]
    low, high = np.quantile(drawn[:, 1] - drawn[:, 0], [0.025, 0.975])
    return (
        f"{metrics.format_table(rows, columns)}\n\n{figure} of the tuned model {difference:+.3f} to its frozen head's, "
        f"95 % {low:+.3f} to {high:+.3f}, p {metrics.two_sided_p(drawn[:, 1] - drawn[:, 0]):.3f} (paired bootstrap, "
        f"{len(labels)} validation rows, by which both also chose)"
    )


def ablation_table(run: Run) -> str:
    """The trained model's validation figures with both sides, and with one of them removed."""
    assert run.report is not None
    figures = run.report.figures
    rows = [{"test-time ablation": words, **found} for words, found in figures["ablation_eval"].items()]
    rows.insert(0, {"test-time ablation": ablation_words(SIDES), **figures["val"]})
    return metrics.format_table(rows, ["test-time ablation", "n", *metrics.AVERAGES])


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: the GPU's, or on a CPU all of it, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
