"""The leaderboard: its figures and tests against scikit-learn, scipy and plain writings, what is compared with what, its
layouts; and which run newest and best are."""

import csv
import io
import json
import os
import re
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as reference
from conftest import one_line
from ready_runs import labels_of, noisy, ready_run, template
from scipy.stats import beta, binom, binomtest

import modeling
from feats.errors import UsageError
from modeling import compare_runs
from modeling.evaluation import metrics
from modeling.runs.choosing import open_runs, run_path
from modeling.runs.entries import find_entries
from modeling.runs.layouts import LAYOUTS
from modeling.runs.listing import list_runs, newest_run

N = 200
LABELS = labels_of(N)
GOOD, FAIR, POOR = (noisy(LABELS, share, k) for k, share in enumerate((0.9, 0.75, 0.4)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return template(tmp_path_factory.mktemp("model"))


@pytest.fixture
def three(model: Path, tmp_path: Path) -> Path:
    """Three runs on the same rows, one of them inside a sweep."""
    runs = tmp_path / "runs"
    ready_run(model, runs / "poor", LABELS, POOR, hours=1, seed=1)
    ready_run(model, runs / "good", LABELS, GOOD, hours=2, caches=(["resnet"], ["minilm", "vader"]))
    ready_run(model, runs / "sweep" / "fair", LABELS, FAIR, hours=3)
    return runs


def names(runs: Path, **more) -> list[list[str]]:
    return [[place.name for place in group.places] for group in compare_runs(runs, **more).groups]


# -- figures ----------------------------------------------------------------------------------------------------


def test_figures_are_scikit_learn_s_and_the_accuracy_s_interval_is_jeffreys(three: Path):
    (group,) = compare_runs(three).groups
    assert [place.name for place in group.places] == ["good", "sweep/fair", "poor"]
    for place, predicted in zip(group.places, (GOOD, FAIR, POOR)):
        assert place.figures == pytest.approx(
            {
                "accuracy": reference.accuracy_score(LABELS, predicted),
                "weighted_f1": reference.f1_score(LABELS, predicted, average="weighted"),
                "macro_f1": reference.f1_score(LABELS, predicted, average="macro"),
            }
        )
        right = (LABELS == predicted).sum()
        exact = beta.ppf([0.025, 0.975], right + 0.5, N - right + 0.5)
        np.testing.assert_allclose(place.intervals["accuracy"], exact, atol=0.01)
        assert all(low <= place.figures[name] <= high for name, (low, high) in place.intervals.items())
    share = [(LABELS == k).mean() for k in range(3)]
    assert group.majority["class"] == "neutral" and group.majority["accuracy"] == pytest.approx(share[1])
    assert group.rows == f"{N} validation rows of train, split seed 42"


def test_p_is_near_the_sign_test_s_mid_p_and_holm_is_by_its_definition(three: Path, model: Path):
    near = np.where(np.arange(N) < 6, (GOOD + 1) % 3, GOOD)  # a few rows differ
    ready_run(model, three / "near", LABELS, near)
    (group,) = compare_runs(three).groups
    best, *others = group.places
    assert best.name == group.against == "good" and best.test is None
    by_name = {"near": near, "sweep/fair": FAIR, "poor": POOR}
    for place in others:
        a, b = GOOD == LABELS, by_name[place.name] == LABELS
        only_best, only_other = int((a & ~b).sum()), int((~a & b).sum())
        n = only_best + only_other
        mid = binomtest(only_best, n).pvalue - binom.pmf(only_best, n, 0.5)
        assert place.test.p == pytest.approx(mid, abs=0.02)
        assert place.test.difference == pytest.approx(b.mean() - a.mean())
        assert place.test.low <= place.test.difference <= place.test.high
    p = sorted(place.test.p for place in others)
    adjusted = [max(min(1, (len(p) - j) * p[j]) for j in range(k + 1)) for k in range(len(p))]
    assert sorted(place.test.holm for place in others) == pytest.approx(adjusted)
    assert metrics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_predictions_that_are_the_same_are_not_told_apart(three: Path, model: Path):
    ready_run(model, three / "again", LABELS, GOOD)
    tests = {place.name: place.test for place in compare_runs(three).groups[0].places}
    assert {tests["again"], tests["good"]} > {None} and (tests["again"] or tests["good"]).holm == 1


@pytest.mark.parametrize("by", metrics.AVERAGES)
def test_any_figure_ranks_and_any_run_is_tested_against(three: Path, by: str):
    (group,) = compare_runs(three, by=by, against=three / "poor").groups
    values = [place.figures[by] for place in group.places]
    assert values == sorted(values, reverse=True) and group.by == by and group.against == "poor"
    assert [place.test is None for place in group.places] == [False, False, True]
    assert group.places[0].test.difference == pytest.approx(values[0] - values[2])


def test_what_chose_all_epochs_ranks(model: Path, tmp_path: Path):
    ready_run(model, tmp_path / "a", LABELS, GOOD, monitor="macro_f1")
    assert compare_runs(tmp_path).groups[0].by == "macro_f1"
    ready_run(model, tmp_path / "b", LABELS, FAIR, monitor="loss")
    assert compare_runs(tmp_path).groups[0].by == "accuracy"


def test_the_order_of_a_file_s_rows_does_not_matter(three: Path, model: Path):
    before = compare_runs(three).text("csv")
    file = three / "good" / "predictions_val.csv"
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *rows[::-1]]) + "\n")
    assert compare_runs(three).text("csv") == before


# -- what is compared with what ---------------------------------------------------------------------------------


def test_other_rows_labels_and_classes_are_groups_of_their_own(three: Path, model: Path):
    other_label = LABELS.copy()
    other_label[0] = (other_label[0] + 1) % 3
    ready_run(model, three / "corrected", other_label, GOOD)
    ready_run(model, three / "other_ids", LABELS, GOOD, ids=[f"s{k}" for k in range(N)], split={"seed": 7})
    ready_run(model, three / "other_classes", LABELS, GOOD, classes=["a", "b", "c"])
    folds = [{"folds": 4, "seed": 42, "fold": k + 1} for k in range(4)]
    ready_run(model, three / "folds", labels_of(300, 5), labels_of(300, 5), split=folds, folds=4)
    board = compare_runs(three)
    groups = {tuple(place.name for place in group.places) for group in board.groups}
    alone = {("corrected",), ("other_ids",), ("other_classes",), ("folds",)}
    assert groups == {("good", "sweep/fair", "poor"), *alone}
    titles = [group.rows for group in board.groups]
    assert len(set(titles)) == len(titles) and len(board.groups[0].places) == 3  # the largest first
    assert f"{N} validation rows of train, split seed 7" in titles
    assert "300 validation rows of train, 4 folds, split seed 42" in titles


def test_folds_are_told_with_their_deviation(model: Path, tmp_path: Path):
    folds = [{"folds": 4, "seed": 42, "fold": k + 1} for k in range(4)]
    run = ready_run(model, tmp_path / "folds", LABELS, GOOD, split=folds, folds=4)
    (group,) = compare_runs(tmp_path).groups
    (place,) = group.places
    of_folds = [(LABELS[p] == GOOD[p]).mean() for p in np.array_split(np.arange(N), 4)]
    assert place.deviation == pytest.approx(np.std(of_folds, ddof=1))
    assert place.figures["accuracy"] == json.loads((run / "metrics.json").read_text())["val"]["accuracy"]
    assert place.entry.kind == "4 folds" and f"±{place.deviation:.3f}" in str(compare_runs(tmp_path))


def test_a_run_counts_once_however_it_is_named(three: Path):
    both = compare_runs([three, three / "good", three / "sweep"])
    assert [len(group.places) for group in both.groups] == [3]
    assert [len(group.places) for group in compare_runs([three / "good", three / "poor"]).groups] == [2]


def test_what_cannot_be_compared_is_left_out_and_named(three: Path):
    (three / "poor" / "predictions_val.csv").write_text("id,tag,pred\nr0,positive,nonsense\n")
    (three / "empty").mkdir()
    (three / "bad").mkdir()
    (three / "bad" / "config.json").write_text("[" * 100_000)
    with pytest.warns(UserWarning, match="bad.*config.json.*poor.*predictions_val.csv"):
        board = compare_runs(three)
    assert [[place.name for place in group.places] for group in board.groups] == [["good", "sweep/fair"]]
    assert set(board.left_out) == {three / "bad", three / "poor"}
    for named in ("bad", "poor", "nowhere"):
        with pytest.raises(UsageError) as error:
            compare_runs([three / "good", three / named])
        assert named in one_line(error)
    with pytest.raises(UsageError, match="`by` f1: expected one of accuracy"):
        compare_runs(three, by="f1")
    with pytest.raises(UsageError, match="no complete run in .*train_head.py"):
        compare_runs(three / "empty")


def test_a_hundred_runs(model: Path, tmp_path: Path):
    for k in range(100):
        ready_run(model, tmp_path / f"run{k}", LABELS, noisy(LABELS, 0.3 + k / 160, k), hours=k)
    (group,) = compare_runs(tmp_path).groups
    assert len(group.places) == 100 and sum(place.test is None for place in group.places) == 1
    assert group.places[-1].test.holm < 0.05 and max(p.test.holm for p in group.places[1:]) > 0.05
    assert max(map(len, str(compare_runs(tmp_path)).splitlines())) <= 80


def test_the_public_name_is_the_function_whatever_was_imported():
    import importlib

    for name, home in (("compare_runs", "modeling.runs.leaderboard"), ("list_runs", "modeling.runs.listing")):
        script = importlib.import_module(f"modeling.{name}")
        assert script.main and getattr(modeling, name) is getattr(importlib.import_module(home), name)


# -- layouts ----------------------------------------------------------------------------------------------------

ODD = "a|b & c_d, 50% {x} #1 ~^<i>*"


@pytest.fixture
def odd(model: Path, tmp_path: Path) -> Path:
    """Names that each layout must escape."""
    runs = tmp_path / "odd"
    classes = ["n|g & co", "neu_tral", "po\nsitive"]
    caches = (["c|lip", "x&y"], ["min_ilm", "a,b"])
    ready_run(model, runs / ODD, LABELS, GOOD, classes=classes, caches=caches)
    ready_run(model, runs / "plain", LABELS, POOR, classes=classes)
    return runs


def test_csv_is_read_back(odd: Path):
    board = compare_runs(odd)
    first, second, majority = csv.DictReader(io.StringIO(board.text("csv"), newline=""))
    assert (first["run"], first["caches"], first["rank"]) == (ODD, "c|lip+x&y, min_ilm+a,b", "1")
    places = board.groups[0].places
    for row, place in zip((first, second), places):
        for name in metrics.AVERAGES:
            assert float(row[name]) == place.figures[name]
            assert [float(row[f"{name}_low"]), float(row[f"{name}_high"])] == place.intervals[name]
    assert (first["p"], first["against"], second["against"]) == ("", ODD, ODD)
    assert float(second["p_holm"]) == places[1].test.holm and float(second["difference"]) == places[1].test.difference
    assert (majority["kind"], majority["head"], majority["rank"]) == ("majority", "always neu_tral", "")


def test_markdown_is_a_table_of_equal_rows(odd: Path):
    text = compare_runs(odd).text("markdown")
    table = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    assert len(cells) == 5 and {len(row) for row in cells} == {len(cells[0])}
    assert re.fullmatch(r"\|( -+:? \|)+", table[1]) or re.fullmatch(r"\|(\s*-+:?\s*\|)+", table[1])
    plain = [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in cells]
    assert plain[2][1] == ODD and plain[2][3] == "c|lip+x&y, min_ilm+a,b" and plain[3][1] == "plain"
    assert "<i>" not in text and " *" not in text.replace("\\*", "") and "\n- " in text


def test_latex_rows_have_equal_columns_and_no_bare_specials(odd: Path):
    text = compare_runs(odd).text("latex")
    body = text.split("\\begin{tabular}")[1].split("\\end{tabular}")[0]
    columns, *lines = body.splitlines()
    rows = [line for line in lines if line.endswith("\\\\")]
    width = len(columns.strip("{}"))
    assert len(rows) == 4 and {len(re.split(r"(?<!\\)&", row)) for row in rows} == {width}
    assert text.count("{") - text.count("\\{") == text.count("}") - text.count("\\}")
    for row in rows:
        bare = re.sub(r"\\text\w+\{\}|\$\\pm\$|\\[&%$#_{}]|\\\\$", "", row)
        assert not re.search(r"[%$#_{}~^<>|\\]", bare), bare
    name = r"a\textbar{}b \& c\_d, 50\% \{x\} \#1 \textasciitilde{}\textasciicircum{}\textless{}i\textgreater{}*"
    assert f"1 & {name} & " in text


def test_a_terminal_of_80_columns(odd: Path, three: Path, model: Path):
    caches = ([f"encoder_with_a_long_name_{k}" for k in range(4)], ["minilm", "vader"])
    ready_run(model, three / "wide", LABELS, FAIR, caches=caches)
    for runs in (odd, three):
        text = compare_runs(runs).text()
        assert max(map(len, text.splitlines())) <= 80, text
    assert f"{N} validation rows of train, split seed 42" in text and "optimistic: confirm it on others" in text
    assert "by Holm over 3 runs" in " ".join(text.split()) and re.search(r"^  1  good$", text, re.M)
    with pytest.raises(UsageError, match="`format` html: expected one of terminal, markdown, latex, csv"):
        compare_runs(three).text("html")
    assert len(LAYOUTS) == 4


# -- which run is meant -----------------------------------------------------------------------------------------


def test_the_newest_says_what_it_is_and_names_a_better_one(three: Path):
    said: list[str] = []
    (run,) = open_runs(three, None, say=said.append)
    assert run.path == three / "poor"
    score = {name: (LABELS == p).mean() for name, p in (("poor", POOR), ("good", GOOD))}
    assert said == [
        f"newest run {three / 'poor'}: accuracy {score['poor']:.3f} on {N} validation rows",
        f"run good has accuracy {score['good']:.3f} on the same {N} rows: `run` best",
    ]


def test_the_best_is_the_highest_on_the_newest_s_rows(three: Path, model: Path):
    ready_run(model, three / "elsewhere", labels_of(N, 9), labels_of(N, 9), hours=5)  # all right, of other rows
    said: list[str] = []
    assert [run.path for run in open_runs(three, ["best"], say=said.append)] == [three / "good"]
    assert len(said) == 1 and "optimistic" in said[0]
    ready_run(model, three / "sweep" / "better", LABELS, LABELS, hours=9)
    assert [run.path for run in open_runs(three, ["best", "newest"])] == [three / "sweep" / "better", three / "poor"]
    said.clear()
    open_runs(three, ["best"], say=said.append), open_runs(three, ["poor"], say=said.append)
    assert len(said) == 1  # who names a run isn't told


def test_a_best_newest_has_nothing_better_to_name(three: Path, model: Path):
    ready_run(model, three / "top", LABELS, LABELS, hours=0.1)
    said: list[str] = []
    open_runs(three, None, say=said.append)
    assert len(said) == 1 and said[0].startswith(f"newest run {three / 'top'}: accuracy 1.000")


def test_of_one_head(three: Path, model: Path):
    folds = [{"folds": 2, "seed": 42, "fold": k + 1} for k in range(2)]
    ready_run(model, three / "many", LABELS, LABELS, hours=0.1, folds=2, split=folds)
    (run,) = open_runs(three, ["newest"], single_head=True)
    assert run.path == three / "poor"
    assert run_path(three, "newest") == three / "many" and run_path(three, "best") == three / "many"
    assert open_runs(three, ["best"], single_head=True)[0].path == three / "good"


def test_names_inside_sweeps(three: Path, model: Path):
    assert open_runs(three, ["fair"])[0].path == three / "sweep" / "fair" == run_path(three, "sweep/fair")
    ready_run(model, three / "second" / "fair", LABELS, FAIR)
    with pytest.raises(UsageError, match="several runs in .* have this name .second/fair, sweep/fair."):
        open_runs(three, ["fair"])
    with pytest.raises(UsageError, match="typo is no run.*beside it: poor, good"):
        open_runs(three, ["typo"])
    with pytest.raises(UsageError, match="names a run twice"):
        open_runs(three, ["best", "good"])


def test_a_run_of_the_future_is_not_the_newest(three: Path, model: Path):
    late = ready_run(model, three / "future", LABELS, FAIR, hours=-24 * 365 * 70)
    with pytest.warns(UserWarning, match="future: it is dated 20.*in the future"):
        assert newest_run(three) == three / "poor"
    with pytest.warns(UserWarning, match="in the future"):
        assert list_runs(three)[-1] == late
    with pytest.warns(UserWarning, match="in the future"):
        assert open_runs(three, None)[0].path == three / "poor"
    assert [entry.path for entry in find_entries(three)[0]][-1] == late
    ahead = ready_run(model, three / "ahead", LABELS, FAIR, hours=-0.2)  # another machine's clock
    with pytest.warns(UserWarning):
        assert newest_run(three) == ahead


def spoilt(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def spoil(run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        change(config)
        (run / "config.json").write_text(json.dumps(config))

    return spoil


def fifo(name: str) -> Callable[[Path], object]:
    def spoil(run: Path) -> None:
        (run / name).unlink()
        os.mkfifo(run / name)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        fifo("config.json"),
        fifo("head.safetensors"),
        fifo("predictions_val.csv"),
        lambda run: (run / "config.json").write_text("[" * 200_000 + "]" * 200_000),
        lambda run: (run / "config.json").write_text('{"format_version": 3, "created": ' + "{" * 5 + "}" * 5 + "}"),
        lambda run: (run / "config.json").write_bytes(b"\xff\xfe"),
        lambda run: (run / "head.safetensors").unlink(),
        lambda run: (run / "head.safetensors").write_bytes(b"x"),
        spoilt(lambda c: c.update(created=1e9)),
        spoilt(lambda c: c.update(created="yesterday")),
        spoilt(lambda c: c.update(created=None)),
        spoilt(lambda c: c.update(members=[])),
        spoilt(lambda c: c.update(members=[1])),
        spoilt(lambda c: c.update(members={"a": 1})),
        spoilt(lambda c: c.update(features=["clip"])),
        spoilt(lambda c: c.update(classes=7)),
        spoilt(lambda c: c["members"][0]["train"].update(head="fusion")),
        spoilt(lambda c: c["members"][0]["train"]["head"].update(head=["fusion"])),
        spoilt(lambda c: c.pop("stacked")),
    ],
)
def test_one_bad_folder_does_not_block_the_choice(three: Path, model: Path, spoil: Callable[[Path], object]):
    bad = ready_run(model, three / "bad", LABELS, LABELS, hours=0.01)
    spoil(bad)
    for names, single_head in ((None, False), (None, True), (["best"], False)):
        with pytest.warns(UserWarning, match="/bad") as warned:
            (run,) = open_runs(three, names, single_head=single_head)
        assert run.path == three / ("good" if names else "poor")
        assert all("\n" not in str(w.message) for w in warned)


def test_without_bad_folders_nothing_is_warned_of(three: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_runs(three, None), open_runs(three, ["best"]), compare_runs(three), list_runs(three)


def test_the_only_run_damaged_is_an_error(model: Path, tmp_path: Path):
    run = ready_run(model, tmp_path / "only", LABELS, GOOD)
    (run / "head.safetensors").write_bytes(b"x")
    with pytest.raises(UsageError, match="head.safetensors is damaged"):
        open_runs(tmp_path, None)
    assert datetime.now(UTC) - find_entries(tmp_path)[0][0].made < timedelta(hours=2)
