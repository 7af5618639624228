"""Figures against scikit-learn, scipy, closed forms and brute force."""

import json

import numpy as np
import pytest
import sklearn.metrics as reference
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from modeling.evaluation import metrics
from modeling.evaluation.metrics import (
    bootstrap_intervals,
    confusion_matrix,
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
    found = metrics.figures(labels, probabilities, classes, majority="class 1", resamples=200)
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


# -- calibration ------------------------------------------------------------------------------------------------


def test_ece_by_hand_and_by_brute_force():
    labels = np.array([0, 1, 1, 0])
    probabilities = np.array([[0.9, 0.1], [0.92, 0.08], [0.3, 0.7], [0.0, 1.0]])
    # Bins of width 0.1: two rows in (.9, 1] (.92 wrong, 1.0 wrong), one in (.8, .9] right, one in (.6, .7] right.
    expected = (abs(0 - (0.92 + 1.0)) + (1 - 0.9) + (1 - 0.7)) / 4
    assert expected_calibration_error(labels, probabilities, 10) == pytest.approx(expected)
    labels, logits = example(500, 4)
    probabilities = softmax(logits)
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


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
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
    assert fit_temperature(logits * 2, labels) == pytest.approx(2 * found, rel=1e-6)
    assert fit_temperature(logits + 50, labels) == pytest.approx(found, rel=1e-6)


def test_temperature_of_separable_and_hopeless_rows_is_bounded():
    logits = np.eye(3) * 4
    assert fit_temperature(logits, np.arange(3)) == 0.01
    assert fit_temperature(-logits, np.arange(3)) == 100
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(np.full((2, 2), np.nan), np.array([0, 1]))


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


def test_p_of_nothing_and_of_everything():
    assert metrics.two_sided_p(np.zeros(99)) == metrics.two_sided_p(np.full(99, 1e-17)) == 1
    assert metrics.two_sided_p(np.ones(999)) == metrics.two_sided_p(-np.ones(999)) == 0.002


def test_mean_std():
    results = [{"accuracy": a, "n": 4, "classes": ["x"], "interval": {}} for a in (0.5, 0.7, 0.9)]
    found = mean_std(results)
    assert found["accuracy"] == pytest.approx({"mean": 0.7, "std": 0.2, "n": 3}) and set(found) == {"accuracy", "n"}
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
    ],
)
def test_what_is_no_prediction(labels: list, probabilities: list, match: str):
    with pytest.raises(ValueError, match=match):
        metrics.figures(labels, np.array(probabilities), ["a", "b"])


def test_vectors_of_other_rows():
    with pytest.raises(ValueError, match="2 labels, but 3 predictions"):
        confusion_matrix(np.zeros(2, int), np.zeros(3, int), 2)
