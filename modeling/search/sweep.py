"""A sweep's bookkeeping and its comparison tables."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from feats.csv_files import read_table, write_table
from feats.errors import UsageError, first_line
from feats.json_files import read_json
from feats.source import SIDES
from feats.writing import write_json, write_text
from modeling.evaluation import metrics, text_tables
from modeling.evaluation.paired import optimism_words
from modeling.evaluation.text_tables import spread
from modeling.experiments.experiment import Experiment
from modeling.features.corrections import corrected_words
from modeling.heads.config import ABLATIONS, ablation_number, ablation_words
from modeling.heads.registry import head_class
from modeling.runs.config import PREDICTIONS, is_whole, read_config, read_metrics, train_config
from modeling.runs.entries import read_entry
from modeling.runs.folder import read_predictions
from modeling.runs.tables import collapse_remedy
from modeling.training.config import TrainConfig, flat, settings_read

NAMED = re.compile(r"_[0-9a-f]{10}$")  # how `name_of` ends
SHOWN = 20  # configurations of the whole table that a terminal shows
TABLE = "table.csv"
MARKDOWN = "table.md"
DIVERGED = "diverged.json"
DIVERGED_SHAPE = [{"train": dict, "reason": str}]
SEARCHED = "Searched on "  # how the note on a search on one head begins


def data_digest(experiment: Experiment) -> str:
    """A hash of all that decides a training beside its configuration: split, labels, normalisation, what the caches
    were made of and by, library versions aside."""
    rows, source = experiment.features.rows, experiment.features.source
    fingerprints = {name: {k: v for k, v in f.items() if k != "versions"} for name, f in source.fingerprints.items()}
    decides = [
        [vars(split) for split in experiment.splits],
        experiment.norms,
        experiment.scales,
        source.image,
        source.text,
        fingerprints,
        rows.tags,
        experiment.group_of is not None,
        hashlib.sha256(rows.image_hash.tobytes() + rows.text_key.tobytes()).hexdigest(),
    ]
    corrections = experiment.features.corrections  # rows without features among them, of which tags don't tell
    return _digest([*decides, corrections] if corrections else decides)


def name_of(config: TrainConfig, data: str) -> str:
    """A name that is the same for the same training: what one can read of it, and a hash of everything that decides
    it; `data` is the `data_digest`."""
    head, read = config.head, settings_read(config.head.head)
    shown = {
        "D": f"D{head.D}",
        "sides": f"a{ablation_number(head.sides)}",
        "lr": f"lr{config.lr:g}",
        "bs": f"bs{config.bs}",
    }
    shown["seed"] = f"s{config.seed}"
    parts = [text for name, text in shown.items() if name in read]
    return "_".join([head.head, *parts, _digest([asdict(config), data])[:10]])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()


# -- what a folder holds already --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Earlier:
    """What sweeps before found in a folder: the runs of trainings by name; why those diverged that did; notes."""

    names: dict[TrainConfig, str]
    diverged: dict[TrainConfig, str]
    notes: list[str]


def read_earlier(folder: Path, experiment: Experiment, data: str) -> Earlier:
    """What a folder holds, for a sweep of `experiment`, whose `data_digest` is `data`, that goes on in it. Half runs
    are left out.

    Raises `UsageError` when it holds a sweep on other features, rows or labels than `experiment`'s, or one that another
    version made: their figures don't belong into one table.
    """
    names = dict[TrainConfig, str]()
    for path in sorted(path for path in folder.glob("[!.]*") if NAMED.search(path.name) and is_whole(path)):
        try:
            members = read_config(path)["members"]
            config = train_config(members[0]["train"])
        except (UsageError, KeyError, TypeError, ValueError, AttributeError, IndexError):
            continue
        if name_of(config, data) != path.name:
            raise UsageError(_of_others(folder, path, experiment))
        names[config] = path.name
    remedy = "remove it, or give another `name`"
    told = read_json(folder / DIVERGED, remedy, DIVERGED_SHAPE) if (folder / DIVERGED).exists() else []
    try:
        diverged = {train_config(of["train"]): of["reason"] for of in told}
    except (UsageError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / DIVERGED} is damaged ({first_line(error)}); {remedy}") from None
    known = {config: reason for config, reason in diverged.items() if config not in names}
    try:
        notes = [line for line in read_notes(folder).splitlines() if line.startswith(SEARCHED)]
    except (OSError, ValueError):
        notes = []
    return Earlier(names, known, notes)


def _of_others(folder: Path, path: Path, experiment: Experiment) -> str:
    """Why a run in the folder isn't of this sweep."""
    source, rows = experiment.features.source, len({i for split in experiment.splits for i in split.val})
    here = f"{'+'.join(source.image) or 'none'}, {'+'.join(source.text) or 'none'}; {rows} validation rows"
    try:
        entry = read_entry(path)
        sides = ["+".join(entry.config["features"][side]) or "none" for side in SIDES]
        there = f"{', '.join(sides)}; {entry.n} validation rows"
    except UsageError:
        there = "unknown"
    return (
        f"{folder} holds a sweep on other features, normalisation, rows or labels ({there}; now: {here}), or of "
        "another version: they don't belong into one table; give another `name`"
    )


def write_diverged(folder: Path, diverged: Mapping[TrainConfig, str]) -> None:
    """Keep what diverged, of which there is no run, for sweeps that go on in the folder."""
    told = [{"train": asdict(config), "reason": reason} for config, reason in diverged.items()]
    if told or (folder / DIVERGED).exists():
        write_json(folder / DIVERGED, told)


# -- tables -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """`rows`: one for each configuration (its seeds together), best first. `columns` compare their figures, `details`
    say how they were trained."""

    rows: list[dict[str, Any]]
    columns: list[str]
    details: list[str]
    pivots: dict[str, tuple[list[dict[str, Any]], list[str]]]  # title -> rows, columns
    notes: str
    best: str  # name of the best configuration's first run
    by: str

    @property
    def text(self) -> str:
        """What a terminal shows: the best configurations by the figure that ranks them, the studies' tables and the
        notes."""
        more = len(self.rows) - SHOWN
        k, tests = self.columns.index("seeds"), self.columns.index(metrics.AVERAGES[-1]) + 1
        seeds = sorted({row["seeds"] for row in self.rows if "run" in row})
        own = ["seeds"] if len(seeds) > 1 else []
        rows = [{"#": f"{rank:>2}" if "run" in row else "", **row} for rank, row in enumerate(self.rows[:SHOWN], 1)]
        columns = ["#", *self.columns[:k], *own, self.by, *(name for name in self.columns[tests:] if name != "gain")]
        each = "" if own else f", {seeds[0]} seeds each" if seeds[0] > 1 else ", one seed each"
        title = f"validation rows, best {self.by} first{each}; all figures in table.csv"
        parts = [f"{title}\n\n{text_tables.format_table(rows, columns)}"]
        parts[0] += f"\n... and {more} more in table.csv" if more > 0 else ""
        parts += [f"{title}\n{text_tables.format_table(*pivot)}" for title, pivot in self.pivots.items()]
        return "\n\n".join([*parts, self.notes])

    def write(self, folder: Path, *, safe: bool = False) -> None:
        """table.csv, with every number in full, and table.md; `safe` as in `feats.csv_files.write_rows`."""
        write_table(folder / TABLE, self.rows, safe=safe)
        parts = [text_tables.format_table(rows, columns, markdown=True) for rows, columns in self._of_rows()]
        parts += [
            f"### {title}\n\n{text_tables.format_table(*pivot, markdown=True)}" for title, pivot in self.pivots.items()
        ]
        write_text(folder / MARKDOWN, "\n\n".join([*parts, self.notes]) + "\n")

    def _of_rows(self) -> list[tuple[list[dict[str, Any]], list[str]]]:
        """The two tables of all configurations; the majority class isn't trained."""
        return [(self.rows, self.columns), ([row for row in self.rows if "run" in row], self.details)]


def best_run(folder: Path) -> Path:
    """The first run in a sweep's table: the best configuration's. Raises `UsageError` when there is no table."""
    try:
        return folder / read_table(folder / TABLE)[0]["run"]
    except (OSError, ValueError, IndexError, KeyError):
        raise UsageError(f"no finished sweep in {folder}; make one with python modeling/sweep_heads.py") from None


def read_notes(folder: Path) -> str:
    """What a sweep's tables say of how their figures came about. Raises `OSError` when there are none."""
    return (folder / MARKDOWN).read_text(encoding="utf-8").strip().rpartition("\n\n")[2]


def compare(
    folder: Path,
    configs: Sequence[TrainConfig],
    names: Sequence[str],
    experiment: Experiment,
    monitor: str,
    diverged: Mapping[str, str],
) -> Tables:
    """Read the runs `names` of `configs` in `folder` back and compare them, seeds of one configuration together, on the
    same validation rows, best first by `monitor` (by accuracy, where that is the loss): of that figure, the mean and
    standard deviation over seeds, an interval over rows, and a paired bootstrap against the best.

    A configuration of which a seed `diverged` (why, by name) is left out with all its seeds, since the others would
    flatter it. `gain` is by how much a configuration of both sides betters the better of its single sides, where the
    sweep has both at otherwise equal settings. Raises `UsageError` when none is left."""
    of_setting: dict[TrainConfig, list[str]] = {}
    for config, name in zip(configs, names, strict=True):
        of_setting.setdefault(replace(config, seed=0), []).append(name)
    whole = {setting: runs for setting, runs in of_setting.items() if not diverged.keys() & set(runs)}
    if not whole:
        raise UsageError(f"every configuration diverged; {next(iter(diverged.values()))}")
    monitor = monitor if monitor in metrics.AVERAGES else "accuracy"
    entries = [_entry(folder, setting, runs, monitor) for setting, runs in whole.items()]
    entries.sort(key=lambda e: -e["row"][monitor])
    best = entries[0]
    labels = experiment.labels(best["ids"])
    _add_tests(entries, labels, len(experiment.classes), monitor)
    _add_gains(entries, monitor)
    rows = [e["row"] for e in entries]
    columns, details = _columns(rows, list(whole))
    majority = metrics.majority_baseline(labels, experiment.classes, experiment.majority(experiment.splits[0]))
    baseline = {"head": f"always {majority['class']}", **{name: majority[name] for name in metrics.AVERAGES}}
    notes = _rows_notes(rows, len(labels), monitor, experiment)
    if len(whole) < len(of_setting):
        notes += f"\nLeft out for diverging ({len(of_setting) - len(whole)} of {len(of_setting)}):"
        notes += "".join(f"\n- {name}: {reason}" for name, reason in diverged.items())
    return Tables([*rows, baseline], columns, details, _pivots(rows, monitor), notes, best["runs"][0], monitor)


def _add_tests(entries: Sequence[dict[str, Any]], labels: np.ndarray, n_classes: int, by: str) -> None:
    """The interval of each configuration's figure, and its test against the best, which is the first. Rows are drawn
    again, the seeds are taken as they are."""
    drawn_of_runs = metrics.resampled(labels, np.concatenate([e["predictions"] for e in entries]), n_classes, by)
    ends = np.cumsum([len(e["runs"]) for e in entries])[:-1]
    drawn = [of_entry.mean(1) for of_entry in np.split(drawn_of_runs, ends, axis=1)]
    best = entries[0]["row"]
    for entry, of_entry in zip(entries, drawn, strict=True):
        row = entry["row"]
        low, high = metrics.interval_of_mean(labels, entry["predictions"], n_classes, by)
        row |= {"by": by, "95 %": f"{low:.3f}-{high:.3f}", "low": low, "high": high}
        if row is not best:
            row |= {"to best": row[by] - best[by], "p": metrics.two_sided_p(of_entry - drawn[0])}


def _columns(rows: Sequence[Mapping[str, Any]], settings: Sequence[TrainConfig]) -> tuple[list[str], list[str]]:
    """The columns of the table and of the one of details: of the settings those that differ."""

    def given(name: str) -> list[str]:
        return [name] if any(row[name] is not None for row in rows) else []

    read = [(flat(config), settings_read(config.head.head) - {"head", "sides"}) for config in settings]
    varying = [
        name for name in flat(settings[0]) if len({values[name] for values, of_head in read if name in of_head}) > 1
    ]
    named = ["head", *(["collapsed"] if any(row["collapsed"] for row in rows) else []), "ablation", *varying]
    columns = [*named, "seeds", *metrics.AVERAGES, "±", "95 %", "to best", "p", *given("gain")]
    measured = ["best_epoch", "epochs", "parameters", *given("with_encoders"), "weighted_precision", "weighted_recall"]
    return columns, [*named, *measured]


def _rows_notes(rows: Sequence[Mapping[str, Any]], n_rows: int, by: str, experiment: Experiment) -> str:
    """What the figures of `n_rows` validation rows are to be taken with."""
    epochs_chosen = not all(head_class(row["head"]).closed_form() for row in rows)
    notes = (
        f"{n_rows} validation rows. Of the {by}: ± is over seeds; 95 % and p, a paired bootstrap against the "
        f"best, are over rows, of models with these seeds. {optimism_words(len(rows), epochs_chosen)}"
    )
    if corrected := corrected_words(experiment.features, experiment.splits):
        notes += f" Of the labels, {corrected}."
    collapsed = [row["head"] for row in rows if row["collapsed"]]
    if collapsed:
        notes += (
            f"\nnote: {len(collapsed)} of {len(rows)} configurations have heads that predict one class for every "
            f"validation row: no result of theirs; {collapse_remedy(collapsed)}"
        )
    return notes


def _entry(folder: Path, setting: TrainConfig, runs: Sequence[str], monitor: str) -> dict[str, Any]:
    figures, predictions, collapsed, trained = [], [], [], []
    ids: list[str] = []  # the same in all
    for name in runs:
        told = read_metrics(folder / name)
        figures.append(told["val"])
        collapsed.append(_collapsed_classes(told))
        trained.append(read_config(folder / name)["members"])
        ids, _, probabilities = read_predictions(folder / name / PREDICTIONS)
        predictions.append(probabilities.argmax(1))
    members = [member for of_run in trained for member in of_run]
    summary = metrics.mean_std(figures)
    values = flat(replace(setting, head=setting.head.resolved()))
    values |= {name: f"{values[name]:g}" for name in ("lr", "weight_decay")}  # three digits would show 1e-4 as 0.000
    if not isinstance(setting.class_weights, str):
        named = dict(setting.class_weights)
        values["class_weights"] = ",".join(f"{name}={weight:g}" for name, weight in named.items())
    read = settings_read(setting.head.head)
    row = {
        **{name: value if name in read else None for name, value in values.items() if name not in ("seed", "sides")},
        "ablation": ablation_words(setting.head.sides),
        "collapsed": _collapse_words([name for of_run in collapsed for name in of_run], len(members)),
        "parameters": members[0]["parameters"],
        "with_encoders": members[0].get("with_encoders"),
        "best_epoch": _spread_of(members, "best_epoch"),
        "epochs": _spread_of(members, "epochs"),
        "seeds": len(runs),
        **{name: summary[name]["mean"] for name in text_tables.SHOWN_AVERAGES},
        "±": summary[monitor]["std"],
        "log_loss": summary["log_loss"]["mean"],
        "run": runs[0],
    }
    return {"row": row, "setting": setting, "runs": runs, "ids": ids, "predictions": predictions}


def _spread_of(members: Sequence[Mapping[str, Any]], name: str) -> int | str | None:
    """A number of all members: one, or from the least to the most; None of closed forms."""
    known = [member[name] for member in members if member.get(name) is not None]
    return spread(known) if known else None


def _collapsed_classes(told: Mapping[str, Any]) -> list[str]:
    """The class of each member of a run (of its metrics.json) that predicts no other; of all together where it was
    written by a version that didn't look at each."""
    if "collapsed" in told["members"]:
        return [member["class"] for member in told["members"]["collapsed"]]
    one = metrics.collapsed_class(told["val"]["confusion"], told["val"]["classes"])
    return [one] * told["members"]["count"] if one else []


def _collapse_words(classes: Sequence[str], trainings: int) -> str:
    """What a table says of trainings of which some predict one class only."""
    if not classes:
        return ""
    what = f"always {classes[0]}" if len(set(classes)) == 1 else "one class each"
    return what if len(classes) == trainings else f"{len(classes)} of {trainings} {what}"


def _add_gains(entries: Sequence[dict[str, Any]], monitor: str) -> None:
    figure_of = {entry["setting"]: entry["row"][monitor] for entry in entries}
    for entry in entries:
        head = entry["setting"].head
        single = [replace(entry["setting"], head=replace(head, sides=(side,))) for side in SIDES]
        known = [figure_of[setting] for setting in single if setting in figure_of]
        compared = head.sides == SIDES and len(known) == len(SIDES)
        entry["row"]["gain"] = entry["row"][monitor] - max(known) if compared else None


def _pivots(rows: Sequence[dict[str, Any]], monitor: str) -> dict[str, tuple[list[dict[str, Any]], list[str]]]:
    """The studies' tables, of what the sweep varies; each cell holds the best of what is left open."""

    def best(**wanted: Any) -> dict[str, Any] | None:
        """The first row, as they are sorted, with these values."""
        return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)

    def distinct(name: str, of: Sequence[dict[str, Any]] = rows) -> list[Any]:
        return sorted({row[name] for row in of} - {None}, key=float)

    heads = list(dict.fromkeys(row["head"] for row in rows))
    found = {}
    if len(heads) > 1:
        chosen = [row for h in heads if (row := best(head=h))]
        extra = [name for name in ("collapsed", "with_encoders") if any(row[name] for row in chosen)]
        columns = ["head", "ablation", "parameters", *extra, *metrics.AVERAGES, "95 %", "to best", "p"]
        found[f"by head, each at its best {monitor}"] = (chosen, columns)
    ablations = [name for name in map(ablation_words, ABLATIONS) if best(ablation=name)]
    if len(ablations) > 1:
        table = [
            {"head": h, **{words: _cell(best(head=h, ablation=words), monitor) for words in ablations}} for h in heads
        ]
        gains = [row and row["gain"] for row in (best(head=h, ablation=ablation_words(SIDES)) for h in heads)]
        if any(gain is not None for gain in gains):
            table = [{**line, "gain": gain} for line, gain in zip(table, gains, strict=True)]
            ablations.append("gain")
        found[f"by ablation, {monitor}"] = (table, ["head", *ablations])
    trained = [row for row in rows if row["lr"] is not None]
    if len(distinct("D")) > 1 or len(distinct("lr")) > 1:
        rates = {f"lr {lr}": lr for lr in distinct("lr")}

        def line(h: str, D: int | None) -> dict[str, Any]:
            cells = {rate: _cell(best(head=h, D=D, lr=lr), monitor) for rate, lr in rates.items()}
            return {"head": h, "D": D, **cells}

        table = []
        for h in dict.fromkeys(row["head"] for row in trained):
            table += [line(h, D) for D in distinct("D", [row for row in trained if row["head"] == h]) or [None]]
        found[f"by D and learning rate, {monitor}"] = (table, ["head", "D", *rates])
    return found


def _cell(row: Mapping[str, Any] | None, name: str) -> float | str | None:
    if row is None or not row["collapsed"]:
        return None if row is None else row[name]
    return f"{row[name]:.3f} ({row['collapsed']})"
