"""audit_labels.py as a user runs it: wrong labels stand first, and nothing predicts a row that has seen it."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from caches import CLASSES, make_cache, make_tags
from conftest import content, make_course

from feats import pixels_extract_feats, vader_extract_feats
from modeling import audit_labels, bad_cases, sweep_heads, train_head
from modeling.auditing.suspects import HEADER, audit_experiment, ranked
from modeling.experiments.experiment import experiment_of_run
from modeling.runs.folder import load_run
from modeling.runs.listing import newest_run

HELD_OUT = {"val (not for tuning)", "test (not for tuning)"}
HEADS = {
    "kernel": ["--head", "kernel", "--gamma", "1", "--ridge", "1"],
    "linear": ["--head", "linear", "--C", "0.1"],
    "gradient": ["--head", "concat", "--D", "8", "--ep", "12", "--bs", "32", "--lr", "1e-2"],
    "seeds": ["--head", "mlp", "--D", "8", "--ep", "12", "--bs", "32", "--lr", "1e-2", "--seeds", "2"],
}


def separable(folder: Path, tags: Sequence[str], given: Sequence[str], **facts: np.ndarray) -> None:
    """A cache whose features tell `tags` without doubt, and whose labels are `given`."""
    rng = np.random.default_rng(0)
    place = np.array([CLASSES.index(tag) for tag in tags])
    centres = {side: rng.normal(size=(3, 8)) * 3 for side in ("image", "text")}
    changed = {
        f"{side}_feats": (x[place] + rng.normal(size=(len(tags), 8))).astype(np.float16) for side, x in centres.items()
    }
    make_cache(folder, "clip", tags=given, changed=changed, facts=facts)


def train(root: Path, *argv: str) -> Path:
    given = ["--vtype", "clip", "--feats", str(root / "feats"), "--runs", str(root / "runs")]
    assert train_head.main([*given, *argv]) == 0
    return newest_run(root / "runs")


def audit(root: Path, *argv: str) -> list[dict[str, str]]:
    assert audit_labels.main(["--runs", str(root / "runs"), *argv]) == 0
    out = Path(argv[argv.index("--out") + 1]) if "--out" in argv else newest_run(root / "runs") / "label_audit.csv"
    return rows_of(out)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def refused(root: Path, capsys: pytest.CaptureFixture, *argv: str) -> str:
    capsys.readouterr()
    assert audit_labels.main(["--runs", str(root / "runs"), *argv]) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and all(line.startswith("warning: ") for line in warnings)
    return error


@pytest.mark.parametrize("head", ["linear", "gradient", "seeds"])
def test_flipped_labels_stand_in_the_first_tenth(head: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    rng, tags = np.random.default_rng(3), make_tags(300)
    flipped = rng.choice(300, 15, replace=False).tolist()
    given = list(tags)
    for row in flipped:
        given[row] = str(rng.choice([name for name in CLASSES if name != tags[row]]))
    separable(tmp_path / "feats", tags, given)
    path = train(tmp_path, *HEADS[head], "--val-ratio", "0.2", "--test-ratio", "0.1", "--split-seed", "1")
    capsys.readouterr()
    rows = audit(tmp_path)
    last = capsys.readouterr().out.splitlines()[-1]
    suspects = [row for row in rows if row["why"]]
    assert last == (
        f"300 labels ranked, {len(suspects)} of them suspect, by 5-fold predictions -> {path / 'label_audit.csv'}"
    )
    assert list(rows[0]) == list(HEADER) and [int(row["rank"]) for row in rows] == list(range(1, 301))
    assert sorted(row["id"] for row in rows) == sorted(f"p{i}" for i in range(300))
    first = {row["id"]: row for row in rows[:30]}
    found = [row for row in flipped if f"p{row}" in first]
    assert len(found) >= 12
    for row in found:
        line = first[f"p{row}"]
        assert (line["given"], line["suggested"]) == (given[row], tags[row]) and float(line["confidence"]) < 0.5
    assert sum(first[f"p{row}"]["why"] == "model" for row in found) > len(found) / 2
    assert {row["why"] for row in rows} == {"model", ""}
    split = content(path, "split")
    part_of = {i: part for part in ("train", "val", "test") for i in split[part]}
    assert all(row["part"].split()[0] == part_of[row["id"]] for row in rows)
    assert {row["part"] for row in rows} == {"train", *HELD_OUT}
    assert {row["part"] for row in map(first.get, (f"p{row}" for row in found))} & HELD_OUT  # found there, too


def test_duplicates_in_conflict_rank_above_clean_rows(tmp_path: Path):
    tags = make_tags(120)
    given = list(tags)
    pictures = np.arange(120) + 1
    pictures[[50, 80]] = pictures[[1, 2]]  # 1 negative, 2 and 80 positive, 50 positive
    pictures[[64, 70]] = pictures[4]  # 4, 64 positive and 70 positive: in agreement
    separable(tmp_path / "feats", tags, given, image_hash=pictures, text_key=np.arange(120) + 1)
    assert (tags[1], tags[50], tags[2], tags[80]) == ("negative", "positive", "positive", "positive")
    train(tmp_path, *HEADS["linear"])
    rows = {row["id"]: row for row in audit(tmp_path)}
    in_conflict = [rows["p1"], rows["p50"]]
    assert all(row["why"] in ("duplicates", "both") for row in in_conflict)
    clean = [int(row["rank"]) for row in rows.values() if not row["why"]]
    assert len(clean) > 100 and max(int(row["rank"]) for row in in_conflict) < min(clean)
    assert {row["why"] for name, row in rows.items() if name not in ("p1", "p50")} <= {"", "model"}
    assert len({row["suggested"] for row in in_conflict if row["why"] == "duplicates"}) == 1


def test_the_order_of_the_queue():
    """By hand: suspects before others, each by its label's probability times its share among the duplicates."""
    ids = [f"r{k}" for k in range(12)]
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    given = np.array([0.9, 0.9, 0.8, 0.8, 0.95, 0.02, 0.7, 0.85, 0.9, 0.9, 0.6, 0.9])
    probabilities = np.where(labels[:, None] == [0, 1], given[:, None], 1 - given[:, None])
    groups = {name: k for k, name in enumerate(ids)} | {"r0": 99, "r1": 99, "r2": 98, "r4": 98}  # r2 and r4 agree
    queue = ranked(ids, labels, probabilities, ["a", "b"], groups, {"r5": "train"})
    assert [row.id for row in queue[:3]] == ["r5", "r0", "r1"]
    assert [(row.why, row.suggested, row.part) for row in queue[:3]] == [
        ("model", "a", "train"),
        ("duplicates", "a", "unused"),  # 0.9 + 0.1 each: the first class of a tie
        ("duplicates", "a", "unused"),
    ]
    rest = [row for row in queue if not row.why]
    assert [row.confidence for row in rest] == sorted(row.confidence for row in rest) and len(rest) == 9
    assert rest[0].id == "r10"


@pytest.mark.parametrize("duplicates", ["together", "apart"])
def test_no_row_nor_copy_of_it_has_a_say_in_what_predicts_it(duplicates: str, tmp_path: Path):
    """Of noise a kernel this narrow knows only the rows it was trained on."""
    rng = np.random.default_rng(0)
    rows = np.arange(160) // 2  # 2k and 2k + 1 are the same pair
    changed = {name: rng.normal(size=(160, 8))[rows].astype(np.float16) for name in ("image_feats", "text_feats")}
    tags = list(rng.choice(["a", "b"], 80).repeat(2))
    make_cache(
        tmp_path / "feats", "clip", tags=tags, changed=changed, facts={"image_hash": rows + 1, "text_key": rows + 1}
    )
    head = ["--head", "kernel", "--gamma", "8", "--ridge", "0.001", "--val-ratio", "0.25", "--test-ratio", "0.2"]
    path = train(tmp_path, *head, "--duplicates", duplicates)
    queue = audit(tmp_path)
    for part in ("train", "val (not for tuning)", "test (not for tuning)"):
        right = [float(row["confidence"]) > 0.5 for row in queue if row["part"] == part]
        assert len(right) >= 30 and np.mean(right) < 0.72, part  # a coin's share of pairs
    run = load_run(path)
    experiment = audit_experiment(run, experiment_of_run(run, run.source, "cpu"), 5)
    split, group_of = run.splits[0], dict(zip([f"p{i}" for i in range(160)], rows.tolist(), strict=True))
    assert sorted(name for fold in experiment.splits for name in fold.test) == split.train
    for fold in experiment.splits:
        seen = {*fold.train, *fold.val}
        assert seen | set(fold.test) == set(split.train) and not seen & set(fold.test)
        assert not {group_of[name] for name in seen} & {group_of[name] for name in fold.test}


def test_training_rows_are_predicted_as_in_bad_cases(tmp_path: Path):
    tags = make_tags(90)
    given = [CLASSES[(CLASSES.index(tag) + 1) % 3] if i % 9 == 0 else tag for i, tag in enumerate(tags)]
    separable(tmp_path / "feats", tags, given)
    path = train(tmp_path, *HEADS["linear"], "--val-ratio", "0.2")
    assert bad_cases.main(["--runs", str(tmp_path / "runs"), "--folds", "3"]) == 0
    wrong = {row["id"]: row for row in rows_of(path / "bad_cases.csv")}
    rows = audit(tmp_path, "--folds", "3", "--out", str(tmp_path / "new" / "queue.csv"))
    differing = {
        row["id"]
        for row in rows
        if row["part"] == "train" and row["why"] != "duplicates"
        if row["given"] != row["suggested"]
    }
    assert differing == set(wrong) and len(wrong) > 5
    for row in rows:
        if row["id"] in wrong:
            own = wrong[row["id"]]
            assert float(row["confidence"]) == pytest.approx(float(own[f"p_{own['tag']}"]), abs=1e-4)
            assert (row["given"], row["suggested"]) == (own["tag"], own["pred"])
    assert not (path / "label_audit.csv").exists()


def test_a_sweeps_run_is_audited(tmp_path: Path):
    make_cache(tmp_path / "feats", "clip")
    given = ["--vtype", "clip", "--feats", str(tmp_path / "feats"), "--runs", str(tmp_path / "runs")]
    assert sweep_heads.main([*given, *HEADS["kernel"]]) == 0
    (path,) = (p.parent for p in (tmp_path / "runs" / "sweep").glob("*/config.json"))
    assert len(audit(tmp_path, "--run", str(path), "--out", str(tmp_path / "queue.csv"))) == 90


# -- texts and pictures -----------------------------------------------------------------------------------------


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    """40 pairs of a course set and their caches, by encoders that learned nothing."""
    data = make_course(tmp_path / "set", 40)
    (data / "data" / "7.txt").write_text('=1+1, a "text"\nof two lines\n')
    for script in (pixels_extract_feats, vader_extract_feats):
        assert script.main(["--data", str(data), "--out", str(tmp_path / "feats"), "--workers", "0"]) == 0
    given = ["--feats", str(tmp_path / "feats"), "--runs", str(tmp_path / "runs")]
    sides = ["--vtype", "pixels", "--ttype", "vader", "--val-ratio", "0.2", *HEADS["linear"]]
    assert train_head.main([*given, *sides]) == 0
    return tmp_path


def test_texts_and_pictures_stand_beside_the_labels(encoded: Path, capsys: pytest.CaptureFixture):
    capsys.readouterr()
    rows = {row["id"]: row for row in audit(encoded)}
    assert not capsys.readouterr().err and len(rows) == 40
    pairs = encoded / "set" / "data"
    for name, row in rows.items():
        assert row["text"] == (pairs / f"{name}.txt").read_text() and row["image"] == str(pairs / f"{name}.jpg")
        assert row["corrected"] == ""
    shutil.move(encoded / "set", encoded / "moved")
    rows = {row["id"]: row for row in audit(encoded)}
    line = capsys.readouterr().err
    assert (
        line.startswith("warning: no texts and pictures in the queue: ") and "--data" in line and line.count("\n") == 1
    )
    assert {row["text"] + row["image"] for row in rows.values()} == {""} and len(rows) == 40
    rows = {row["id"]: row for row in audit(encoded, "--data", str(encoded / "moved"))}
    assert rows["7"]["text"].startswith("=1+1") and rows["7"]["image"] == str(encoded / "moved" / "data" / "7.jpg")
    other = make_course(encoded / "other", 39)
    assert "holds other data" in refused(encoded, capsys, "--data", str(other))


# -- what is refused --------------------------------------------------------------------------------------------


def test_a_persons_work_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_cache(tmp_path / "feats", "clip")
    path = train(tmp_path, *HEADS["kernel"])
    rows = audit(tmp_path)
    assert audit(tmp_path) == rows  # one without corrections is replaced
    rows[3]["corrected"] = "neutral"
    queue = path / "label_audit.csv"
    with queue.open("w", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, HEADER).writeheader()
        csv.DictWriter(file, HEADER).writerows(rows)
    before = queue.read_bytes()
    line = refused(tmp_path, capsys)
    assert f"{queue} holds 1 corrected labels, which would be lost; give another file with --out" in line
    assert queue.read_bytes() == before
    (tmp_path / "mine.csv").write_text("id,tag\n1,a\n")
    assert "isn't replaced" in refused(tmp_path, capsys, "--out", str(tmp_path / "mine.csv"))


def test_rows_without_features_and_foreign_labels_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture):
    tags = make_tags(90)
    make_cache(tmp_path / "feats", "clip", tags=tags, quarantined=[4, 9])
    split = {"train": [f"p{i}" for i in range(10, 60)], "val": [f"p{i}" for i in range(60, 80)]}
    (tmp_path / "split.json").write_text(str(split).replace("'", '"'))
    train(tmp_path, *HEADS["kernel"], "--split-file", str(tmp_path / "split.json"))
    (tmp_path / "feats" / "clip_train.h5").unlink()
    tags[85] = "mixed"
    make_cache(tmp_path / "feats", "clip", tags=tags, quarantined=[4, 9])
    capsys.readouterr()
    rows = audit(tmp_path)
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "warning: 2 labelled rows have no features (e.g. p4): left out",
        "warning: 1 rows have labels that are no class of the run (e.g. p85): left out",
    ]
    assert len(rows) == 87 and not {"p4", "p9", "p85"} & {row["id"] for row in rows}
    assert {row["part"] for row in rows if row["id"] in ("p0", "p89")} == {"unused"}


def test_runs_without_rows_of_their_own_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert "no complete run" in refused(tmp_path, capsys)
    make_cache(tmp_path / "feats", "clip")
    train(tmp_path, *HEADS["kernel"], "--folds", "2")
    assert "cross-validation" in refused(tmp_path, capsys)
    with pytest.raises(SystemExit):
        audit_labels.main(["--folds", "0"])
