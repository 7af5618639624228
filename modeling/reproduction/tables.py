"""A study's table on the caches there are: its heads trained by its recipe, its figures beside ours, what differs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from feats.csv_files import write_table
from feats.errors import CantWriteError, UsageError
from feats.writing import write_text
from modeling.choices import FEATS, RUNS, SEEDS, SplitSettings
from modeling.evaluation import metrics, text_tables
from modeling.experiments.experiment import Experiment, ExperimentSettings, load_experiment, on_features
from modeling.experiments.fitting import run_of, train_all as train
from modeling.features.joined import FeatureSource
from modeling.heads.config import HeadConfig, ablation_words
from modeling.heads.registry import head_class
from modeling.prediction.ablation import ablation_eval, absence
from modeling.reproduction.published import Row, Study, Table, ends
from modeling.reproduction.sources import Cache, caches_in, differences, source_for
from modeling.runs.config import PREDICTIONS, is_whole, read_config, read_metrics
from modeling.runs.folder import load_run, read_predictions, save_run
from modeling.search.sweep import data_digest, name_of
from modeling.training.config import TrainConfig, as_read, flat, from_flat, with_seeds
from modeling.training.recipes import RECIPES, SPLIT_SETTINGS, cached_recipe, recipe_settings

FROZEN, TUNED = "frozen", "tuned"
NOT_TUNED = "not run (`finetune`)"

Progress = Callable[[int], Any]  # is told epochs as they are done
Bar = Callable[[Sequence[TrainConfig], Experiment], AbstractContextManager[Progress]]  # of so many epochs


def no_bar(configs: Sequence[TrainConfig], experiment: Experiment) -> AbstractContextManager[Progress]:
    """A `bar` that shows nothing."""
    return nullcontext(lambda epochs: None)


@dataclass(frozen=True)
class Settings:
    """Where caches and runs lie, and how rows are trained. `image` and `text` name the caches of each side, None where
    they are chosen row by row. With `folds` heads are cross-validated in place of the study's one split."""

    feats: Path = FEATS
    runs: Path = RUNS
    image: tuple[str, ...] | None = None
    text: tuple[str, ...] | None = None
    seeds: int = SEEDS
    folds: int | None = None
    device: str = "auto"

    def folder_of(self, table: Table) -> Path:
        """Where the runs and the tables of a reproduction lie."""
        return self.runs / f"reproduce_{table.name}"


@dataclass(frozen=True)
class Result:
    """What became of a published row: its `runs`, one for each seed, or the `reason` why there is none. `encoders` says
    whether they were frozen or tuned here, `differs` what else isn't as in the study. `made`: runs trained just now.
    `figures` of each run stand in for those that it keeps."""

    row: Row
    encoders: str
    runs: tuple[Path, ...] = ()
    differs: tuple[str, ...] = ()
    reason: str = ""
    made: tuple[Path, ...] = ()
    figures: tuple[Mapping[str, Any], ...] = ()


def side_removed(row: Row, encoders: str, found: Mapping[str, Result]) -> Result:
    """A row that is of another one's runs: `found`, by label, has that, or the row wasn't asked for."""
    reason = f"not run: it is of the row {row.ablation_of}; name that in `rows`, too"
    return replace(found.get(row.ablation_of or "", Result(row, encoders, reason=reason)), row=row, made=())


# -- recipes ----------------------------------------------------------------------------------------------------


def split_of(study: Study, folds: int | None = None) -> SplitSettings:
    """The study's split, duplicates together; with `folds` so many folds by its seed."""
    recipe = RECIPES[study.letter]
    given = {name.removeprefix("split_"): recipe[name] for name in SPLIT_SETTINGS if name in recipe}
    return SplitSettings(**given, folds=folds)


def config_of(row: Row, study: Study, experiment: Experiment) -> TrainConfig:
    """The training of a row on these data: by the study's settings, where these belong to encoders that were tuned
    along, by those that were found for caches."""
    recipe = recipe_settings(cached_recipe(study.letter), row.head)
    values = {**recipe, **row.settings, "head": row.head, "sides": row.sides}
    known = flat(TrainConfig())
    config = from_flat({name: value for name, value in values.items() if name in known})
    return as_read(on_features(config, experiment.features))


# -- heads on caches --------------------------------------------------------------------------------------------


def frozen_results(
    table: Table,
    rows: Sequence[Row],
    settings: Settings = Settings(),
    *,
    made_by: Mapping[str, Any] = {},
    say: Callable[[str], Any] = lambda line: None,
    bar: Bar = no_bar,
) -> list[Result]:
    """Train the heads of `rows` of a table on caches, each seed a run of its own; finished ones are taken as they are.

    A row that can't be trained has a result that says why. `made_by` is what `save_run` keeps of the command and its
    options, `say` hears what is read, `bar` shows progress. Raises `UsageError` for caches that were named and can't be
    used, and for runs that can't be written.
    """
    caches = {cache.name: cache for cache in caches_in(settings.feats)}
    named = {"image": settings.image, "text": settings.text}
    sources: dict[str, FeatureSource] = {}
    found: dict[str, Result] = {}
    for row in rows:
        if not row.cached or row.ablation_of is not None:
            continue
        try:
            sources[row.label] = source_for(row, list(caches.values()), settings.feats, named)
        except UsageError as error:
            found[row.label] = Result(row, FROZEN, reason=str(error))

    def alike(row: Row) -> tuple[Any, ...]:
        source = sources[row.label]
        return source.image, source.text, sorted(head_class(row.head).tokens)

    there = [row for row in rows if row.label in sources]
    for _, group in groupby(sorted(there, key=alike), alike):
        members = list(group)
        try:
            source, removed = sources[members[0].label], [row for row in rows if row.cached and row.ablation_of]
            results = _trained(table, members, removed, source, caches, settings, made_by, say, bar)
        except CantWriteError:
            raise
        except UsageError as error:
            if settings.image is not None or settings.text is not None:
                raise
            results = [Result(row, FROZEN, reason=str(error)) for row in members]
        found |= {result.row.label: result for result in results}
    for row in rows:
        if row.cached and row.ablation_of is not None and row.label not in found:
            found[row.label] = side_removed(row, FROZEN, found)
    return [found[row.label] for row in rows if row.label in found]


def _trained(
    table: Table,
    rows: Sequence[Row],
    removed: Sequence[Row],
    source: FeatureSource,
    caches: Mapping[str, Cache],
    settings: Settings,
    made_by: Mapping[str, Any],
    say: Callable[[str], Any],
    bar: Bar,
) -> list[Result]:
    """The rows whose heads read the same caches, and those of `removed` that are of one of them."""
    folder = settings.folder_of(table)
    # Heads that can do without tokens had vectors in the studies: only those that need tokens ask for some.
    needing = [HeadConfig(row.head, sides=row.sides) for row in rows if head_class(row.head).tokens]
    split = split_of(table.study, settings.folds)
    norm = RECIPES[cached_recipe(table.study.letter)].get("norm", "none")
    norms = dict.fromkeys(source.names, norm)
    experiment = load_experiment(ExperimentSettings(source, split, norms, device=settings.device), needing)
    for line in experiment.lines():
        say(line)
    data = data_digest(experiment)
    of_row = [with_seeds(config_of(row, table.study, experiment), settings.seeds) for row in rows]
    names = {config: name_of(config, data) for configs in of_row for config in configs}
    waiting = [config for config, name in names.items() if not is_whole(folder / name)]
    failed: dict[int, str] = {}
    with bar(waiting, experiment) as progress:
        for k, outcomes in train(waiting, experiment, progress, failed):
            save_run(run_of(outcomes, experiment), folder / names[waiting[k]], overwrite=True, **made_by)
    diverged = {names[waiting[k]]: reason for k, reason in failed.items()}
    results = []
    for row, configs in zip(rows, of_row, strict=True):
        of_seeds = [names[config] for config in configs]
        reasons = [diverged[name] for name in of_seeds if name in diverged]
        if reasons:
            results.append(Result(row, FROZEN, reason=reasons[0]))
            continue
        differs = differences(row, source, caches_of(source, caches))
        if row.tuned:
            differs.append("encoders frozen in place of tuned")
        paths = tuple(folder / name for name in of_seeds)
        made = tuple(folder / names[config] for config in waiting if names[config] in of_seeds)
        whole = Result(row, FROZEN, paths, tuple(differs), made=made)
        results += [whole, *(_scored_without(r, whole, experiment) for r in removed if r.ablation_of == row.label)]
    return results


def _scored_without(row: Row, whole: Result, experiment: Experiment) -> Result:
    """The heads of `whole` with a black picture or an empty text, as the study had; where no encoder can make these,
    with the training rows' mean."""
    source, differs = experiment.features.source, list(whole.differs)
    try:
        absent_of = absence("blank", experiment.features, source, device=experiment.device)
    except UsageError:
        absent_of = absence("mean", experiment.features, source)
        differs.append(
            "the training rows' mean in place of a black picture and an empty text, which the caches' encoders "
            "can't be had for"
        )
    left = ablation_words(row.sides)
    figures = [ablation_eval(load_run(path), experiment, absent_of)["val"][left] for path in whole.runs]
    return replace(whole, row=row, differs=tuple(differs), made=(), figures=tuple(figures))


def caches_of(source: FeatureSource, caches: Mapping[str, Cache]) -> dict[str, Cache]:
    """The caches of a source by name. Raises `UsageError` for one that isn't among them."""
    lacking = [name for name in source.names if name not in caches]
    if lacking:
        raise UsageError(f"no complete cache {lacking[0]} in {source.folder} (there: {', '.join(caches) or 'none'})")
    return {name: caches[name] for name in source.names}


# -- figures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The table with the study's figures beside ours."""

    title: str
    rows: list[dict[str, Any]]
    columns: list[str]
    notes: list[str]

    def text(self, markdown: bool = False) -> str:
        """What a terminal shows, or Markdown."""
        heading = f"## {self.title}" if markdown else self.title
        table = text_tables.format_table(self.rows, self.columns, markdown=markdown)
        return "\n\n".join([heading, table, "\n".join(f"- {note}" for note in self.notes)])

    def write(self, folder: Path) -> None:
        """table.csv, with every number in full, and table.md. Raises `UsageError` where that can't be written."""
        write_table(folder / "table.csv", self.rows)
        write_text(folder / "table.md", self.text(markdown=True) + "\n")


@dataclass(frozen=True)
class Scored:
    """A result's figures on validation rows: of each run as `metrics.figures` gives them, and how surely its mean is
    what it is, [low, high] by the names of `metrics.AVERAGES`."""

    figures: list[dict[str, Any]]
    intervals: dict[str, list[float]]

    def value(self, name: str) -> list[float] | None:
        """A figure of each run; None where the data lack the class it is of."""
        found = [_figure(figures, name) for figures in self.figures]
        return None if None in found else [float(value) for value in found if value is not None]

    @property
    def collapsed(self) -> str:
        """In words the runs that predict one class for every row; empty when there is none."""
        only = [figures["collapsed"] for figures in self.figures if figures["collapsed"]]
        if not only:
            return ""
        some = "" if len(self.figures) == 1 else f" ({len(only)} of {len(self.figures)} seeds)"
        return f"collapsed: predicts {', '.join(sorted(set(only)))} for every row{some}"


def _figure(figures: Mapping[str, Any], name: str) -> float | None:
    if name in figures:
        return float(figures[name])
    of_class, _, measure = name.rpartition(" ")
    found: float | None = figures["per_class"].get(of_class, {}).get(measure)
    return found


def scored(result: Result) -> Scored:
    """Read a result's runs. Raises `UsageError` for what can't be read."""
    if result.row.ablation_of is not None:
        left = ablation_words(result.row.sides)
        kept = [read_metrics(path).get("ablation_eval", {}).get(left) for path in result.runs]
        of_runs = [dict(found) for found in result.figures or kept if found is not None]
        return Scored(of_runs, {name: _mean_interval(of_runs, name) for name in metrics.AVERAGES} if of_runs else {})
    figures = [read_metrics(path)["val"] for path in result.runs]
    classes = read_config(result.runs[0])["classes"]
    read = [read_predictions(path / PREDICTIONS) for path in result.runs]
    labels = np.array([classes.index(tag) for tag in read[0][1]])
    predicted = np.stack([probabilities.argmax(1) for _, _, probabilities in read])
    return Scored(
        figures,
        {name: metrics.interval_of_mean(labels, predicted, len(classes), name) for name in metrics.AVERAGES},
    )


def _mean_interval(of_runs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The mean of each run's own, no narrower than the interval of the mean as a rule."""
    low, high = np.mean([figures["interval"][name] for figures in of_runs], axis=0).tolist()
    return [low, high]


def compare(table: Table, results: Iterable[Result], settings: Settings) -> Comparison:
    """The study's figures beside ours, row by row as it published them, and in words what differs."""
    results = list(results)
    read = [(result, scored(result) if result.runs else None) for result in results]
    varying = [name for name in ("D", "lr", "bs") if any(name in result.row.settings for result in results)]
    lines = [line for result, of_runs in read for line in _lines(result, of_runs, varying)]
    there = [(result, of_runs) for result, of_runs in read if of_runs is not None and of_runs.figures]
    lines += _majority_lines([of_runs for _, of_runs in there], [line["figure"] for line in lines])
    columns = ["row", "head", "encoders", *varying, "figure", "study", "ours", "±", "95 %", "to study", "agrees"]
    columns += ["note"] if any(line.get("note") for line in lines) else []
    return Comparison(f"{table.name}: {table.title}", lines, columns, _notes(table, read, settings))


def _lines(result: Result, of_runs: Scored | None, varying: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each published figure of a row."""
    row = result.row
    shown = {name: f"{row.settings[name]:g}" if name in row.settings else "" for name in varying}
    beginning = {"row": row.label, "head": row.head, "encoders": result.encoders, **shown}
    collapsed = of_runs.collapsed if of_runs else ""
    note = result.reason if result.reason.startswith("not run") else "not run, see below" if result.reason else ""
    note = "; ".join(filter(None, [note, collapsed, row.remark]))
    lines = []
    for figure, published in row.figures.items():
        line: dict[str, Any] = {**beginning, "figure": figure, "study": published, "note": note}
        values = of_runs.value(figure) if of_runs and of_runs.figures else None
        if values is not None and of_runs is not None:
            line |= _beside(published, values, of_runs.intervals.get(figure), bool(collapsed))
        lines.append(line)
    return lines


def _beside(
    published: str, values: Sequence[float], interval: Sequence[float] | None, collapsed: bool
) -> dict[str, Any]:
    """Our mean over runs, and how it compares with a published figure; a collapsed head's doesn't."""
    ours, (low, high) = float(np.mean(values)), ends(published)
    found: dict[str, Any] = {"ours": ours, "±": float(np.std(values, ddof=1)) if len(values) > 1 else None}
    if interval is not None:
        found |= {"95 %": f"{interval[0]:.3f}-{interval[1]:.3f}", "low": interval[0], "high": interval[1]}
    if collapsed:
        return found
    difference = ours - min(max(ours, low), high)  # to the nearest end of a range
    found |= {"to study": f"{difference:+.3f}", "difference": difference}
    if interval is not None:
        found["agrees"] = "yes" if interval[0] <= high and low <= interval[1] else "no"
    return found


def _majority_lines(read: Sequence[Scored], figures: Iterable[str]) -> list[dict[str, Any]]:
    """What always predicting the most common class scores, on each set of validation rows."""
    wanted = [name for name in dict.fromkeys(figures) if name in metrics.AVERAGES]
    found = {}
    for of_runs in read:
        first = of_runs.figures[0]
        for name in wanted:
            label = f"always {first['majority']['class']} ({first['n']} rows)"
            found[label, name, round(first["majority"][name], 9)] = first["majority"][name]
    return [{"row": label, "figure": name, "ours": value} for (label, name, _), value in found.items()]


# -- what differs -----------------------------------------------------------------------------------------------


def _notes(table: Table, read: Sequence[tuple[Result, Scored | None]], settings: Settings) -> list[str]:
    there = [(result, of_runs) for result, of_runs in read if of_runs is not None and of_runs.figures]
    notes = _gathered([(difference, result) for result, _ in there for difference in result.differs])
    notes += _gathered(
        [(f"validation rows {_rows_here(of_runs)}, the study's {_rows_there(table.study)}", r) for r, of_runs in there]
    )
    if there:
        how = f"{settings.folds}-fold cross-validation" if settings.folds else "a split of the study's ratio"
        notes.append(
            f"ours: {how}, stratified, duplicates together; which rows the study had isn't known. Best epoch by the "
            "rows shown, as the study's"
        )
        notes.append(
            f"frozen: the mean of {settings.seeds} seed{'s'[: settings.seeds != 1]}, ± over them; tuned: one seed; "
            "95 % over rows, of accuracy and the F1s. agrees: the study's figure, of one split and as a rule one seed, "
            "lies within"
        )
    if any(of_runs.collapsed for _, of_runs in there):
        notes.append("a head that predicts one class for every row has learned nothing: it isn't the study's result")
    if table.chosen:
        notes.append(table.chosen)
    reasons = [(result.reason, result) for result, _ in read if result.reason and result.reason != NOT_TUNED]
    return notes + _gathered([(f"not run: {reason.removeprefix('not run: ')}", result) for reason, result in reasons])


def _gathered(told: Sequence[tuple[str, Result]]) -> list[str]:
    """Each remark once, behind the rows it is of."""
    of_remark: dict[str, dict[str, list[str]]] = {}
    for remark, result in told:
        labels = of_remark.setdefault(remark, {}).setdefault(result.encoders, [])
        labels += [result.row.label] if result.row.label not in labels else []
    lines = []
    for remark, of_encoders in of_remark.items():
        rows = [f"{', '.join(labels)} ({encoders})" for encoders, labels in of_encoders.items()]
        lines.append(f"{'; '.join(rows)}: {remark}")
    return lines


def _rows_here(of_runs: Scored) -> str:
    first = of_runs.figures[0]
    return _counted({name: of_class["support"] for name, of_class in first["per_class"].items()}, first["n"])


def _rows_there(study: Study) -> str:
    return _counted(study.class_counts, study.validation_rows)


def _counted(counts: Mapping[str, int], rows: int) -> str:
    """500 (299 positive, 149 negative, 52 neutral; majority .598)."""
    if not counts:
        return f"{rows} (classes not told)"
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    told = ", ".join(f"{count} {name}" for name, count in most)
    return f"{rows} ({told}; majority {most[0][1] / rows:.3f})"
