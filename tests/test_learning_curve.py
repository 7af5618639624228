"""The learning curve: nested parts, heads as any training gives them, bands that hold, and the script as a user runs it."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import make_cache, make_tags
from conftest import one_line
from scipy.optimize import curve_fit
from scipy.stats import norm

from feats.errors import UsageError
from modeling import learning_curve as script, train_head
from modeling.evaluation.metrics import interval_of_mean
from modeling.experiments.experiment import Experiment
from modeling.experiments.fitting import train_all
from modeling.features.loading import load_features
from modeling.features.splits import make_folds, make_split
from modeling.features.stored_splits import Split
from modeling.heads.config import HeadConfig
from modeling.report.curves import learning_curve_section
from modeling.runs.folder import load_run
from modeling.runs.listing import newest_run
from modeling.search import learning_curve as curves
from modeling.training.config import TrainConfig

ROWS = 240
CONCAT = TrainConfig(HeadConfig("concat", D=8), lr=1e-2, ep=4, bs=32)
LINEAR = TrainConfig(HeadConfig("linear"), C=0.1)


def experiment(folder: Path, rows: int = ROWS, *, twins: bool = True, folds: bool = False) -> Experiment:
    """Of a cache in which, with `twins`, each second of the first 80 rows has the picture of the row before it."""
    hashes = np.arange(rows) + 1
    if twins:
        hashes[1:80:2] = hashes[0:80:2]
    make_cache(folder, "clip", rows, facts={"image_hash": hashes.astype(np.uint64)})
    data = load_features(folder, "train", ["clip"], ["clip"])
    return Experiment.of(data, make_folds(data, 3) if folds else [make_split(data, 0.25)])


# -- parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_parts_are_nested_stratified_and_keep_duplicates_together(seed: int):
    rng = np.random.default_rng(seed)
    ids, tags = [f"r{i}" for i in range(600)], make_tags(600)
    groups = [i // 3 * 3 if i < 60 else i for i in range(600)]  # twenty of three rows, each of two classes or more
    shares = (0.05, 0.2, 0.5, 0.8, 1.0)
    parts = curves.nested_parts(ids, tags, groups, shares, str(seed))
    kinds = len({tuple(sorted(tags[i] for i in range(600) if groups[i] == g)) for g in set(groups)})
    for small, large in zip(parts, parts[1:]):
        assert set(small) < set(large)
    assert parts[-1] == sorted(ids)
    for share, part in zip(shares, parts):
        chosen = {groups[int(i[1:])] for i in part}
        assert set(part) == {f"r{i}" for i in range(600) if groups[i] in chosen} and part == sorted(part)
        counts = Counter(tags[int(i[1:])] for i in part)
        for name, count in Counter(tags).items():
            assert abs(counts[name] - share * count) <= 3 * kinds
    order = rng.permutation(600).tolist()
    again = curves.nested_parts(
        [ids[i] for i in order], [tags[i] for i in order], [groups[i] for i in order], shares, str(seed)
    )
    assert again == parts


def test_every_row_has_its_share_of_chances():
    """Rows in groups, too: over many draws each is in a part of 0.3 about 0.3 of the time."""
    ids, tags = [f"r{i}" for i in range(40)], make_tags(40)
    groups = [0, 0, 0, 3, 3, *range(5, 40)]
    counts: Counter[str] = Counter()
    for draw in range(600):
        counts.update(curves.nested_parts(ids, tags, groups, [0.3], f"0/{draw}")[0])
    assert all(abs(counts[name] / 600 - 0.3) < 4.5 * (0.21 / 600) ** 0.5 for name in ids)


def test_splits_never_train_on_validation_rows_and_draws_differ(tmp_path: Path):
    found = experiment(tmp_path)
    [whole] = found.splits
    shares, draws = curves.curve_splits(found, [0.5, 0.25], 3)
    assert shares == [0.25, 0.5, 1.0]
    for splits in draws:
        assert all(split.val == whole.val and not set(split.train) & set(whole.val) for split in splits)
        assert splits[-1].train == whole.train
        for small, large in zip(splits, splits[1:]):
            assert set(small.train) < set(large.train)
    assert len({tuple(splits[0].train) for splits in draws}) == 3
    other = curves.curve_splits(found, [0.5, 0.25], 3, seed=1)[1]
    assert other[0][0].train != draws[0][0].train
    assert curves.curve_splits(found, [0.5, 0.25], 1)[1][0] == draws[0]
    twins = {f"p{i}": f"p{i ^ 1}" for i in range(80)}
    assert all(twins[i] in split.train for splits in draws for split in splits for i in split.train if i in twins)


def test_shares_that_leave_a_class_too_few_rows_are_left_out(tmp_path: Path):
    found = experiment(tmp_path, 90)
    with pytest.warns(UserWarning, match="shares 0.02, 0.05 of the training rows hold fewer than 2 rows of some class"):
        [curve] = curves.learning_curve(found, [LINEAR], [0.02, 0.05, 0.5], 2)
    assert curve.shares.tolist() == [0.5, 1.0]
    assert curves.curve_epochs([LINEAR], found, [0.02, 0.05, 0.5], 2) == 4


@pytest.mark.parametrize(
    "shares, draws, folds, told",
    [
        ([0.5, 1.5], 2, False, "`shares` 1.5: expected"),
        ([0.0], 2, False, "`shares` 0: expected"),
        ([0.5], 0, False, "`draws` 0: expected 1 or more"),
        ([0.5], 2, True, "over 3 splits: expected one"),
    ],
)
def test_what_gives_no_curve_is_refused(tmp_path: Path, shares: list[float], draws: int, folds: bool, told: str):
    found = experiment(tmp_path, folds=folds)
    with pytest.raises(UsageError, match=told) as error:
        curves.learning_curve(found, [LINEAR], shares, draws)
    one_line(error)


# -- measuring --------------------------------------------------------------------------------------------------


def test_points_are_what_training_on_each_part_gives(tmp_path: Path):
    found, done = experiment(tmp_path), []
    configs, shares, draws = [CONCAT, LINEAR, replace(CONCAT, lr=3e-3)], [0.3, 0.6], 2
    measured = curves.learning_curve(found, configs, shares, draws, progress=done.append)
    assert sum(done) == curves.curve_epochs(configs, found, shares, draws) == (4 + 1 + 4) * 3 * 2
    assert [curve.name for curve in measured] == ["concat, lr 0.01", "linear", "concat, lr 0.003"]
    _, splits = curves.curve_splits(found, shares, draws)
    for curve, config in zip(measured, configs):
        assert curve.predictions.shape == (2, 3, len(found.splits[0].val))
        assert (curve.labels == found.labels(found.splits[0].val)).all()
        for draw, of_draw in enumerate(splits):
            for s, split in enumerate(of_draw):
                own = replace(found, splits=[Split(split.train, split.val)])
                seeded = replace(config, seed=config.seed + draw)
                [(_, [outcome])] = train_all([seeded], own)
                assert curve.rows[draw, s] == len(split.train)
                np.testing.assert_array_equal(curve.predictions[draw, s], outcome.trained.val_logits.argmax(1))
    assert measured[0].epochs_chosen and not measured[1].epochs_chosen


def test_figures_are_those_of_the_predictions(tmp_path: Path):
    [curve] = curves.learning_curve(experiment(tmp_path), [CONCAT], [0.5], 3)
    rows = curves.measured_rows(curve, "accuracy")
    for s, row in enumerate(rows):
        accuracy = (curve.predictions[:, s] == curve.labels).mean(1)
        assert row["mean"] == pytest.approx(accuracy.mean()) and row["std"] == pytest.approx(accuracy.std(ddof=1))
        assert [row["low"], row["high"]] == interval_of_mean(curve.labels, curve.predictions[:, s], 3, "accuracy")
        assert row["chance"] == (curve.labels == curve.classes.index("positive")).mean()
    exact = curves.measured_rows(replace(curve, epochs_chosen=False), "accuracy")
    assert exact[-1]["std"] is None and exact[0]["std"] is not None  # one training has no spread


# -- beyond -----------------------------------------------------------------------------------------------------


def synthetic(
    seed: int, a: float, b: float, c: float, n_train: int = 2000, n_val: int = 400, draws: int = 5,
    shares: Sequence[float] = curves.SHARES,
) -> curves.Curve:  # fmt: skip
    """Two classes, of which heads trained on n rows err with probability a + b n^-c on average over rows and over
    collections of training rows; what heads have in common depends on the training rows they share."""
    rng = np.random.default_rng(seed)
    hard, labels = rng.normal(size=n_val), (np.arange(n_val) % 10 < 3).astype(int)
    quality = 0.2 * rng.normal(size=n_train)
    of_rows = rng.normal(size=(n_val, n_train)).astype(np.float32)
    n = np.round(np.array(shares) * n_train).astype(int)
    predictions = np.empty((draws, len(n), n_val), int)
    for draw in range(draws):
        order = rng.permutation(n_train)
        luck = of_rows[:, order].cumsum(1)[:, n - 1] / n**0.5
        error = a + b * n**-c + quality[order].cumsum()[n - 1] / n
        wrong = norm.cdf(0.8**0.5 * hard[:, None] + 0.2**0.5 * luck) < error
        predictions[draw] = np.where(wrong, 1 - labels[:, None], labels[:, None]).T
    rows = np.tile(n, (draws, 1))
    return curves.Curve("x", ["a", "b"], "a", np.array(shares), rows, labels, predictions, False)


def test_the_fit_is_least_squares_of_a_power_law():
    n = np.array([100, 200, 400, 800, 1600.0])
    exact = np.array([[a + b * (n / 1600) ** -c for a, b, c in [(0.1, 0.2, 0.5), (0, 0.3, 0.2), (0.2, 0, 1)]]])[0]
    law = curves.fit_power_law(n, exact)
    np.testing.assert_allclose(law.at(3200), [0.1 + 0.2 / 2**0.5, 0.3 / 2**0.2, 0.2], atol=1e-3)
    noisy = exact[:1] + 0.01 * np.array([[1, -1, 0.5, -0.5, 0.2]])
    reference, _ = curve_fit(
        lambda x, a, b, c: a + b * (x / 1600) ** -c, n, noisy[0], [0.1, 0.2, 0.5], bounds=([0, 0, 0.1], [1, 1, 2])
    )
    assert curves.fit_power_law(n, noisy).at(3200)[0] == pytest.approx(
        reference[0] + reference[1] * 2 ** -reference[2], abs=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("law", [(0.1, 0.6, 0.4), (0.12, 3.0, 0.7)])
def test_bands_hold_the_truth_about_as_often_as_they_say(
    law: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(curves, "RESAMPLES", 300)
    a, b, c = law
    held, gains, widths, refused = [], [], [], 0
    for seed in range(60):
        for row in curves.predicted_rows(synthetic(seed, *law), "accuracy", [2, 4]):
            if row["why"]:
                refused += 1
                continue
            truth, now = (1 - a - b * n**-c for n in (2000 * row["share"], 2000))
            held.append(row["low"] <= truth <= row["high"])
            gains.append(row["gain_low"] - 1e-9 <= truth - now <= row["gain_high"] + 1e-9)
            widths.append(row["gain_high"] - row["gain_low"])
    assert refused <= 18  # of 120; a check at 5 % refuses some
    assert np.mean(held) >= 0.9 and np.mean(gains) >= 0.9
    assert np.mean(held) < 1 and np.median(widths) < 0.05


def test_a_law_that_breaks_is_not_extrapolated():
    """The error stops falling at half of the rows, where a law of the first half sees it fall on."""
    shares = (0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.0)
    early = synthetic(0, 0.0, 2.5, 0.4, n_val=4000, shares=shares)
    late = synthetic(0, 2.5 * 1000**-0.4, 0.0, 1.0, n_val=4000, shares=shares)
    broken = np.where((early.shares > 0.5)[:, None], late.predictions, early.predictions)
    rows = curves.predicted_rows(replace(early, predictions=broken), "accuracy", [2])
    assert rows[0]["why"] == "a law fitted to half of the rows misses what was measured with all of them"
    assert curves.predicted_rows(early, "accuracy", [2])[0]["why"] == ""


@pytest.mark.parametrize(
    "changed, why",
    [
        ({"shares": (0.2, 0.5, 1.0)}, "3 shares above always a, a power law needs 4 or more"),
        ({"draws": 1}, "one draw doesn't tell how much draws differ"),
        ({"a": 0.3, "b": 0.0}, "with all rows it isn't surely better than always a"),
    ],
)
def test_without_a_law_nothing_is_said(changed: dict[str, Any], why: str):
    law = {"a": 0.1, "b": 0.6, "c": 0.4, **changed}
    for row in curves.predicted_rows(synthetic(0, **law), "accuracy", [1.5, 4]):
        assert row["why"] == why and row["mean"] is row["low"] is row["gain_high"] is None


def test_from_where_laws_part_nothing_is_said():
    near, far, farther = curves.predicted_rows(synthetic(0, 0.1, 0.6, 0.4), "accuracy", [1.5, 100, 1000])
    assert near["why"] == "" and 0 <= near["gain_low"] < near["gain_high"] < 0.06
    assert far["why"] == farther["why"] and far["high"] is None
    low, high = re.fullmatch(r"the laws that fit leave open (\S+) to (\S+) more than now", far["why"]).groups()
    assert float(high) - float(low) > 0.06  # half of the errors


def test_shares_at_which_nothing_was_learned_have_no_say():
    curve = synthetic(1, 0.1, 0.6, 0.4)
    lost = curve.predictions.copy()
    lost[:, :2] = 0  # always the majority class
    without = replace(curve, shares=curve.shares[2:], rows=curve.rows[:, 2:], predictions=curve.predictions[:, 2:])
    assert curves.predicted_rows(replace(curve, predictions=lost), "accuracy", [2]) == curves.predicted_rows(
        without, "accuracy", [2]
    )


def test_answers_state_the_bands_and_where_they_end():
    row = dict.fromkeys(curves.HEADER) | {"head": "x", "figure": "macro_f1", "why": "", "draws": 5}
    rows = [
        {**row, "what": "measured", "rows": 1000, "mean": 0.7, "low": 0.66, "high": 0.74},
        {**row, "what": "predicted", "rows": 2000, "low": 0.67, "high": 0.77, "gain_low": 0.01, "gain_high": 0.03},
        {**row, "what": "predicted", "rows": 4000, "why": "nobody knows"},
    ]
    assert curves.answers(rows) == [
        "x: macro F1 0.700 with 1000 training rows (0.660-0.740); with 2000 0.670 to 0.770, 0.010 to 0.030 more than "
        "now; beyond 2000 no statement (nobody knows)"
    ]


# -- the script and the page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("curve")
    make_cache(root / "feats", "clip", ROWS)
    given = ["--feats", str(root / "feats"), "--runs", str(root / "runs"), "--val-ratio", "0.25"]
    assert train_head.main([*given, "--head", "linear", "--C", "0.1"]) == 0
    return newest_run(root / "runs")


def test_the_script_shows_and_writes_the_curve(trained: Path, capsys: pytest.CaptureFixture):
    capsys.readouterr()
    assert script.main(["--runs", str(trained.parent), "--shares", "0.2", "0.4", "0.7", "--draws", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"accuracy at 4 shares, 3 draws of each -> {trained / 'learning_curve.csv'}"
    rows = curves.read_curve(trained / "learning_curve.csv")
    assert [(row["what"], row["share"]) for row in rows] == [
        *(("measured", share) for share in (0.2, 0.4, 0.7, 1.0)),
        *(("predicted", factor) for factor in (1.5, 2.0, 4.0)),
    ]
    own = load_run(trained)
    assert rows[3]["rows"] == len(own.splits[0].train)
    with (trained / "predictions_val.csv").open(newline="") as file:
        told = list(csv.DictReader(file))
    assert rows[3]["mean"] == pytest.approx(np.mean([row["tag"] == row["pred"] for row in told]))
    assert out[-2] == curves.answers(rows)[0]
    section = learning_curve_section(own)
    assert section is not None and section.anchor == "learning-curve"
    assert all(
        f'data-value="{row[name]!r}"' in section.html
        for row in rows
        for name in ("mean", "low", "high")
        if row[name] is not None
    )
    [file] = section.figures
    assert file.svg.startswith("<svg") and file.png.startswith(b"\x89PNG") and file.svg in section.html


def test_there_is_no_section_without_a_curve(tmp_path: Path, trained: Path):
    assert learning_curve_section(replace(load_run(trained), path=tmp_path)) is None
    (tmp_path / curves.FILE).write_text("head,what\nx,predicted\n")
    with pytest.raises(UsageError, match="can't be read.*modeling/learning_curve.py"):
        learning_curve_section(replace(load_run(trained), path=tmp_path))


def test_texts_are_escaped(trained: Path):
    rows = curves.table(
        [replace(synthetic(0, 0.1, 0.6, 0.4), name="<script>alert(1)</script>", majority="<b>", classes=["<b>", "x"])]
    )
    section = learning_curve_section(load_run(trained), rows)
    assert section is not None and "<script" not in section.html and "<b>" not in section.html


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--shares", "2"], "--shares 2: expected shares"),
        (["--out", "modeling"], "learning_curve|modeling"),
    ],
)
def test_the_script_refuses_in_one_line(trained: Path, capsys: pytest.CaptureFixture, argv: list[str], told: str):
    capsys.readouterr()
    assert script.main(["--runs", str(trained.parent), *argv]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert any(word in line for word in told.split("|"))


def test_a_cross_validation_has_no_curve(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_cache(tmp_path / "feats", "clip", 90)
    given = ["--feats", str(tmp_path / "feats"), "--runs", str(tmp_path / "runs"), "--folds", "3"]
    assert train_head.main([*given, "--head", "linear", "--C", "0.1"]) == 0
    capsys.readouterr()
    assert script.main(["--runs", str(tmp_path / "runs")]) == 2
    assert "is a cross-validation" in capsys.readouterr().err
