"""explain.py as a user types it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from caches import encoded_course, pair_options
from conftest import ENVIRONMENT, ROOT
from PIL import Image

from modeling import explain, inference_head, train_head
from modeling.runs.listing import newest_run


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, caches of EfficientNet, MiniLM and VADER, and a run that reads all three."""
    return encoded_course(tmp_path_factory.mktemp("course"))


def typed(root: Path, *options: str) -> list[str]:
    return ["--runs", str(root / "runs"), "--device", "cpu", "--orders", "2", *options]


def section(out: str, title: str) -> list[str]:
    """The lines of the output from one that begins with `title` to the next empty one."""
    lines = out.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith(title))
    return lines[start : lines.index("", start) if "" in lines[start:] else None]


@pytest.mark.slow
def test_a_pair_is_explained(course: Path, capsys: pytest.CaptureFixture):
    run = newest_run(course / "runs")
    assert explain.main(typed(course, *pair_options(course, 24), "--neighbours", "3")) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines()[0].startswith(f"newest run {run}: ") and out.splitlines()[1] == f"run {run}"
    assert inference_head.main([*typed(course)[:4], *pair_options(course, 24)]) == 0
    predicted = capsys.readouterr().out.splitlines()[-1].split()[0]
    assert f"target {predicted} (" in out
    text = (course / "set" / "data" / "24.txt").read_text().split()
    for encoder, method in (("minilm", "integrated gradients, complete"), ("vader", "occlusion")):
        head, _, _, *rows = section(out, f"text/{encoder}")
        assert method in head and [row.split()[0] for row in rows] == text
    assert "image/efficientnet: Grad-CAM; the strongest cell for" in out
    neighbours = [row for row in section(out, "nearest training rows") if row[0].isdigit()]
    assert len(neighbours) == 3 and len(section(out, "a side replaced")) == 5
    scores = [row for row in section(out, "areas under") if row.startswith(("image/", "text/"))]
    assert [row.split()[0] for row in scores] == ["image/efficientnet", "text/minilm", "text/vader"]
    alike = [row for row in section(out, "areas under") if row.startswith("all: ")]  # where all are as good
    assert all(row.split()[-1].rstrip(",") in ("yes", "no") for row in alike or scores)
    assert out.splitlines()[-1] == f"picture -> {run / 'explanation.png'}"
    with Image.open(run / "explanation.png") as picture:
        assert picture.format == "PNG" and picture.width > 800


@pytest.mark.slow
def test_target_method_and_place_can_be_chosen(course: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    out = tmp_path / "figures" / "x.png"
    chosen = ["--target", "neutral", "--method", "occlusion", "--out", str(out)]
    assert explain.main(typed(course, *pair_options(course, 24), *chosen)) == 0
    shown = capsys.readouterr().out
    assert "target neutral (" in shown and shown.count(": occlusion") == 3 and "gradients" not in shown
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_run_of_one_side(course: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    folders = ["--feats", str(course / "feats"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert train_head.main([*folders, "--ttype", "minilm", "--head", "linear", "--val-ratio", "0.25"]) == 0
    capsys.readouterr()
    assert explain.main(typed(tmp_path, *pair_options(course, 25), "--feats", str(course / "feats"))) == 0
    out, err = capsys.readouterr()
    assert "note: --image does nothing: the run reads no image" in err and "image/" not in out
    assert explain.main(typed(tmp_path, "--text", "")) == 0
    assert "the text has no words" in capsys.readouterr().out
    assert explain.main(typed(tmp_path, "--image", "x.jpg")) == 2
    assert "reads minilm; give --text, too" in capsys.readouterr().err


@pytest.mark.slow
def test_caches_and_data_that_are_gone(course: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Sides and neighbours need the caches, the neighbours' texts the data."""
    moved = tmp_path / "moved"
    for folder in ("set", "feats"):
        (moved / folder).parent.mkdir(exist_ok=True)
        (course / folder).rename(moved / folder)
    try:
        options = [
            *("--image", str(moved / "set" / "data" / "3.jpg"), "--text", "sun", "--method", "grad-cam"),
            *("--out", str(tmp_path / "x.png")),
        ]
        assert explain.main(typed(course, *options)) == 0
        assert "note: no sides and no neighbours without the training rows' caches" in capsys.readouterr().err
        assert explain.main(typed(course, *options, "--feats", str(moved / "feats"))) == 0
        out, err = capsys.readouterr()
        assert "note: neighbours without their texts" in err and "nearest training rows" in out
    finally:
        for folder in ("set", "feats"):
            (moved / folder).rename(course / folder)


@pytest.mark.slow
def test_methods_are_checked_on_validation_pairs(course: Path, capsys: pytest.CaptureFixture):
    assert explain.main(typed(course, "--check", "2", "--method", "occlusion")) == 0
    out = capsys.readouterr().out
    assert "explanations of 2 validation pairs that are better than random orders (chance: 0.5)" in out
    parts = [row.split()[0] for row in section(out, "explanations of") if row.startswith(("image/", "text/"))]
    assert [part for part in parts if not part.endswith(":")] == ["image/efficientnet", "text/minilm", "text/vader"]
    said = "\n".join(section(out, "explanations of"))
    assert "occlusion" in said and re.search(r"(^|\s)2(,|\s|$)", said.partition("\n")[2]), said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: nothing to explain: give --image, --text or both, or --check and a number of pairs"),
        (["--image", "no.jpg", "--text", "a"], "error: no.jpg: picture file is missing; give a picture as --image"),
        (["--text", "a"], "reads efficientnet; give --image, too"),
        (["--image", "x.jpg", "--text", "a", "--target", "joy"], "error: --target joy: no class of"),
        (["--image", "x.jpg", "--text", "a", "--method", "magic"], "error: unknown --method magic; there are grad-cam"),
        (["--image", "x.jpg", "--text", "a", "--method", "attention"], "error: --method attention can't explain what"),
        (
            ["--image", "x.jpg", "--text", "a", "--weights", "clip=x"],
            "error: --weights names clip; the encoders in use",
        ),
        (["--image", "x.jpg", "--text", "a", "--run", "none"], "none"),
    ],
)
def test_unusable_input_ends_in_one_line(course: Path, capsys: pytest.CaptureFixture, options, message):
    assert explain.main(typed(course, *options)) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1


def test_nothing_but_pictures_is_replaced(course: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    for place in (other, tmp_path):
        assert explain.main(typed(course, *pair_options(course, 24), "--out", str(place))) == 2
        assert "exists and is no PNG, so that it isn't replaced" in capsys.readouterr().err
    assert other.read_text() == "mine"


def test_other_scripts_start_without_the_libraries_of_explanations():
    code = "import sys, modeling.explain, modeling.train_head; print({'captum', 'matplotlib', 'transformers'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_script_runs_by_path(tmp_path: Path):
    command = [sys.executable, str(ROOT / "modeling" / "explain.py"), "--runs", str(tmp_path), "--text", "a"]
    out = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (2, "") and out.stderr.startswith("error: no complete run in")
