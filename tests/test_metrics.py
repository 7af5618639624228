"""Figures against scikit-learn, scipy, closed forms and brute force."""

import json

import numpy as np
import pytest
import sklearn.metrics as reference
from scipy import special
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from modeling.evaluation import metrics
from modeling.evaluation.metrics import (
    bootstrap_intervals,
    confusion_matrix,
    evaluate,
    expected_calibration_error,
    fit_temperature,
    format_table,
    log_loss,
    majority_baseline,
    mean_std,
    scores,
    softmax,
)


def example(n: int, n_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and logits (N, C) that are right more often than not."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(n_classes, n, p=rng.dirichlet(np.full(n_classes, 3.0)))
    return labels, rng.normal(size=(n, n_classes)) * 2 + 2 * np.eye(n_classes)[labels]


@pytest.mark.parametrize("n, n_classes", [(400, 2), (400, 3), (60, 17), (1, 3)])
def test_figures_are_scikit_learn_s(n: int, n_classes: int):
    labels, logits = example(n, n_classes)
    probabilities = softmax(logits)
    classes = [f"class {c}" for c in range(n_classes)]
    found = evaluate(labels, probabilities, classes, majority="class 1", resamples=200)
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
    other = evaluate(labels, probabilities, classes, bins=4, resamples=200)
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
    found, expected = (evaluate(labels, p, ["a", "b", "c"]) for p in (probabilities, probabilities.astype(np.float64)))
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
    assert evaluate(labels, probabilities, ["a", "b"])["log_loss"] == log_loss(labels, probabilities)
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


def test_bootstrap_is_that_of_resampled_rows():
    labels, logits = example(200, 3)
    predictions = logits.argmax(1)
    found = bootstrap_intervals(confusion_matrix(labels, predictions, 3), resamples=20_000, seed=1)
    rng = np.random.default_rng(2)
    drawn = []
    for _ in range(4000):  # brute force: draw the rows themselves
        rows = rng.integers(0, 200, 200)
        figures = scores(confusion_matrix(labels[rows], predictions[rows], 3))
        drawn.append([figures[name] for name in ("accuracy", "weighted_f1", "macro_f1")])
    expected = np.percentile(drawn, [2.5, 97.5], axis=0).T
    np.testing.assert_allclose([found[k] for k in ("accuracy", "weighted_f1", "macro_f1")], expected, atol=0.008)
    assert found["level"] == 0.95


def test_bootstrap_of_accuracy_is_binomial_and_seeded():
    confusion = np.array([[240, 60], [40, 60]])
    first, again, other = (bootstrap_intervals(confusion, resamples=20_000, seed=s) for s in (0, 0, 1))
    assert first == again != other
    exact = binomtest(300, 400).proportion_ci(method="wilson")
    np.testing.assert_allclose(first["accuracy"], [exact.low, exact.high], atol=0.005)


def test_interval_of_perfect_predictions():
    found = bootstrap_intervals(np.diag([5, 5]))
    assert found["accuracy"] == found["weighted_f1"] == [1.0, 1.0]


@pytest.mark.parametrize("figure", ["accuracy", "weighted_f1", "macro_f1"])
def test_resampled_figures_are_those_of_resampled_rows(figure: str, monkeypatch: pytest.MonkeyPatch):
    """The same rows for all predictions: differences are as narrow as paired ones are."""
    labels, logits = example(200, 3)
    noise = np.random.default_rng(5).normal(size=logits.shape) * 1.5
    predictions = np.stack([logits.argmax(1), (logits + noise).argmax(1), logits.argmax(1)])
    monkeypatch.setattr(metrics, "BLOCK_COUNTS", 100_000)  # several blocks
    found = metrics.resampled(labels, predictions, 3, figure, resamples=20_000)
    assert found.shape == (20_000, 3) and (found[:, 0] == found[:, 2]).all()
    assert np.array_equal(found, metrics.resampled(labels, predictions, 3, figure, resamples=20_000))
    assert not np.array_equal(found, metrics.resampled(labels, predictions, 3, figure, resamples=20_000, seed=1))
    rng, drawn = np.random.default_rng(2), []
    for _ in range(3000):
        rows = rng.integers(0, 200, 200)
        drawn.append([scores(confusion_matrix(labels[rows], p[rows], 3))[figure] for p in predictions[:2]])
    drawn = np.array(drawn)
    np.testing.assert_allclose(metrics.interval(found[:, 0]), np.percentile(drawn[:, 0], [2.5, 97.5]), atol=0.008)
    found, drawn = found[:, 1] - found[:, 0], drawn[:, 1] - drawn[:, 0]
    np.testing.assert_allclose(metrics.interval(found), np.percentile(drawn, [2.5, 97.5]), atol=0.008)
    expected = min(1, 2 * min((drawn <= 0).mean(), (drawn >= 0).mean()))
    assert metrics.two_sided_p(found) == pytest.approx(expected, abs=0.02)


def test_an_interval_holds_its_share_of_the_samples():
    drawn = np.random.default_rng(0).permutation(np.linspace(0, 1, 1001))
    assert metrics.interval(drawn) == pytest.approx([0.025, 0.975])
    assert metrics.interval(drawn, 0.5) == pytest.approx([0.25, 0.75])


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
        "head      D  accuracy  note",
        "------  ---  --------  ----",
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
    assert format_table(rows, ["a", "b", "c"]).split("\n")[0] == "a    b        c"


def test_the_rows_of_a_set_of_figures():
    """What is under a name, its intervals, and the majority."""
    labels, logits = example(100, 2)
    figures = evaluate(labels, softmax(logits), ["x", "y"], majority="y")
    rows = metrics.figure_rows(figures, "val")
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
        evaluate(labels, np.array(probabilities), ["a", "b"])


def test_vectors_of_other_rows():
    with pytest.raises(ValueError, match="2 labels, but 3 predictions"):
        confusion_matrix(np.zeros(2, int), np.zeros(3, int), 2)
