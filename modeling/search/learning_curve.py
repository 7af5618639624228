"""How good heads become with more training rows: measured on ever larger parts of them, and beyond with a band.

The band comes of power laws err(n) = a + b n^-c with a, b >= 0, in that form the best of those compared by Viering and
Loog, The Shape of Learning Curves: a Review, IEEE TPAMI 2023. It holds where such a law does; where the measured rows
don't tell which one, there is no statement.
"""

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from feats.csv_files import read_table, write_rows
from feats.errors import UsageError
from modeling.choices import CURVE_FILE, DRAWS, SHARES
from modeling.evaluation import metrics
from modeling.experiments.experiment import Experiment
from modeling.experiments.fitting import Progress, train_all
from modeling.features.stored_splits import Split
from modeling.heads.registry import head_class
from modeling.runs.files import user_file
from modeling.runs.run import Run
from modeling.training.config import TrainConfig, flat
from modeling.training.fit import n_epochs

FILE = CURVE_FILE

FACTORS = (1.5, 2.0, 4.0)  # of the training rows, at which the fit is read
LEAST_UNITS = 2  # of a class, in a part: rows that are no duplicates, one to learn from and one for inner folds
LEAST_SHARES = 4  # a law of three numbers goes through any three points
EXPONENTS = np.geomspace(0.1, 2.0, 100)  # published ones of error rates lie between
RESAMPLES = 2000
MEASURED, PREDICTED = "measured", "predicted"
HEADER = (
    "head",
    "what",
    "figure",
    "share",
    "rows",
    "draws",
    "mean",
    "std",
    "low",
    "high",
    "gain_low",
    "gain_high",
    "chance",
    "always",
    "why",
    "epochs_chosen",
)
NUMBERS = ("share", "rows", "draws", "mean", "std", "low", "high", "gain_low", "gain_high", "chance")


# -- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """What a head trained on each of S parts of the training rows, in each of D draws, predicts for the same N
    validation rows. A larger part of a draw contains its smaller ones; the last is all rows."""

    name: str
    classes: list[str]
    majority: str  # the most common class of all training rows
    shares: np.ndarray  # (S,) ascending, the last 1
    rows: np.ndarray  # (D, S) int64, training rows of each part
    labels: np.ndarray  # (N,) int64
    predictions: np.ndarray  # (D, S, N) int64
    epochs_chosen: bool  # on these very validation rows


def nested_parts(
    ids: Sequence[str], tags: Sequence[str], groups: Sequence[int] | None, shares: Sequence[float], seed: str
) -> list[list[str]]:
    """For each of `shares` that part of the rows, sorted; a larger one contains the smaller ones, 1 gives all rows.

    Rows of one group stay together. Rows of a class, and groups whose rows have the same labels, are sampled each for
    itself and systematically: of every such kind a part holds its share within one, and every row has that chance of
    being in. Like a split, a part depends on ids, labels, groups and `seed` only."""
    together: dict[int, list[int]] = defaultdict(list)
    for row in sorted(range(len(ids)), key=ids.__getitem__):
        together[row if groups is None else groups[row]].append(row)
    kinds: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
    for unit in together.values():
        kinds[tuple(sorted(tags[row] for row in unit))].append(unit)
    place = np.empty(len(ids))
    for kind, units in kinds.items():
        units.sort(key=lambda unit: _uniform(f"{seed}/{ids[unit[0]]}"))
        first = _uniform(f"{seed}//{kind}")
        for k, unit in enumerate(units):
            place[unit] = (k + first) / len(units)
    return [sorted(ids[row] for row in np.flatnonzero(place < share).tolist()) for share in shares]


def _uniform(text: str) -> float:
    """A number in [0, 1) that only the text decides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / (1 << 48)


def curve_splits(
    experiment: Experiment, shares: Sequence[float] = SHARES, draws: int = DRAWS, seed: int = 0
) -> tuple[list[float], list[list[Split]]]:
    """The shares, ascending, that can be trained on, 1 always among them; and for each draw a split for each of them:
    part of the training rows, all validation rows. Shares that leave a class too few rows in any draw are left out.

    Raises `UsageError` for an experiment of several splits, shares outside (0, 1] and fewer than one draw."""
    if len(experiment.splits) != 1:
        raise UsageError(
            f"a learning curve over {len(experiment.splits)} splits: expected one, so that every point is measured on "
            "the same validation rows; train with `val_ratio` instead of `folds`"
        )
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise UsageError(f"`shares` {wrong[0]:g}: expected shares of the training rows, above 0 and up to 1")
    if draws < 1:
        raise UsageError(f"`draws` {draws}: expected 1 or more")
    [whole] = experiment.splits
    tags = experiment.features.tags_of(whole.train)
    wanted = sorted({*shares, 1.0})
    groups = experiment.groups(whole.train)
    numbers = None if groups is None else groups.tolist()
    parts = [nested_parts(whole.train, tags, numbers, wanted, f"{seed}/{draw}") for draw in range(draws)]
    fits = [s for s in range(len(wanted)) if wanted[s] == 1 or all(_enough(of[s], tags, experiment) for of in parts)]
    splits = [[Split(of[s], whole.val, how={**whole.how, "share": wanted[s]}) for s in fits] for of in parts]
    return [wanted[s] for s in fits], splits


def _enough(part: Sequence[str], tags: Sequence[str], experiment: Experiment) -> bool:
    """Whether a part has rows of every class that are no duplicates."""
    units: dict[str, set[Any]] = {name: set() for name in tags}
    groups = experiment.groups(part)
    for group, tag in zip(part if groups is None else groups, experiment.features.tags_of(part), strict=True):
        units[tag].add(group)
    return all(len(of_class) >= LEAST_UNITS for of_class in units.values())


def curve_epochs(
    configs: Sequence[TrainConfig],
    experiment: Experiment,
    shares: Sequence[float] = SHARES,
    draws: int = DRAWS,
    seed: int = 0,
) -> int:
    """What `learning_curve` reports in all."""
    return n_epochs(configs) * len(curve_splits(experiment, shares, draws, seed)[0]) * draws


def learning_curve(
    experiment: Experiment,
    configs: Sequence[TrainConfig],
    shares: Sequence[float] = SHARES,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Progress = lambda epochs: None,
) -> list[Curve]:
    """A curve for each configuration. In draw k a head trained by gradient descent has the configuration's seed + k;
    one in closed form is the same in every draw of all rows, and solved once.

    Epochs are chosen on the validation rows as elsewhere, and are as many at every share. Warns of shares that are left
    out. Raises `UsageError` as `curve_splits`, and when a training diverges."""
    kept, splits = curve_splits(experiment, shares, draws, seed)
    left_out = sorted({*shares, 1.0} - set(kept))
    if left_out:
        warnings.warn(
            f"shares {', '.join(f'{share:g}' for share in left_out)} of the training rows hold fewer than "
            f"{LEAST_UNITS} rows of some class: left out",
            stacklevel=2,
        )
    [whole] = experiment.splits
    labels = experiment.labels(whole.val)
    predictions = np.empty((len(configs), draws, len(kept), len(labels)), np.int64)
    for draw, of_draw in enumerate(splits):
        for i, of_config in _of_draw(experiment, configs, of_draw, draw, progress):
            predictions[i, draw, : len(of_config)] = of_config
            predictions[i, draw, len(of_config) :] = predictions[i, 0, len(of_config) :]
    rows = np.array([[len(split.train) for split in of_draw] for of_draw in splits])
    return [
        Curve(
            name,
            experiment.classes,
            experiment.majority(whole),
            np.array(kept),
            rows,
            labels,
            of_config,
            not head_class(config.head.head).closed_form(),
        )
        for name, config, of_config in zip(_names(configs), configs, predictions, strict=True)
    ]


def _of_draw(
    experiment: Experiment, configs: Sequence[TrainConfig], splits: Sequence[Split], draw: int, progress: Progress
) -> Iterator[tuple[int, np.ndarray]]:
    """Number and predictions (S, N) of each configuration; without all rows where an earlier draw had the same."""
    exact = [i for i, config in enumerate(configs) if head_class(config.head.head).closed_form()]
    seeded = [i for i in range(len(configs)) if i not in exact]
    for numbers, parts in ((exact, splits[:-1] if draw else splits), (seeded, splits)):
        progress(len(numbers) * (len(splits) - len(parts)))
        if not parts:
            yield from ((i, np.empty((0, len(splits[0].val)), np.int64)) for i in numbers)
            continue
        own = [replace(configs[i], seed=configs[i].seed + draw) if numbers is seeded else configs[i] for i in numbers]
        for k, outcomes in train_all(own, replace(experiment, splits=list(parts)), progress):
            yield numbers[k], np.stack([outcome.trained.val_logits.argmax(1) for outcome in outcomes])


def _names(configs: Sequence[TrainConfig]) -> list[str]:
    """Each one's head, with the settings in which it differs from others of that head."""
    names = []
    for config in configs:
        values = flat(config)
        alike = [flat(other) for other in configs if other.head.head == config.head.head]
        varying = [name for name in values if any(other[name] != values[name] for other in alike)]
        names.append(", ".join([config.head.head, *(f"{name} {values[name]}" for name in varying)]))
    return names


def configs_of(run: Run) -> list[TrainConfig]:
    """The configurations of a run's members, one for those that differ in their seed only."""
    first: dict[TrainConfig, TrainConfig] = {}
    for member in run.members:
        first.setdefault(replace(member.config, seed=0), member.config)
    return list(first.values())


# -- figures and what lies beyond -------------------------------------------------------------------------------


def table(
    curves: Sequence[Curve], figure: str = "accuracy", factors: Sequence[float] = FACTORS
) -> list[dict[str, Any]]:
    """The curves as rows with the columns `HEADER`: of each curve what was measured at every share, then what is
    predicted at every factor. `figure`: one of `metrics.AVERAGES`."""
    return [row for curve in curves for row in (*measured_rows(curve, figure), *predicted_rows(curve, figure, factors))]


def measured_rows(curve: Curve, figure: str) -> list[dict[str, Any]]:
    """For each share the mean of the figure over draws, its standard deviation over them (none where all are the same
    training), and its 95 % interval over rows, the draws as they are."""
    found = []
    for s, share in enumerate(curve.shares.tolist()):
        of_share, n_classes = curve.predictions[:, s], len(curve.classes)
        values = [_figure(curve, predicted, figure) for predicted in of_share]
        low, high = metrics.interval_of_mean(curve.labels, of_share, n_classes, figure)
        distinct = len(values) > 1 and (share < 1 or curve.epochs_chosen)
        row = {
            "share": share,
            "rows": round(float(curve.rows[:, s].mean())),
            "mean": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if distinct else None,
            "low": low,
            "high": high,
        }
        found.append(_row(curve, figure, MEASURED, row))
    return found


def predicted_rows(curve: Curve, figure: str, factors: Sequence[float]) -> list[dict[str, Any]]:
    """For each factor times the training rows the fitted law's figure, its 95 % band, and that of the gain over what
    the law gives for the rows there are.

    The band is that of laws fitted to resampled draws and validation rows, each from another of the shares on, since
    nobody knows where a law begins; that of the figure itself also allows for another collection of as many training
    rows. Shares at which the head is no better than the majority class are on no law: there it learned nothing yet
    (Hestness et al., Deep Learning Scaling is Predictable, Empirically, 2017). From where the band of the gain
    is as wide as what the head has over the majority class, or as half of its errors, there is none, and `why`."""
    fitted = replace(curve, **_from_share(curve, _first_above_chance(curve, figure)))
    reason, n_all = _no_law(curve, fitted, figure), float(curve.rows[:, -1].mean())
    rows: list[dict[str, Any]] = [
        {"share": float(factor), "rows": round(factor * n_all), "why": reason} for factor in sorted(factors)
    ]
    if not reason:
        drawn = _resampled_errors(fitted, figure)
        now, chance = 1 - drawn.mean(0)[-1], _chance(curve, figure)
        n = fitted.rows.mean(0)
        laws, of_all = _laws(n, drawn), fit_power_law(n, _errors(fitted, figure).mean(0)[None])
        other_rows = np.random.default_rng(1).normal(0, _spread_of_all_rows(fitted, figure), len(drawn))
        reason = _misses_all_rows(fitted, drawn, other_rows)
        for row in rows:
            errors = laws.at(row["share"] * n_all)
            gain_low, gain_high = _band(laws.at(n_all) - errors)
            if not reason and gain_high - gain_low >= min(now - chance, (1 - now) / 2):
                reason = f"the laws that fit leave open {gain_low:.3f} to {gain_high:.3f} more than now"
            row["why"] = reason
            if not reason:
                low, high = _band(1 - errors - other_rows)
                mean = 1 - float(of_all.at(row["share"] * n_all)[0])
                row |= {"mean": mean, "low": min(low, mean), "high": max(high, mean)}
                row |= {"gain_low": gain_low, "gain_high": gain_high}
    return [_row(curve, figure, PREDICTED, row) for row in rows]


def _first_above_chance(curve: Curve, figure: str) -> int:
    """The number of the first share from which on the mean over draws is better than the majority class."""
    above = 1 - _errors(curve, figure).mean(0) > _chance(curve, figure)
    return int(len(above) - np.argmin([*above[::-1], False]))


def _from_share(curve: Curve, first: int) -> dict[str, Any]:
    return {
        "shares": curve.shares[first:],
        "rows": curve.rows[:, first:],
        "predictions": curve.predictions[:, first:],
    }


def _row(curve: Curve, figure: str, what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    same = {
        "head": curve.name,
        "what": what,
        "figure": figure,
        "draws": len(curve.rows),
        "chance": _chance(curve, figure),
        "always": curve.majority,
        "epochs_chosen": "yes" if curve.epochs_chosen else "",
    }
    return {**dict.fromkeys(HEADER), "why": "", **same, **values}


def _figure(curve: Curve, predicted: np.ndarray, figure: str) -> float:
    confusion = metrics.confusion_matrix(curve.labels, predicted, len(curve.classes))
    return float(metrics.scores(confusion)[figure])


def _chance(curve: Curve, figure: str) -> float:
    return float(metrics.majority_baseline(curve.labels, curve.classes, curve.majority)[figure])


def _errors(curve: Curve, figure: str) -> np.ndarray:
    """1 - figure of each training, (D, S)."""
    return np.array([[1 - _figure(curve, predicted, figure) for predicted in of_draw] for of_draw in curve.predictions])


def _resampled_errors(curve: Curve, figure: str) -> np.ndarray:
    """Mean errors (R, S) over resampled draws, on validation rows resampled alike for all of them."""
    draws, shares, n = curve.predictions.shape
    flat_predictions = curve.predictions.reshape(draws * shares, n)
    of_rows = metrics.resampled(curve.labels, flat_predictions, len(curve.classes), figure, draws=RESAMPLES)
    errors = 1 - of_rows.reshape(RESAMPLES, draws, shares)
    chosen = np.random.default_rng(0).integers(draws, size=(RESAMPLES, draws))
    mean: np.ndarray = np.take_along_axis(errors, chosen[:, :, None], 1).mean(1)
    return mean


def _spread_of_all_rows(curve: Curve, figure: str) -> float:
    """The standard deviation of the error over collections of as many training rows. Of draws from one collection that
    are a share s of it, the variance is 1 - s of that over collections of their size, which falls with the rows."""
    part = curve.shares[:-1]
    return float(np.sqrt((_errors(curve, figure)[:, :-1].var(0, ddof=1) * part / (1 - part)).mean()))


def _band(values: np.ndarray) -> tuple[float, float]:
    tail = 50 * (1 - metrics.LEVEL)
    low, high = np.percentile(values, (tail, 100 - tail)).tolist()
    return low, high


def _no_law(curve: Curve, fitted: Curve, figure: str) -> str:
    """Why no law is fitted to the part `fitted` of a curve; '' where one is."""
    if len(curve.rows) < 2:
        return "one draw doesn't tell how much draws differ"
    low, _ = metrics.interval_of_mean(curve.labels, curve.predictions[:, -1], len(curve.classes), figure)
    if low <= _chance(curve, figure):
        return f"with all rows it isn't surely better than always {curve.majority}"
    if len(fitted.shares) < LEAST_SHARES:
        return f"{len(fitted.shares)} shares above always {curve.majority}, a power law needs {LEAST_SHARES} or more"
    return ""


def _misses_all_rows(curve: Curve, errors: np.ndarray, other_rows: np.ndarray) -> str:
    """A law fitted to the parts up to half of the rows should foretell what was measured with all of them, as well as
    these stand for others (`other_rows` (R,), by how much they may differ). Why not; '' where it does, and where there
    are too few such parts to fit one."""
    early = curve.shares <= 0.5
    if early.sum() < LEAST_SHARES:
        return ""
    n = curve.rows.mean(0)
    low, high = _band(fit_power_law(n[early], errors[:, early]).at(n[-1]) - errors[:, -1] - other_rows)
    return "" if low <= 0 <= high else "a law fitted to half of the rows misses what was measured with all of them"


@dataclass(frozen=True)
class PowerLaw:
    """R laws err(n) = a + b (n / scale)^-c, each number (R,)."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    scale: float

    def at(self, n: float) -> np.ndarray:
        """(R,) errors with `n` rows."""
        errors: np.ndarray = self.a + self.b * (n / self.scale) ** -self.c
        return errors


def _laws(n: np.ndarray, errors: np.ndarray) -> PowerLaw:
    """A law for each of the resampled `errors` (R, S), fitted from a share on that is drawn among those that leave
    enough of them."""
    starts = np.random.default_rng(2).integers(len(n) - LEAST_SHARES + 1, size=len(errors))
    a, b, c = np.empty((3, len(errors)))
    for start in np.unique(starts).tolist():
        of_start = starts == start
        law = fit_power_law(n[start:], errors[of_start, start:])
        a[of_start], b[of_start], c[of_start] = law.a, law.b, law.c
    return PowerLaw(a, b, c, float(n[-1]))


def fit_power_law(n: np.ndarray, errors: np.ndarray) -> PowerLaw:
    """Least squares of each row of `errors` (R, S), over `EXPONENTS`, a >= 0 and b >= 0, with `n` (S,) rows."""
    scale = float(n[-1])
    best = np.full(len(errors), np.inf)
    a, b, c = np.zeros((3, len(errors)))
    mean = errors.mean(1)
    for exponent in EXPONENTS.tolist():
        x = (n / scale) ** -exponent
        slope = np.maximum(errors @ (x - x.mean()) / ((x - x.mean()) ** 2).sum(), 0)
        above_0 = mean >= slope * x.mean()
        slope = np.where(above_0, slope, errors @ x / (x @ x))
        level = np.where(above_0, mean - slope * x.mean(), 0)
        left = ((errors - level[:, None] - slope[:, None] * x) ** 2).sum(1)
        better = left < best
        best, a, b = (np.where(better, new, old) for new, old in ((left, best), (level, a), (slope, b)))
        c = np.where(better, exponent, c)
    return PowerLaw(a, b, c, scale)


# -- words and the file -----------------------------------------------------------------------------------------


def answers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many more labels bring what, in a sentence for each head of a `table`."""
    return [_answer([row for row in rows if row["head"] == head]) for head in dict.fromkeys(r["head"] for r in rows)]


def _answer(rows: Sequence[Mapping[str, Any]]) -> str:
    measured, predicted = ([row for row in rows if row["what"] == what] for what in (MEASURED, PREDICTED))
    now = measured[-1]
    figure = now["figure"].replace("_f1", " F1")
    told = [f"{now['head']}: {figure} {now['mean']:.3f} with {now['rows']} training rows ({_range(now, '-')})"]
    stated = [row for row in predicted if not row["why"]]
    for row in stated:
        gain = f"{row['gain_low']:.3f} to {row['gain_high']:.3f} more than now"
        told.append(f"with {row['rows']} {_range(row, ' to ')}, {gain}")
    why = next((f" ({row['why']})" for row in predicted if row["why"]), "")
    told.append(f"beyond {(stated or [now])[-1]['rows']} no statement{why}")
    return "; ".join(told)


def _range(row: Mapping[str, Any], between: str) -> str:
    return f"{row['low']:.3f}{between}{row['high']:.3f}"


def notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """How the figures of a `table` came about."""
    first = rows[0]
    words = (
        f"Every point is measured on the same validation rows, {first['draws']} draws of each share: stratified, "
        "duplicates together, the larger containing the smaller. Intervals and bands are of 95 %; bands hold as far "
        f"as a power law does. Always {first['always']} gives {first['chance']:.3f}."
    )
    if any(row["epochs_chosen"] for row in rows):
        words += (
            " Heads trained by gradient descent chose their best epoch on these rows, at every share, which flatters "
            "all points; epochs are as many at every share, so that fewer rows are also fewer steps."
        )
    return words


def write_curve(path: Path, rows: Sequence[Mapping[str, Any]], *, safe: bool = False) -> None:
    """CSV of a `table`, every number in full. For what is there already see `user_file`; `safe` as in `write_rows`."""
    with user_file(path, HEADER) as file:
        write_rows(file, [HEADER, *([row[name] for name in HEADER] for row in rows)], safe=safe)


def read_curve(path: Path) -> list[dict[str, Any]]:
    """What `write_curve` wrote. Raises `UsageError` for anything else."""
    try:
        rows: list[dict[str, Any]] = [dict(row) for row in read_table(path)]
        for row in rows:
            row |= {name: float(row[name]) if row[name] else None for name in NUMBERS}
            row |= {name: int(row[name]) for name in ("rows", "draws")}
            _ = [row[name] for name in HEADER]
        heads = Counter(row["head"] for row in rows if row["what"] == MEASURED)
        if not heads or any(row["head"] not in heads for row in rows):
            raise ValueError("a head has no measured figures")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} can't be read ({error}); make it again with modeling/learning_curve.py") from None
    return rows
