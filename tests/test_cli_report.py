"""make_report.py and train_head.py --report as a user runs them, and the page in a browser."""

import base64
import csv
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from caches import make_cache
from conftest import make_course
from test_report import EVIL, fast

from feats import pixels_extract_feats, vader_extract_feats
from modeling import audit_labels, make_report, train_head
from modeling.runs.listing import newest_run


def train(root: Path, *argv: str) -> Path:
    given = ["--feats", str(root / "feats"), "--runs", str(root / "runs"), "--head", "concat", "--D", "8", "--ep", "3"]
    assert train_head.main([*given, "--val-ratio", "0.4", *argv]) == 0
    return newest_run(root / "runs")


def with_pairs(root: Path) -> Path:
    """A run on real pairs, one of whose texts is a script."""
    course = make_course(root / "set", 60)
    for path in (course / "data").glob("*.txt"):
        path.write_text(f"{EVIL} {path.stem}")
    out = ["--data", str(course), "--out", str(root / "feats")]
    assert pixels_extract_feats.main([*out, "--size", "4"]) == 0 and vader_extract_feats.main(out) == 0
    return train(root, "--vtype", "pixels", "--ttype", "vader", "--norm", "standard")


def test_the_newest_run_gets_its_page(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    fast(monkeypatch)
    run = with_pairs(tmp_path)
    assert audit_labels.main(["--runs", str(tmp_path / "runs"), "--folds", "2"]) == 0
    capsys.readouterr()
    assert make_report.main(["--runs", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith(f"newest run {run}: ")
        and f"\nrun {run}\n" in out
        and "report, " in out
        and out.endswith(f" -> {run / 'report.html'}\n")
    )
    page = (run / "report.html").read_text(encoding="utf-8")
    with (run / "predictions_val.csv").open() as file:
        wrong = [row for row in csv.DictReader(file) if row["tag"] != row["pred"]]
    assert page.count('src="data:image/jpeg;base64,') == len(wrong) > 0
    assert "<script>alert" not in page and page.count("&lt;script&gt;alert") >= len(wrong)
    assert "by-picture-size" in page and 'id="audit-rows"' in page and "utf-8" in page
    assert (run / "report" / "confusion.png").is_file()


@pytest.mark.slow
def test_it_says_when_the_pairs_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    fast(monkeypatch)
    run = with_pairs(tmp_path)
    shutil.rmtree(tmp_path / "set")
    capsys.readouterr()
    out = tmp_path / "elsewhere" / "page.html"
    assert make_report.main(["--runs", str(tmp_path / "runs"), "--run", run.name, "--out", str(out)]) == 0
    assert "note: the report goes without the raw pairs" in capsys.readouterr().out
    page = out.read_text(encoding="utf-8")
    assert page.count("the raw pairs are gone") >= 3 and "data:image/jpeg" not in page
    assert (out.parent / "page" / "loss.svg").is_file() and not (run / "report.html").exists()


def test_train_head_ends_with_it(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    fast(monkeypatch)
    make_cache(tmp_path / "feats", "clip", 60)
    run = train(tmp_path, "--vtype", "clip", "--report")
    assert (run / "report.html").is_file()
    assert capsys.readouterr().out.endswith(f"{run / 'report.html'}\n")


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["--folds", "3"], ["--seeds", "2", "--test-ratio", "0.2"]])
def test_runs_of_several_heads(argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fast(monkeypatch)
    make_cache(tmp_path / "feats", "clip", 60)
    given = ["--feats", str(tmp_path / "feats"), "--runs", str(tmp_path / "runs"), "--vtype", "clip"]
    assert train_head.main([*given, "--head", "mlp", "--D", "8", "--ep", "3", *argv, "--report"]) == 0
    page = (newest_run(tmp_path / "runs") / "report.html").read_text(encoding="utf-8")
    assert "what is shown of a head&#39;s inside is the first one&#39;s" in page


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--run", "nothing"], "is no run"),
        (["--out", "page.txt"], "--out page.txt: expected a name that ends in .html"),
        (["--out", "mine.html"], "is no report, so that it isn't replaced; give another file with --out"),
        (["--feats", "nowhere"], "nowhere"),
        (["--weights", "minilm=x"], "--weights names minilm; the encoders in use are clip"),
    ],
)
def test_what_cant_be_used_is_told_in_one_line(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("mine.html").write_text("mine")
    make_cache(tmp_path / "feats", "clip", 60)
    train(tmp_path, "--vtype", "clip")
    capsys.readouterr()
    assert make_report.main(["--runs", "runs", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


# -- in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without a window that keeps a log of all it asks for."""
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
    )
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no chromium and chromedriver on this machine")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield opened
    opened.quit()


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(width: int, chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fast(monkeypatch)
    run = with_pairs(tmp_path)
    assert audit_labels.main(["--runs", str(tmp_path / "runs"), "--folds", "2"]) == 0
    assert make_report.main(["--runs", str(tmp_path / "runs")]) == 0
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    downloads = {"behavior": "allow", "downloadPath": str(tmp_path / "got")}
    chromium.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)
    chromium.get_log("performance")
    page = (run / "report.html").as_uri()
    chromium.get(page)
    script = chromium.execute_script
    assert script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert script("return window.innerWidth") == width

    shown = "return [...document.querySelectorAll('.case')].filter(x => x.offsetParent).map(x => [x.dataset.true, x.dataset.predicted, +x.dataset.confidence])"
    everything = script(shown)
    with (run / "predictions_val.csv").open() as file:
        wrong = [(row["tag"], row["pred"]) for row in csv.DictReader(file) if row["tag"] != row["pred"]]
    assert sorted((true, said) for true, said, _ in everything) == sorted(wrong)
    assert [c for *_, c in everything] == sorted((c for *_, c in everything), reverse=True)
    true, said = wrong[0]
    cell = f'document.querySelector(\'.cells button[data-true="{true}"][data-predicted="{said}"]\')'
    script(f"{cell}.click()")
    assert [(a, b) for a, b, _ in script(shown)] == [(true, said)] * wrong.count((true, said))
    script(f"{cell}.click()")
    assert len(script(shown)) == len(wrong)
    script("const o = document.querySelector('#order'); o.value = 'least'; o.dispatchEvent(new Event('change'))")
    assert [c for *_, c in script(shown)] == sorted(c for *_, c in everything)

    # A point under the pointer tells its row, the text as it is.
    script(
        "const c = document.querySelector('.map canvas'), b = c.getBoundingClientRect();"
        "for (let x = 0; x < b.width; x += 8) for (let y = 0; y < b.height; y += 8)"
        " if (document.querySelector('.map .tip').hidden)"
        "  c.dispatchEvent(new PointerEvent('pointermove', {clientX: b.left + x, clientY: b.top + y}))"
    )
    tip = script(
        "const t = document.querySelector('.map .tip'); return [t.hidden, t.textContent, !!t.querySelector('img')]"
    )
    assert tip[0] is False and EVIL in tip[1] and tip[2] is True

    # A decision becomes a file.
    script(
        "const s = document.querySelector('#audit-rows select'); s.selectedIndex = 1;"
        "s.dispatchEvent(new Event('change', {bubbles: true})); document.querySelector('#download').click()"
    )
    name, label = script("const s = document.querySelector('#audit-rows select'); return [s.dataset.id, s.value]")
    got, until = tmp_path / "got" / "corrections.csv", time.monotonic() + 20
    while not got.is_file() and time.monotonic() < until:
        time.sleep(0.05)
    assert got.read_text() == f"id,label\n{name},{label}\n"

    assert [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert page in asked and {url for url in asked if not url.startswith(("data:", "blob:"))} == {page}
    assert (
        script("return document.querySelectorAll('script').length")
        == script("return document.querySelectorAll('script[type=\"application/json\"]').length") + 1
    )
    kept = chromium.execute_cdp_cmd("Page.captureScreenshot", {})["data"]
    assert len(base64.b64decode(kept)) > 5000
