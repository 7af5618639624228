"""Figures against scikit-learn, scipy, closed forms and brute force."""

import json

import numpy as np
import pytest
import sklearn.metrics as reference
from scipy import special
from scipy.optimize import minimize_scalar
from scipy.stats import beta, binomtest

from modeling.evaluation import metrics, text_tables
from modeling.evaluation.metrics import (
    confusion_matrix,
    expected_calibration_error,
    fit_temperature,
    intervals,
    log_loss,
    majority_baseline,
    mean_std,
    scores,
    softmax,
)
from modeling.evaluation.text_tables import format_table


def example(n: int, n_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and logits (N, C) that are right more often than not."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(n_classes, n, p=rng.dirichlet(np.full(n_classes, 3.0)))
    return labels, rng.normal(size=(n, n_classes)) * 2 + 2 * np.eye(n_classes)[labels]


@pytest.mark.parametrize(
    ("labels", "predicted", "expected"),
    [
        ([0, 1, 2, 1], [1, 1, 1, 1], "b"),
        ([0, 1, 2, 1], [1, 1, 1, 2], None),
        ([1, 1, 1], [1, 1, 1], None),  # right, as far as anybody can tell
        ([1], [2], None),
    ],
)
def test_predicting_one_class_is_noticed(labels: list[int], predicted: list[int], expected: str | None):
    figures = metrics.figures(labels, np.eye(3)[predicted], ["a", "b", "c"], majority="b")
    assert figures["collapsed"] == expected
    name = text_tables.figure_rows(figures, "val")[0]["rows"]
    assert name == ("val (always b)" if expected else "val")


@pytest.mark.parametrize("n, n_classes", [(400, 2), (400, 3), (60, 17), (1, 3)])
def test_figures_are_scikit_learn_s(n: int, n_classes: int):
    labels, logits = example(n, n_classes)
    probabilities = softmax(logits)
    classes = [f"class {c}" for c in range(n_classes)]
    found = metrics.figures(labels, probabilities, classes, majority="class 1", draws=200)
    predictions = logits.argmax(1)
    every = list(range(n_classes))
    for average in ("weighted", "macro"):
        expected = reference.precision_recall_fscore_support(
            labels, predictions, labels=every, average=average, zero_division=0
        )
        names = [f"{average}_{name}" for name in ("precision", "recall", "f1")]
        np.testing.assert_allclose([found[name] for name in names], expected[:3], rtol=1e-12)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(labels, predictions), rel=1e-12)
    report = reference.classification_report(
        labels, predictions, labels=every, target_names=classes, output_dict=True, zero_division=0
    )
    for name in classes:
        expected = report[name]
        expected["f1"] = expected.pop("f1-score")
        assert found["per_class"][name] == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(found["confusion"], reference.confusion_matrix(labels, predictions, labels=every))
    assert found["log_loss"] == pytest.approx(reference.log_loss(labels, probabilities, labels=every), rel=1e-9)
    assert found["n"] == n and found["classes"] == classes
    assert json.loads(json.dumps(found)) == found  # plain JSON values all the way down
    low, high = found["interval"]["accuracy"]
    assert low <= found["accuracy"] <= high
    assert found["majority"]["class"] == "class 1" and found["majority"]["accuracy"] == np.mean(labels == 1)
    assert found["ece"] == expected_calibration_error(labels, probabilities)
    other = metrics.figures(labels, probabilities, classes, bins=4, draws=200)
    assert other["ece"] == expected_calibration_error(labels, probabilities, 4) and "majority" not in other


def test_figures_of_single_rows():
    """A class with one row, and one row in all, count as they are."""
    figures = scores(np.array([[1, 0], [0, 0]]))
    assert (figures["accuracy"], figures["weighted_f1"], figures["macro_recall"]) == (1, 1, 0.5)
    assert all(value == 1 for value in scores(np.eye(3, dtype=int)).values())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_figures_are_computed_in_double_precision(dtype: type):
    """Whatever the probabilities and logits come in: the figures are those of the same numbers."""
    labels, logits = example(200, 3)
    given, probabilities = logits.astype(dtype), softmax(logits).astype(dtype)
    assert np.array_equal(softmax(given), softmax(given.astype(np.float64)))
    assert fit_temperature(given, labels) == fit_temperature(given.astype(np.float64), labels)
    for figure in (log_loss, expected_calibration_error):
        assert figure(labels, probabilities) == figure(labels, probabilities.astype(np.float64))
    found, expected = (
        metrics.figures(labels, p, ["a", "b", "c"]) for p in (probabilities, probabilities.astype(np.float64))
    )
    assert found == expected


def test_scores_of_many_confusion_matrices_at_once():
    confusions = np.random.default_rng(0).integers(0, 9, (2, 5, 3, 3))
    stacked = scores(confusions)
    for index in np.ndindex(2, 5):
        for name, value in scores(confusions[index]).items():
            assert stacked[name][index] == value


def test_majority_baseline_is_a_constant_prediction():
    labels = np.array([0, 0, 1, 2, 2, 2, 2])
    found = majority_baseline(labels, ["a", "b", "c"], "a")  # most common in training, not here
    always = np.zeros(7, int)
    assert found["class"] == "a" and found["accuracy"] == pytest.approx(2 / 7)
    for average in ("weighted", "macro"):
        expected = reference.f1_score(labels, always, average=average, labels=[0, 1, 2], zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="majority class 'd' is none of a, b, c"):
        majority_baseline(labels, ["a", "b", "c"], "d")


def test_log_loss_of_a_certain_error_is_finite():
    probabilities = np.array([[1.0, 0.0], [0.5, 0.5]])
    labels = np.array([1, 0])
    assert log_loss(labels, probabilities) == pytest.approx(reference.log_loss(labels, probabilities))
    assert metrics.figures(labels, probabilities, ["a", "b"])["log_loss"] == log_loss(labels, probabilities)
    assert log_loss(np.array([0]), np.array([[1.004, 0.0]])) == 0  # a probability in half precision


# -- calibration ------------------------------------------------------------------------------------------------


def test_ece_by_hand_and_by_brute_force():
    labels = np.array([0, 1, 1, 0])
    probabilities = np.array([[0.9, 0.1], [0.92, 0.08], [0.3, 0.7], [0.0, 1.0]])
    # Bins of width 0.1: two rows in (.9, 1] (.92 wrong, 1.0 wrong), one in (.8, .9] right, one in (.6, .7] right.
    expected = (abs(0 - (0.92 + 1.0)) + (1 - 0.9) + (1 - 0.7)) / 4
    assert expected_calibration_error(labels, probabilities, 10) == pytest.approx(expected)
    rows = np.full((2, 17), 1 / 17)  # in the two lowest of 15 bins: 1/17 is wrong, 2/17 right
    rows[1] = [2 / 17, *[15 / 17 / 16] * 16]
    expected = (1 / 17 + 1 - 2 / 17) / 2
    assert expected_calibration_error(np.array([16, 0]), rows) == pytest.approx(expected)
    for n_classes, scale in ((4, 1.0), (17, 0.2)):  # confidences of 1/17 and up fill the lowest bins, too
        labels, logits = example(500, n_classes)
        probabilities = softmax(logits * scale)
        confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
        expected = 0.0
        for b in range(15):
            inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
            if inside.any():
                expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
        assert expected_calibration_error(labels, probabilities) == pytest.approx(expected, rel=1e-12)


def test_perfect_calibration_is_near_zero():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 200_000)
    labels = (rng.random(len(p)) > p).astype(int)
    assert expected_calibration_error(labels, np.stack([p, 1 - p], 1)) < 0.006


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0, 40.0])  # the last: a temperature of 77
def test_temperature_minimises_the_log_loss(scale: float):
    labels, logits = example(300, 3)
    logits = logits * scale
    found = fit_temperature(logits, labels)
    best = minimize_scalar(
        lambda t: reference.log_loss(labels, softmax(logits, np.exp(t)), labels=[0, 1, 2]),
        bounds=(np.log(0.01), np.log(100)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert found == pytest.approx(np.exp(best.x), rel=1e-4)
    if 2 * found < 100:
        assert fit_temperature(logits * 2, labels) == pytest.approx(2 * found, rel=1e-6)
    assert fit_temperature(logits + 50, labels) == pytest.approx(found, rel=1e-6)


def test_temperature_of_separable_and_hopeless_rows_is_bounded():
    logits = np.eye(3) * 4
    assert fit_temperature(logits, np.arange(3)) == 0.01
    assert fit_temperature(-logits, np.arange(3)) == fit_temperature(-logits / 100, np.arange(3)) == 100
    labels, logits = example(300, 3)  # of an optimum at 1.9
    assert fit_temperature(logits * 0.004, labels) == 0.01 and fit_temperature(logits * 80, labels) == 100
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(np.full((2, 2), np.nan), np.array([0, 1]))


def test_softmax_is_scipy_s():
    logits = example(50, 4)[1]
    np.testing.assert_allclose(softmax(logits), special.softmax(logits, axis=1), rtol=1e-12)
    np.testing.assert_allclose(softmax(logits, 3.0), special.softmax(logits / 3, axis=1), rtol=1e-12)


def test_softmax_does_not_overflow():
    np.testing.assert_allclose(softmax(np.array([[1e4, 0.0], [-1e4, -1e4]])), [[1, 0], [0.5, 0.5]])


# -- intervals and tests ----------------------------------------------------------------------------------------


FIGURES = ("accuracy", "weighted_f1", "macro_f1")


@pytest.mark.parametrize("right, n", [(300, 400), (6, 6), (0, 6), (1, 20), (19, 20), (1, 1)])
def test_interval_of_the_accuracy_is_jeffreys_s(right: int, n: int):
    """Whatever the classes: three of them, the rows spread unevenly."""
    confusion = np.zeros((3, 3), int)
    confusion[0, 0], confusion[1, 1], confusion[2, 0] = right - right // 3, right // 3, n - right
    found = intervals(confusion, draws=50_000)
    expected = beta(right + 0.5, n - right + 0.5).ppf([0.025, 0.975])
    expected = [0 if right == 0 else expected[0], 1 if right == n else expected[1]]
    np.testing.assert_allclose(found["accuracy"], expected, atol=0.008)
    assert found["level"] == 0.95 and found == intervals(confusion, draws=50_000) != intervals(confusion, seed=1)
    narrower = intervals(confusion, level=0.5)["accuracy"]
    assert np.diff(narrower) < 0.6 * np.diff(found["accuracy"])


@pytest.mark.parametrize("n, n_classes", [(200, 3), (12, 2), (30, 5)])
def test_intervals_are_those_of_the_posterior(n: int, n_classes: int):
    """Confusion matrices drawn from the Dirichlet distribution as numpy knows it, and the figures' definitions."""
    labels, logits = example(n, n_classes)
    confusion = confusion_matrix(labels, logits.argmax(1), n_classes)
    found = intervals(confusion, draws=20_000)
    right = np.eye(n_classes, dtype=bool)
    prior = np.where(right, 0.5 / right.sum(), 0.5 / (~right).sum())
    drawn = np.random.default_rng(3).dirichlet((confusion + prior).ravel(), 20_000).reshape(-1, n_classes, n_classes)
    of_class, accuracy = drawn.sum(2), sum(drawn[:, c, c] for c in range(n_classes))
    f1 = np.stack([2 * drawn[:, c, c] / (of_class[:, c] + drawn[:, :, c].sum(1)) for c in range(n_classes)], 1)
    expected = np.percentile([accuracy, (f1 * of_class).sum(1), f1.mean(1)], [2.5, 97.5], axis=1).T
    np.testing.assert_allclose([found[name] for name in FIGURES], expected, atol=0.01)


def test_intervals_at_the_edges():
    """All right: down to what as many rows can tell; all wrong; a class without rows; a single class."""
    for confusion, figure in ((np.diag([5, 5]), 1.0), (np.diag([5, 5])[::-1], 0.0)):
        found = intervals(confusion)
        for name in FIGURES:
            low, high = found[name]
            assert figure in (low, high) and 0.15 < high - low < 0.5
    low, high = intervals(np.diag([5, 5, 0]))["macro_f1"]  # 2 / 3, yet of the absent class nothing is known
    assert low < 0.6 and high > 0.95
    assert intervals(np.array([[4]]))["macro_f1"] == [1.0, 1.0]


@pytest.mark.parametrize("n, shares, recalls", [
    (6, (0.5, 0.5), (0.9, 0.9)),
    (6, (0.6, 0.3, 0.1), (0.95, 0.9, 0.6)),
    (20, (0.8, 0.2), (0.99, 0.99)),
    (20, (0.6, 0.3, 0.1), (0.8, 0.7, 0.5)),
    (100, (0.6, 0.3, 0.1), (0.99, 0.99, 0.95)),
    (400, (0.6, 0.3, 0.1), (0.8, 0.6, 0.3)),
])  # fmt: skip
def test_intervals_cover_the_truth_as_often_as_they_say(n: int, shares: tuple[float, ...], recalls: tuple[float, ...]):
    """Of rows drawn from known shares of cells, and without being wider than Wilson's interval of the accuracy."""
    right, n_classes = np.eye(len(shares), dtype=bool), len(shares)
    missed = np.array(shares) * (1 - np.array(recalls)) / (n_classes - 1)
    cells = np.where(right, (np.array(shares) * recalls)[:, None], missed[:, None])
    truth = scores(cells)
    covered, width, wilson = {name: [] for name in FIGURES}, [], []
    for seed, counts in enumerate(np.random.default_rng(0).multinomial(n, cells.ravel(), 400)):
        confusion = counts.reshape(cells.shape)
        found = intervals(confusion, draws=400, seed=seed)
        for name in FIGURES:
            low, high = found[name]
            covered[name].append(low - 1e-12 <= truth[name] <= high + 1e-12)
        width.append(np.diff(found["accuracy"]))
        exact = binomtest(int(np.trace(confusion)), n).proportion_ci(method="wilson")
        wilson.append(exact.high - exact.low)
    shares_covered = {name: np.mean(of_figure) for name, of_figure in covered.items()}
    assert min(shares_covered["accuracy"], shares_covered["weighted_f1"]) > 0.91, shares_covered
    assert shares_covered["macro_f1"] > (0.91 if n > 20 else 0.84), shares_covered
    assert np.mean(width) < 1.02 * np.mean(wilson)


def test_interval_of_the_mean_over_seeds():
    """Of one prediction, or of equal ones: that of its confusion matrix. Of others that of drawing rows, if of many."""
    labels, logits = example(400, 3)
    predictions = (logits + np.random.default_rng(5).normal(size=(4, *logits.shape)) * 2).argmax(2)
    rng, drawn = np.random.default_rng(2), []
    for _ in range(2000):
        rows = rng.integers(0, 400, 400)
        figures = scores(np.stack([confusion_matrix(labels[rows], p[rows], 3) for p in predictions]))
        drawn.append([figures[name].mean() for name in FIGURES])
    expected = dict(zip(FIGURES, np.percentile(drawn, [2.5, 97.5], axis=0).T, strict=True))
    alone = intervals(confusion_matrix(labels, predictions[0], 3), draws=10_000)
    for name in FIGURES:
        for same in (predictions[:1], predictions[[0, 0, 0]]):
            found = metrics.interval_of_mean(labels, same, 3, name, draws=10_000)
            np.testing.assert_allclose(found, alone[name], atol=0.004)
        found = metrics.interval_of_mean(labels, predictions, 3, name, draws=10_000)
        np.testing.assert_allclose(found, expected[name], atol=0.008)
        assert np.diff(found) < np.diff(alone[name])
    right = np.tile([0, 1, 2, 2, 2, 0], (3, 1))
    low, high = metrics.interval_of_mean(right[0], right, 3, "accuracy", draws=20_000)
    assert high == 1 and low == pytest.approx(beta(6.5, 0.5).ppf(0.025), abs=0.01)


def test_draws_in_blocks_are_as_many(monkeypatch: pytest.MonkeyPatch):
    confusion = np.array([[240, 60], [40, 60]])
    whole = intervals(confusion)
    monkeypatch.setattr(metrics, "BLOCK_COUNTS", 1000)
    assert intervals(confusion) == whole


@pytest.mark.parametrize("figure", FIGURES)
def test_resampled_figures_are_those_of_resampled_rows(figure: str, monkeypatch: pytest.MonkeyPatch):
    """The same rows for all predictions: differences are as narrow as paired ones are."""
    labels, logits = example(200, 3)
    noise = np.random.default_rng(5).normal(size=logits.shape) * 1.5
    predictions = np.stack([logits.argmax(1), (logits + noise).argmax(1), logits.argmax(1)])
    monkeypatch.setattr(metrics, "BLOCK_COUNTS", 100_000)  # several blocks
    found = metrics.resampled(labels, predictions, 3, figure, draws=20_000)
    assert found.shape == (20_000, 3) and (found[:, 0] == found[:, 2]).all()
    assert np.array_equal(found, metrics.resampled(labels, predictions, 3, figure, draws=20_000))
    assert not np.array_equal(found, metrics.resampled(labels, predictions, 3, figure, draws=20_000, seed=1))
    rng, drawn = np.random.default_rng(2), []
    for _ in range(3000):
        rows = rng.integers(0, 200, 200)
        drawn.append([scores(confusion_matrix(labels[rows], p[rows], 3))[figure] for p in predictions[:2]])
    drawn = np.array(drawn)
    np.testing.assert_allclose(*(np.percentile(x, [2.5, 97.5], axis=0) for x in (found[:, :2], drawn)), atol=0.008)
    found, drawn = found[:, 1] - found[:, 0], drawn[:, 1] - drawn[:, 0]
    np.testing.assert_allclose(*(np.percentile(x, [2.5, 97.5]) for x in (found, drawn)), atol=0.008)
    expected = min(1, 2 * min((drawn <= 0).mean(), (drawn >= 0).mean()))
    assert metrics.two_sided_p(found) == pytest.approx(expected, abs=0.02)


def test_p_of_nothing_and_of_everything():
    assert metrics.two_sided_p(np.zeros(99)) == metrics.two_sided_p(np.full(99, 1e-17)) == 1
    assert metrics.two_sided_p(np.ones(999)) == metrics.two_sided_p(-np.ones(999)) == 0.002


def test_mean_std():
    results = [{"accuracy": a, "n": 4, "classes": ["x"], "interval": {}} for a in (0.5, 0.7, 0.9)]
    found = mean_std(results)
    assert found["accuracy"] == pytest.approx({"mean": 0.7, "std": 0.2, "n": 3}) and set(found) == {"accuracy", "n"}
    assert mean_std(results[:2])["accuracy"]["std"] == pytest.approx(0.02**0.5)
    assert mean_std(results[:1])["accuracy"] == {"mean": 0.5, "std": None, "n": 1} and mean_std([]) == {}


# -- tables and checks ------------------------------------------------------------------------------------------

ROWS = [{"head": "fusion", "accuracy": 0.71234, "D": 256}, {"head": "a|b", "accuracy": None, "D": 8}]


def test_terminal_table():
    assert format_table(ROWS, ["head", "D", "accuracy", "note"]).split("\n") == [
        "head      D  accuracy",
        "------  ---  --------",
        "fusion  256     0.712",
        "a|b       8",
    ]


def test_markdown_table():
    assert format_table(ROWS, ["head", "D", "accuracy"], markdown=True, digits=2).split("\n") == [
        "| head   |   D | accuracy |",
        "| ------ | --: | -------: |",
        "| fusion | 256 |     0.71 |",
        r"| a\|b   |   8 |          |",
    ]
    assert format_table([], ["head"]) == "head\n----"
    assert format_table([{"head": "two\nlines"}], ["head"], markdown=True).split("\n")[2:] == ["| two lines |"]


def test_columns_that_are_not_all_numbers_stand_to_the_left():
    rows = [{"a": 1, "b": None, "c": 0.5}, {"a": "two", "b": None, "c": np.float32(2)}]
    assert format_table(rows, ["a", "b", "c"]).split("\n")[0] == "a        c"


def test_the_rows_of_a_set_of_figures():
    """What is under a name, its intervals, and the majority."""
    labels, logits = example(100, 2)
    figures = metrics.figures(labels, softmax(logits), ["x", "y"], majority="y")
    rows = text_tables.figure_rows(figures, "val")
    assert [row["rows"].strip() for row in rows] == ["val", "95 %", "always y"]
    for name in metrics.AVERAGES:
        low, high = figures["interval"][name]
        expected = [figures[name], f"{low:.3f}-{high:.3f}", figures["majority"][name]]
        assert [row[name] for row in rows] == expected
    assert rows[0]["log_loss"] == figures["log_loss"]


@pytest.mark.parametrize(
    "labels, probabilities, match",
    [
        ([0, 1], [[0.5, 0.5]], "for 2 rows and 2 classes"),
        ([], np.empty((0, 2)), "for 0 rows"),
        ([0, 2], [[0.5, 0.5]] * 2, "classes 0 to 2, expected 0 to 1"),
        ([-1, 0], [[0.5, 0.5]] * 2, "classes -1 to 0"),
        ([0.5], [[0.5, 0.5]], "must be .N,. integers"),
        (["a"], [[0.5, 0.5]], "must be .N,. integers"),
        ([0], [[np.nan, 0.5]], "finite and not negative"),
        ([0], [[-0.5, 1.5]], "finite and not negative"),
        ([0], [[3.0, 1.0]], "sum to 1 in each row; are these logits"),
        ([0, 0], [[0.5, 0.5], [0.6, 0.5]], "sum to 1 in each row"),
    ],
)
def test_what_is_no_prediction(labels: list, probabilities: list, match: str):
    with pytest.raises(ValueError, match=match):
        metrics.figures(labels, np.array(probabilities), ["a", "b"])


def test_vectors_of_other_rows():
    with pytest.raises(ValueError, match="2 labels, but 3 predictions"):
        confusion_matrix(np.zeros(2, int), np.zeros(3, int), 2)
