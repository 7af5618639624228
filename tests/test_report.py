"""The report page: its numbers against stored predictions and scikit-learn, its HTML against what would leave it."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import CLASSES, make_cache
from scipy.stats import gaussian_kde
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix
from sklearn.neighbors import NearestNeighbors

from feats.errors import UsageError
from feats.records import Record
from modeling import train_head
from modeling.evaluation.metrics import expected_calibration_error, softmax
from modeling.heads.registry import HEADS, build_head
from modeling.report import building, measures
from modeling.report.embedding import chosen_rows, embed, nearest
from modeling.report.inside import first_layer, joined_inputs, side_attention, vectors_of
from modeling.report.making import make_report
from modeling.report.material import Material, gather
from modeling.report.page import check_page, write_page
from modeling.report.sections import Section
from modeling.report.style import figure_file, plain_svg
from modeling.report.template import part, script_json
from modeling.runs.folder import load_run
from modeling.runs.listing import newest_run

EVIL = '<script>alert("x")</script>&"\''


def drawn(rows: int = 300, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    labels = rng.integers(0, classes, rows)
    return labels, softmax(rng.normal(size=(rows, classes)) + 1.2 * np.eye(classes)[labels])


def trained(root: Path, *argv: str, rows: int = 90) -> Path:
    make_cache(root / "feats", "clip", rows)
    given = ["--vtype", "clip", "--feats", str(root / "feats"), "--runs", str(root / "runs"), "--val-ratio", "0.3"]
    assert train_head.main([*given, "--ep", "4", "--bs", "32", "--lr", "1e-2", "--D", "8", *argv]) == 0
    return newest_run(root / "runs")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("report"), "--head", "concat")


@pytest.fixture(scope="module")
def material(run: Path) -> Material:
    return gather(load_run(run))


def stored(run: Path) -> tuple[list[str], list[str], np.ndarray]:
    with (run / "predictions_val.csv").open() as file:
        rows = list(csv.DictReader(file))
    return (
        [row["tag"] for row in rows],
        [row["pred"] for row in rows],
        np.array([[float(row[f"p_{name}"]) for name in CLASSES] for row in rows]),
    )


# -- numbers ----------------------------------------------------------------------------------------------------


def test_the_drawn_confusion_is_that_of_the_stored_predictions(run: Path, material: Material):
    tags, predicted, _ = stored(run)
    found = measures.confusion(material.labels, material.probabilities)
    np.testing.assert_array_equal(found.counts, confusion_matrix(tags, predicted, labels=CLASSES))
    np.testing.assert_allclose(found.share, confusion_matrix(tags, predicted, labels=CLASSES, normalize="true"))
    assert found.counts.sum() == len(tags) > 20


def test_the_page_shows_the_stored_confusion(run: Path, material: Material):
    tags, predicted, _ = stored(run)
    html = building.errors(material).html
    cells = re.findall(r'data-true="(\w+)" data-predicted="(\w+)"[^>]*>(\d+)<br>', html)
    expected = confusion_matrix(tags, predicted, labels=CLASSES)
    assert len(cells) == 9
    assert all(int(n) == expected[CLASSES.index(true), CLASSES.index(said)] for true, said, n in cells)
    wrong = sum(a != b for a, b in zip(tags, predicted))
    assert html.count('<article class="case"') == wrong > 0


def test_the_class_table_is_scikit_learns(run: Path, material: Material):
    tags, predicted, _ = stored(run)
    expected = classification_report(tags, predicted, output_dict=True, zero_division=0)
    for name, precision, recall, f1, rows in building.class_rows(material):
        one = expected[name]
        assert (precision, recall, f1) == tuple(f"{one[key]:.3f}" for key in ("precision", "recall", "f1-score"))
        assert int(rows) == one["support"]


@pytest.mark.parametrize("bins", [5, 15])
def test_reliability_has_scikit_learns_bins_and_the_projects_ece(bins: int):
    labels, probabilities = drawn()
    found = measures.reliability(labels, probabilities, bins)
    right = probabilities.argmax(1) == labels
    share, mean = calibration_curve(right, probabilities.max(1), n_bins=bins)
    np.testing.assert_allclose(found.accuracy, share)
    np.testing.assert_allclose(found.confidence, mean)
    assert found.rows.sum() == len(labels)
    assert found.ece == pytest.approx(expected_calibration_error(labels, probabilities, bins))


def test_what_was_said_before_the_temperature_is_what_the_head_says(material: Material):
    raw = measures.before_temperature(material.probabilities, material.member.temperature)
    logits = material.member.logits(material.features, material.features.positions(material.report.ids))
    np.testing.assert_allclose(raw, softmax(logits), atol=2e-4)  # stored with six digits
    assert material.member.temperature != 1


def test_risk_coverage_is_the_accuracy_of_the_surest_rows():
    labels, probabilities = drawn(200)
    found = measures.risk_coverage(labels, probabilities)
    order = np.argsort(-probabilities.max(1))
    for share in (0.1, 0.5, 1):
        kept = order[: int(share * 200)]
        assert found.at(share) == pytest.approx(accuracy_score(labels[kept], probabilities[kept].argmax(1)))
    assert found.coverage[-1] == 1 and (np.diff(found.threshold) <= 0).all()


def test_rows_of_equal_confidence_share_their_accuracy():
    probabilities = np.tile([[0.6, 0.4]], (4, 1))
    for labels in ([0, 0, 1, 1], [1, 1, 0, 0]):
        assert measures.risk_coverage(np.array(labels), probabilities).accuracy.tolist() == [0.5] * 4


def test_densities_integrate_to_one_and_agree_with_scipy_inside():
    labels, probabilities = drawn(600)
    found = measures.confidence_densities(labels, probabilities)
    for one in found:
        assert np.trapezoid(one.values, one.points) == pytest.approx(1, abs=2e-3)
    assert sum(one.rows for one in found) == 600
    values = np.random.default_rng(0).normal(0.5, 0.08, 500)
    width = 0.9 * min(values.std(), np.subtract(*np.percentile(values, (75, 25))) / 1.34) * 500**-0.2
    expected = gaussian_kde(values, width / values.std(ddof=1))(np.linspace(0, 1, 200))
    np.testing.assert_allclose(measures.density(values).values, expected, atol=1e-6)


def test_a_class_without_rows_has_no_density():
    labels, probabilities = drawn(50)
    labels[labels == 1] = 0
    assert measures.confidence_densities(labels, probabilities)[1] is None


def test_the_pattern_has_every_row_once_by_class_and_sureness():
    labels, probabilities = drawn(80)
    rows, starts = measures.prediction_pattern(labels, probabilities)
    assert starts.tolist() == [0, *np.bincount(labels).cumsum().tolist()]
    assert sorted(map(tuple, rows)) == sorted(map(tuple, probabilities))
    for k in range(3):
        assert (np.diff(rows[starts[k] : starts[k + 1], k]) <= 0).all()


def test_groups_by_value_hold_every_row_and_equal_values_together():
    rng = np.random.default_rng(1)
    values, right = rng.integers(1, 9, 400), rng.random(400) < 0.7
    groups = measures.by_value(values, right)
    assert sum(group.rows for group in groups) == 400
    assert all(a.high < b.low for a, b in zip(groups, groups[1:]))
    for group in groups:
        inside = (values >= group.low) & (values <= group.high)
        assert group.accuracy == pytest.approx(right[inside].mean()) and group.rows == inside.sum()
        assert group.interval[0] < group.accuracy < group.interval[1]
    assert len(measures.by_value(np.ones(10), right[:10])) == 1


def test_purity_is_the_share_of_neighbours_of_the_own_class():
    rng = np.random.default_rng(2)
    points, labels = rng.normal(size=(120, 4)), rng.integers(0, 3, 120)
    points += 1.5 * np.eye(4)[labels]
    asked, among = np.arange(40), np.arange(40, 120)
    found = measures.purity(points, labels, asked, among, 10)
    near = NearestNeighbors(n_neighbors=10).fit(points[among]).kneighbors(points[asked], return_distance=False)
    assert found.share == pytest.approx((labels[among][near] == labels[asked][:, None]).mean())
    counts = np.bincount(labels[among]) / len(among)
    assert found.by_chance == pytest.approx(counts[labels[asked]].mean())
    own = measures.purity(points, labels, among, among, 10)  # no row is its own neighbour
    near = NearestNeighbors(n_neighbors=10).fit(points[among]).kneighbors(return_distance=False)
    assert own.share == pytest.approx((labels[among][near] == labels[among][:, None]).mean())


def test_courses_are_the_history_by_training():
    history = [
        {"fold": fold, "seed": "0", "epoch": str(epoch), "val_loss": f"{fold}.{epoch}", "train_loss": ""}
        for fold in ("1", "2")
        for epoch in (1, 2)
    ]
    first, second = measures.courses(history)
    assert (first.fold, first.seed, second.fold) == (1, 0, 2)
    assert second.epochs.tolist() == [1, 2] and second.values["val_loss"].tolist() == [2.1, 2.2]
    assert np.isnan(second.values["train_loss"]).all()
    assert measures.courses([{"fold": "", "seed": "", "epoch": "", "val_loss": "1"}]) == []


# -- inside -----------------------------------------------------------------------------------------------------

VECTOR_HEADS = [name for name, head in HEADS.items() if not head.tokens]


@pytest.mark.parametrize("head", VECTOR_HEADS)
def test_vectors_between_the_layers(head: str, tmp_path: Path):
    path = trained(tmp_path, "--head", head, "--ep", "2", rows=48)
    material = gather(load_run(path))
    rows = np.arange(30)
    inputs = material.inputs(rows)
    found = vectors_of(material.member, inputs)
    assert found.fused.shape[0] == 30 and np.isfinite(found.fused).all()
    if found.hidden is None:
        assert head in ("linear", "kernel", "late")
        return
    # The last linear layer makes the head's logits of what is called hidden.
    last = [layer for layer in material.member.head.modules() if type(layer).__name__ == "Linear"][-1]
    logits = torch.from_numpy(found.hidden) @ last.weight[0].T + last.bias[0]
    np.testing.assert_allclose(
        logits.detach().numpy(), material.member.logits(material.features, torch.from_numpy(rows)), atol=1e-4
    )


def test_fused_vectors_of_a_weighted_sum_are_the_sum(tmp_path: Path):
    material = gather(load_run(trained(tmp_path, "--head", "weighted_sum")))
    inputs = material.inputs(np.arange(20))
    found = vectors_of(material.member, inputs)
    weights = material.member.head.mix[0].softmax(-1)
    expected = weights[0] * inputs.image + weights[1] * inputs.text
    np.testing.assert_allclose(found.fused, expected.detach().numpy(), atol=1e-5)
    assert joined_inputs(inputs).shape == (20, 16)


def test_the_first_layer_at_its_start_is_what_the_seed_draws(material: Material):
    inputs = material.inputs(np.arange(20))
    found = first_layer(material.member, inputs, 3)
    start = build_head(material.member.config.head, material.member.widths, 3, [material.member.config.seed])
    drawn_first, learned = (head.classifier[0].weight.detach() for head in (start, material.member.head))
    for one, weight in zip(found.weights, (drawn_first, learned)):
        assert one.mean == pytest.approx(float(weight.mean()), abs=1e-6)
        assert one.std == pytest.approx(float(weight.std(correction=0)), rel=1e-4)
        assert (one.density * np.diff(one.edges)).sum() == pytest.approx(1)
    outputs = material.member.head.classifier[0](torch.cat([inputs.image, inputs.text], -1)[None]).detach()
    assert found.outputs[1].mean == pytest.approx(float(outputs.mean()), abs=1e-5)
    assert not torch.equal(drawn_first, learned)


@pytest.mark.parametrize("head", ["attention", "attention_linear", "gated_transformer", "vilbert", "cross_attention"])
def test_attention_between_sides(head: str, tmp_path: Path):
    material = gather(load_run(trained(tmp_path, "--head", head, "--ep", "2", rows=48)))
    labels = np.array([CLASSES.index(tag) for tag in material.features.tags])
    found = side_attention(material.member, material.inputs(np.arange(48)), labels, 3)
    assert found.sides == ("image", "text")
    np.testing.assert_allclose(found.shares.sum(1), 1, atol=1e-5)
    if head == "attention":
        weights = material.member.head.fused(material.inputs(np.arange(48)).batch())[1][0].mean((1, 2))
        expected = np.stack([weights[labels == k].mean(0).detach().numpy() for k in range(3)])
        np.testing.assert_allclose(found.shares, expected, atol=1e-5)


def test_sides_keep_their_names_where_the_text_comes_first(tmp_path: Path):
    material = gather(load_run(trained(tmp_path, "--head", "gated_transformer", "--layers", "1", "--ep", "3", rows=48)))
    inputs = material.inputs(np.arange(48))
    labels = np.array([CLASSES.index(tag) for tag in material.features.tags])
    text, image = (torch.nn.functional.normalize(x, dim=-1) for x in (inputs.text, inputs.image))
    sequence = torch.stack([text, image], 1)[None]  # as the head's docstring says
    with torch.no_grad():
        paid = material.member.head.encoder[0].attention(sequence, sequence, sequence)[1][0].mean((1, 2)).numpy()
    found = side_attention(material.member, inputs, labels, 3)
    for k in range(3):
        image_share, text_share = found.shares[k]
        np.testing.assert_allclose([text_share, image_share], paid[labels == k].mean(0), atol=1e-5)
    assert np.abs(found.shares[:, 0] - found.shares[:, 1]).min() > 1e-3


def test_a_head_without_attention_has_none(material: Material):
    assert side_attention(material.member, material.inputs(np.arange(9)), np.zeros(9, int), 3) is None


# -- embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first,others,most", [(10, 300, 50), (60, 20, 50), (5, 5, 50)])
def test_chosen_rows_are_all_of_validation_and_some_of_each_class(first: int, others: int, most: int):
    labels = np.arange(first + others) % 3
    rows = chosen_rows(np.arange(first), np.arange(first, first + others), labels, most)
    assert len(set(rows.tolist())) == len(rows) == min(most, first + others) and (np.diff(rows) > 0).all()
    assert (rows < first).sum() == min(first, most)
    if others > most:
        assert np.ptp(np.bincount(labels[rows[rows >= first]])) <= 2


def test_the_nearest_are_exact():
    points = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    rows, distances = nearest(points, 9)
    for point, found, far in zip(points, rows, distances, strict=True):
        expected = np.sqrt(((points - point).astype(np.float64) ** 2).sum(1))
        np.testing.assert_array_equal(found, np.argsort(expected)[:9])
        np.testing.assert_allclose(far, np.sort(expected)[:9], atol=2e-3)


@pytest.mark.slow
def test_embeddings_show_classes_that_are_apart():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 40)
    found = embed(rng.normal(size=(120, 12)) + 8 * np.eye(12)[labels])
    everything = np.arange(120)
    assert set(found.points) == {"PCA", "t-SNE", "UMAP"}
    for points in found.points.values():
        assert measures.purity(points, labels, everything, everything, 10).share > 0.95
    assert 0.3 < sum(found.explained) <= 1


# -- the page ---------------------------------------------------------------------------------------------------


class Loads(HTMLParser):
    """What a browser would fetch for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster", "action", "xlink:href") or (name == "href" and tag != "a"):
                self.found.append(value or "")


def outside(html: str) -> list[str]:
    """Addresses in a page that aren't inside of it."""
    loads = Loads()
    loads.feed(html)
    urls = [*loads.found, *re.findall(r"url\(\s*[\"']?([^)\"']*)", html), *re.findall(r"@import[^;]*", html)]
    return [url for url in urls if not url.startswith(("data:", "#"))]


def test_what_counts_as_outside():
    assert outside('<img src="https://a.b/c.png"><link href="x.css"><p style="background:url(//a)">') == [
        "https://a.b/c.png",
        "x.css",
        "//a",
    ]


def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without t-SNE and UMAP, which take seconds to import."""
    for name in ("_tsne", "_umap"):
        monkeypatch.setattr(f"modeling.report.embedding.{name}", lambda components, seed: components[:, :2])


def test_the_page_holds_all_it_needs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fast(monkeypatch)
    made = make_report(run, tmp_path / "page.html")
    html = made.page.read_text(encoding="utf-8")
    assert outside(html) == []
    assert "default-src 'none'" in html
    names = {path.stem for path in made.figures}
    assert {"loss", "metrics", "predicted-counts", "confusion", "reliability", "pattern", "risk-coverage"} <= names
    assert {"first-layer-weights", "first-layer-outputs", "labels", "confidence", "umap-hidden", "t-sne-fused"} <= names
    for path in made.figures:
        assert path.parent == tmp_path / "page"
        kind = path.read_bytes()
        assert kind.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in kind and b"</svg>" in kind
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert all(
        html.count(f'<figure id="figure-{name}"><svg') == (name[:4] not in ("pca-", "t-sn", "umap")) for name in names
    )
    assert "raw pairs are gone" in html  # these caches are of no real pairs
    assert make_report(run, tmp_path / "page.html").page.is_file()  # its own page is replaced


def test_without_caches_it_shows_what_the_run_itself_holds(run: Path, tmp_path: Path):
    lost = load_run(run)
    lost = replace(lost, source=replace(lost.source, folder=tmp_path / "gone"), nearby=None)
    material = gather(lost)
    assert material.features is None and "gone" in material.no_features
    found = building.sections_of(material)
    assert "The caches are gone" in found["embeddings"].html
    assert {figure.name for figure in found["training"].figures} == {"loss", "metrics", "predicted-counts"}
    assert "confusion" in {figure.name for figure in found["results"].figures}
    with pytest.raises(UsageError):
        gather(lost, tmp_path / "gone")


def with_texts(material: Material, text: str) -> Material:
    records = {name: Record(name, None, text, tag) for name, tag in zip(material.features.ids, material.features.tags)}
    return replace(material, records=records, no_records="")


def test_texts_are_shown_as_they_are(material: Material):
    html = building.errors(with_texts(material, EVIL)).html
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    shown = building._map_rows(with_texts(material, EVIL), np.arange(3), np.zeros(3, int), np.zeros(3, bool))
    assert "<" not in script_json(shown)
    assert json.loads(script_json(shown))["text"] == [EVIL] * 3


def test_ids_classes_and_titles_are_escaped(material: Material, tmp_path: Path):
    report = replace(material.report, ids=[f"{EVIL}{k}" for k in range(len(material.report.ids))])
    evil = replace(material, report=report)
    assert "<script" not in building.errors(evil).html
    assert "<script" not in part("cells", [EVIL], [[1]], [[1.0]])
    assert "<script" not in part("audit", EVIL, [dict.fromkeys(
        ("id", "text", "given", "suggested", "confidence", "part", "why", "corrected"), EVIL)], [EVIL, "a"])  # fmt: skip
    write_page(tmp_path / "x.html", EVIL, [Section(EVIL, "a", "<p>x</p>")])
    html = (tmp_path / "x.html").read_text()
    assert html.count("<script") == 1 and "alert(&#34;x&#34;)" in html


def test_figures_show_names_as_they_are():
    figure = figure_file("names", lambda axes: axes.set(title=f"{EVIL} $x^2$"))
    assert "<script" not in figure.svg and "$x^2$" in figure.svg and "&lt;script&gt;" in figure.svg


def test_an_svg_stands_alone_and_takes_the_colour_around():
    figure = figure_file("one", lambda axes: axes.plot([0, 1], clip_on=True))
    assert figure.svg.startswith("<svg") and figure.svg.endswith("</svg>")
    assert "currentColor" in figure.svg and "#10131a" not in figure.svg
    for unwanted in ("<metadata", "<!DOCTYPE", "w3.org/1999/xlink", "purl.org"):
        assert unwanted not in figure.svg
    assert all(target in figure.svg for target in re.findall(r"url\(#([^)]+)\)", figure.svg))
    assert set(re.findall(r'\bid="(one-)?', figure.svg)) == {"one-"}
    assert plain_svg('<?xml?><svg><a id="x"/><use xlink:href="#x"/></svg>', "n") == (
        '<svg><a id="n-x"/><use href="#n-x"/></svg>'
    )


def test_other_peoples_files_are_left_alone(tmp_path: Path):
    other = tmp_path / "report.html"
    other.write_text("<html>mine</html>")
    with pytest.raises(UsageError, match="is no report"):
        check_page(other)
    with pytest.raises(UsageError, match="is no report"):
        write_page(other, "t", [])
    assert other.read_text() == "<html>mine</html>"
