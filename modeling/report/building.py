"""The sections that a run's own files, caches and pairs give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import escape

from feats.csv_files import read_table
from feats.source import SIDES
from modeling.choices import AVERAGES
from modeling.heads.base import n_parameters
from modeling.report import figures as draw, measures
from modeling.report.embedding import METHODS, Embedded, chosen_rows, embed
from modeling.report.inside import first_layer, side_attention, vectors_of
from modeling.report.material import Material, megapixels, thumbnails
from modeling.report.sections import FigureFile, Section
from modeling.report.style import colour
from modeling.report.template import part, script_json
from modeling.runs.tables import cost_line, head_line, report_tables

GALLERY_SIDE, GALLERY_BYTES = 240, 6_000_000
POINT_SIDE, POINT_BYTES = 72, 2_500_000
NEIGHBOURS = 10
LONGEST_TEXT = 400
LAYER_ROWS = 1000  # whose outputs of the first layer are shown
MOST_SUSPECTS = 300
AUDIT = "label_audit.csv"
_SHAPES = (
    '<circle r="5.5" fill="{0}"/>',
    '<rect x="-5" y="-5" width="10" height="10" fill="{0}"/>',
    '<path d="M0-6 6 5H-6z" fill="{0}"/>',
    '<path d="M0-6.5 6.5 0 0 6.5-6.5 0z" fill="{0}"/>',
)


def sections_of(material: Material) -> dict[str, Section]:
    """By anchor, in the page's order; the figures are drawn as they come."""
    found = [headline(material), data(material), training(material), results(material)]
    if material.features is not None:
        found.append(embeddings(material))
    else:
        gone = f"The caches are gone: {material.no_features}"
        found.append(Section("Embeddings", "embeddings", part("note", gone)))
    found.append(errors(material))
    found.append(label_audit(material))
    return {section.anchor: section for section in found}


# -- headline ---------------------------------------------------------------------------------------------------


def headline(material: Material) -> Section:
    """What was done, how good it is, and how to do it again."""
    figures, run = material.report.figures, material.run
    counts = figures.get("validation_rows", {})
    lines = [
        ("Task", f"tell {', '.join(run.classes)} of {' and '.join(material.member.config.head.sides)}"),
        ("Data", f"{_rows(run.training_rows)} for training, {_rows(counts)} for validation"),
        ("Protocol", figures["protocol"]),
        ("Head", head_line(run).removeprefix("head ")),
    ]
    if run.cost is not None:
        lines.append(("Cost", cost_line(run.cost)))
    if len(run.members) > 1:
        lines.append(("Members", f"{len(run.members)} heads; what is shown of a head's inside is the first one's"))
    if run.corrections:
        lines.append(("Corrected labels", f"{len(run.corrections)} in place of the caches'"))
    commands = [c for c in (material.config.get("command"), material.command) if c]
    html = part("headline", lines, _encoders(material), _layers(material), score_rows(figures), commands)
    return Section("Headline", "headline", html)


def _rows(counts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"{sum(counts.values()):,} rows ({shown})"


def score_rows(figures: Mapping[str, Any]) -> list[tuple[str | int, ...]]:
    """Figures with their intervals for each part there is, and what the majority class alone would have."""
    rows: list[tuple[str | int, ...]] = []
    for key, words in (("val", "validation"), ("test", "test")):
        if key in figures:
            one = figures[key]
            shown = ["{:.3f} [{:.3f}, {:.3f}]".format(one[name], *one["interval"][name]) for name in AVERAGES]
            rows.append((words, one["n"], *shown))
            always = one["majority"]
            plain = [f"{always[name]:.3f}" for name in AVERAGES]
            rows.append((f"{words}, always {always['class']}", one["n"], *plain))
    return rows


def _encoders(material: Material) -> list[tuple[str, ...]]:
    source = material.run.source
    found: list[tuple[str, ...]] = []
    for side in SIDES:
        for name in source.of(side):
            made_by = source.fingerprints.get(name, {})
            width = "" if material.features is None else f"{material.features.widths[side][name]:,}"
            model = " ".join(str(made_by[key]) for key in ("encoder", "model") if made_by.get(key))
            found.append((side, name, model, width, str(made_by.get("weights_sha256") or "unknown")))
    return found


def _layers(material: Material) -> list[tuple[str, str, str, str]]:
    """The first member's layers that hold nothing but their own weights, in their order."""
    found = []
    for name, layer in material.member.head.named_modules():
        if name and not any(True for _ in layer.children()):
            own = list(layer.parameters(recurse=False))
            shapes = " + ".join(" × ".join(map(str, p.shape[1:])) for p in own)
            found.append(
                (name, type(layer).__name__.lstrip("_"), shapes, f"{sum(p.numel() for p in own):,}" if own else "")
            )
    loose = list(material.member.head.parameters(recurse=False))
    if loose:
        shapes = " + ".join(" × ".join(map(str, p.shape[1:])) for p in loose)
        found.append(("of the head itself", "", shapes, f"{sum(p.numel() for p in loose):,}"))
    return [*found, ("in all", "", "", f"{n_parameters(material.member.head):,}")]


# -- data -------------------------------------------------------------------------------------------------------


def data(material: Material) -> Section:
    """Labels by part, texts, rows left out, duplicates."""
    files, html = [], []
    counts = label_counts(material)
    files.append(draw.label_distribution(counts, material.classes))
    if material.tokens:
        files.append(draw.token_lengths(np.array(list(material.tokens.values())), material.truncated))
    html.append(part("figures", files, {"text-lengths": "Tokens as the first text encoder counts them."}))
    if material.features is None:
        html.append(part("note", f"No more to tell of the data without the caches: {material.no_features}"))
        return Section("Data", "data", "".join(html), files)
    leaks = material.leaks()
    assert leaks is not None
    rows = [(name, *_twin_cells(twins)) for name, twins in vars(leaks).items()]
    columns = ["same", "groups", "with labels in conflict", "groups across parts", "validation rows seen in training"]
    html += [part("note", leaks.line()), part("table", columns, rows, "Rows with the same picture or text")]
    left_out = list(material.features.left_out.items())
    if left_out:
        caption = f"{len(left_out)} rows in quarantine" + (", the first 50" if len(left_out) > 50 else "")
        html.append(part("table", ["id", "reason"], left_out[:50], caption))
    else:
        html.append(part("note", "No row is in quarantine."))
    if material.records is None:
        html.append(part("note", f"Encodings of the texts aren't told, the raw pairs are gone: {material.no_records}"))
    else:
        found: dict[str, int] = {}
        for record in material.records.values():
            kind = record.encoding or ("none: " + record.text_error if record.text is None else "in the manifest")
            found[kind] = found.get(kind, 0) + 1
        rows_of = sorted(found.items(), key=lambda pair: -pair[1])
        html.append(part("table", ["encoding of the text", "rows"], [(k, f"{n:,}") for k, n in rows_of]))
    return Section("Data", "data", "".join(html), files)


def _twin_cells(twins: Any) -> tuple[str, ...]:
    if twins is None:
        return ("unknown",) * 4
    return tuple(f"{n:,}" for n in (twins.groups, twins.conflicting, twins.across, twins.val_rows))


def label_counts(material: Material) -> dict[str, np.ndarray]:
    """Rows of each class, (C,), by part of the split."""
    figures, classes = material.report.figures, material.classes
    parts = {"training": material.run.training_rows, "validation": figures.get("validation_rows", {})}
    found = {name: np.array([of.get(c, 0) for c in classes]) for name, of in parts.items() if of}
    if material.report.test is not None:
        tags = material.report.test[1]
        found["test"] = np.array([tags.count(name) for name in classes])
    return found


# -- training ---------------------------------------------------------------------------------------------------


def training(material: Material) -> Section:
    """Curves, and what training did to the head."""
    trainings = measures.courses(material.report.history)
    files: list[FigureFile] = []
    words = {
        "metrics": "A curve that still rises at its end asks for more epochs; a gap to training tells of overfitting.",
        "predicted-counts": "A head that says one class for every row hasn't learned yet.",
        "first-layer-outputs": "Rows of the validation part, all outputs of the layer together.",
        "first-layer-weights": "The start is drawn again from the seed.",
    }
    if trainings:
        chosen: dict[tuple[int | None, int | None], int | None] = {
            (m.fold, m.config.seed): m.best_epoch for m in material.run.members
        }
        best = [chosen.get((course.fold, course.seed)) for course in trainings]
        true = np.bincount(material.labels, minlength=len(material.classes))
        files += [draw.losses(trainings, best), draw.scores(trainings, best)]
        files.append(draw.predicted_counts(trainings, material.classes, true))
        if (weights := draw.side_weights(trainings)) is not None:
            files.append(weights)
    notes = [] if trainings else ["This head is solved in closed form: there are no epochs to show."]
    if material.features is None:
        notes.append(f"The head's inside isn't shown, the caches are gone: {material.no_features}")
    else:
        rows = known_rows(material, material.report.ids)
        inputs = material.inputs(rows[:LAYER_ROWS])
        if (change := first_layer(material.member, inputs, len(material.classes))) is not None:
            files += draw.layer_change(change)
        label_of = dict(zip(material.report.ids, material.labels.tolist(), strict=True))
        labels = np.array([label_of[material.features.ids[row]] for row in rows.tolist()])
        paid = side_attention(material.member, material.inputs(rows), labels, len(material.classes))
        if paid is not None:
            files.append(draw.attention(paid, material.classes))
            of = f"{paid.layers} attention layer{'s' if paid.layers > 1 else ''}"
            words["attention"] = f"Validation rows, mean of heads and queries of {of}; the dashed line: an equal share."
    html = "".join(part("note", text) for text in notes) + part("figures", files, words)
    return Section("Training", "training", html, files)


def known_rows(material: Material, ids: Sequence[str]) -> np.ndarray:
    """Row numbers of those of `ids` that have features, in order."""
    assert material.features is not None
    position = {name: row for row, name in enumerate(material.features.ids)}
    return np.array([position[name] for name in ids if name in position], np.int64)


# -- results ----------------------------------------------------------------------------------------------------


def results(material: Material) -> Section:
    """All that the stored validation predictions tell."""
    labels, probabilities, classes = material.labels, material.probabilities, material.classes
    found = measures.confusion(labels, probabilities)
    risk = measures.risk_coverage(labels, probabilities)
    majority = material.report.figures["val"]["majority"]["accuracy"]
    before = None
    if len(material.run.members) == 1:
        raw = measures.before_temperature(probabilities, material.member.temperature)
        before = measures.reliability(labels, raw)
    files = [
        draw.confusion_matrix(found, classes),
        draw.confidence(measures.confidence_densities(labels, probabilities), classes),
        draw.reliability_diagram(measures.reliability(labels, probabilities), before),
        draw.pattern(*measures.prediction_pattern(labels, probabilities), classes),
        draw.coverage(risk, majority),
    ]
    notes = []
    lengths = [(k, material.tokens[name]) for k, name in enumerate(material.report.ids) if name in material.tokens]
    if lengths:
        rows, values = np.array(lengths).T
        groups = measures.by_value(values, material.right[rows])
        files.append(draw.accuracy_by(groups, "by-text-length", "text length", "tokens"))
    sizes = picture_sizes(material)
    if sizes is not None:
        rows, values = sizes
        groups = measures.by_value(values, material.right[rows])
        files.append(draw.accuracy_by(groups, "by-picture-size", "picture size", "megapixels"))
    elif "image" in material.member.config.head.sides:
        notes.append(f"No figure by picture size, the raw pairs are gone: {material.no_records}")
    kept = [
        (f"{100 * share:.0f} %", f"{100 * risk.at(share):.1f} %", _threshold(risk, share))
        for share in measures.KEPT_SHARES
    ]
    words = {
        "reliability": _calibration_words(material, before is not None),
        "risk-coverage": "Rows in the order of the prediction's probability.",
        "pattern": "Each line is a validation row; within a class the surest of it first.",
    }
    html = [
        part("figures", files, words),
        *(part("note", text) for text in notes),
        part("table", ["class", "precision", "recall", "F1", "rows"], class_rows(material), "By class, from 0 to 1"),
        part("table", ["rows kept", "accuracy of these", "probability from"], kept, "Predict only when sure"),
        f"<details><summary>As the terminal shows it</summary>{_pre(report_tables_of(material))}</details>",
    ]
    return Section("Results", "results", "".join(html), files)


def _threshold(risk: measures.RiskCoverage, share: float) -> str:
    return f"{risk.threshold[max(0, int(np.ceil(share * len(risk.threshold) - 1e-9)) - 1)]:.3f}"


def _calibration_words(material: Material, alone: bool) -> str:
    if not alone:
        return "Of several heads together: what they said before their temperatures isn't kept."
    return (
        f"Temperature {material.member.temperature:.3f}, fitted on these very rows: the calibrated curve is in-sample. "
        "ECE: expected calibration error, from 0 to 1."
    )


def class_rows(material: Material) -> list[tuple[str, ...]]:
    """Precision, recall, F1 and rows of each class of the validation rows."""
    of_class = material.report.figures["val"]["per_class"]
    return [
        (
            name,
            *(f"{of_class[name][key]:.3f}" for key in ("precision", "recall", "f1")),
            f"{of_class[name]['support']:,}",
        )
        for name in material.classes
    ]


def report_tables_of(material: Material) -> str:
    """The tables that train_head.py prints."""
    return report_tables(replace(material.run, report=material.report))


def _pre(text: str) -> str:
    return f'<div class="scroll"><pre style="white-space: pre">{escape(text)}</pre></div>'


def picture_sizes(material: Material) -> tuple[np.ndarray, np.ndarray] | None:
    """Validation rows whose pictures can be read, and these pictures' megapixels; None where there is none."""
    if material.records is None or "image" not in material.member.config.head.sides:
        return None
    found = [
        (k, size)
        for k, name in enumerate(material.report.ids)
        if name in material.records and (size := megapixels(material.records[name])) is not None
    ]
    if not found:
        return None
    rows, sizes = zip(*found, strict=True)
    return np.array(rows), np.array(sizes)


# -- embeddings -------------------------------------------------------------------------------------------------


def embeddings(material: Material) -> Section:
    """Fused features and hidden layer in two dimensions, and how pure their neighbourhoods are."""
    features = material.features
    assert features is not None
    held = set(material.report.ids)
    learned = {name for split in material.run.splits for name in split.train} - held
    known = {name: k for k, name in enumerate(material.classes)}
    labels = np.array([known.get(tag, -1) for tag in features.tags])
    val, train = (known_rows(material, [i for i in features.ids if i in part_ids]) for part_ids in (held, learned))
    rows = chosen_rows(val, train, labels)
    vectors = vectors_of(material.member, material.inputs(rows))
    own_labels = labels[rows]
    held_out = np.array([features.ids[row] in held for row in rows.tolist()])
    spaces = [("fused", "fused features", vectors.fused, vectors.fused_name)]
    if vectors.hidden is not None:
        spaces.append(("hidden", "hidden layer", vectors.hidden, "what enters the last linear layer"))
    maps, files = [], []
    for name, title, points, words in spaces:
        found = embed(points)
        files += [draw.scatter(found, method, title, own_labels, held_out, material.classes) for method in found.points]
        told = f"{words[:1].upper()}{words[1:]}, {points.shape[1]:,} wide. {purity_words(points, own_labels, held_out)}"
        maps.append(
            {
                "name": name,
                "title": f"{title[:1].upper()}{title[1:]}",
                "words": told,
                "methods": [method for method in METHODS if method in found.points],
                "json": script_json(scaled(found)),
            }
        )
    shown = _map_rows(material, rows, own_labels, held_out)
    legend = [(name, colour(k), _SHAPES[k % len(_SHAPES)].format(colour(k))) for k, name in enumerate(material.classes)]
    some = (
        f"{len(rows):,} of {len(val) + len(train):,} rows: all {len(val):,} of validation, the others drawn by class."
    )
    html = f"<p>{some if len(rows) < len(val) + len(train) else f'{len(rows):,} rows.'}</p>"
    if material.records is None:
        html += part("note", f"Points without texts and pictures, the raw pairs are gone: {material.no_records}")
    return Section("Embeddings", "embeddings", html + part("maps", script_json(shown), maps, legend), files)


def purity_words(points: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> str:
    """Purity of validation rows among training rows, and of training rows among themselves, in words."""
    val, train = np.flatnonzero(held_out), np.flatnonzero(~held_out)
    found = []
    if len(train) > 1:
        for rows, words in ((val, "validation rows"), (train, "training rows")):
            if len(rows):
                one = measures.purity(points, labels, rows, train, NEIGHBOURS)
                found.append(f"{100 * one.share:.1f} % for {words} (by chance {100 * one.by_chance:.1f} %)")
    elif len(val) > 1:
        one = measures.purity(points, labels, val, val, NEIGHBOURS)
        found.append(f"{100 * one.share:.1f} % for validation rows (by chance {100 * one.by_chance:.1f} %)")
        return f"Of the {one.neighbours} nearest validation rows the same class have {found[0]}."
    return f"Of the {NEIGHBOURS} nearest training rows the same class have {', '.join(found)}." if found else ""


def scaled(found: Embedded) -> dict[str, list[list[int]]]:
    """Points by method as whole numbers, the longer side of each picture 0 to 1000."""
    shown = {}
    for method, xy in found.points.items():
        span = np.maximum(np.ptp(xy, axis=0), 1e-12)
        shown[method] = np.round((xy - xy.min(0)) / span * 1000).astype(int).tolist()
    return shown


def _map_rows(material: Material, rows: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    features = material.features
    assert features is not None
    ids = [features.ids[row] for row in rows.tolist()]
    pictures = [""] * len(ids)
    if material.records is not None:
        order = [int(k) for k in np.argsort(~held_out, kind="stable")]  # those of validation first
        order = [k for k in order if ids[k] in material.records]
        addresses = thumbnails([material.records[ids[k]] for k in order], POINT_SIDE, POINT_BYTES)
        for k, address in zip(order, addresses, strict=True):
            pictures[k] = address
    return {
        "id": ids,
        "label": labels.tolist(),
        "val": held_out.astype(int).tolist(),
        "text": [_cut(material.text(name), 160) for name in ids],
        "picture": pictures,
        "classes": material.classes,
        "colours": [colour(k) for k in range(len(material.classes))],
        "order": np.random.default_rng(0).permutation(len(ids)).tolist(),
    }


def _cut(text: str, most: int) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


# -- errors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A misclassified validation row as the gallery shows it."""

    id: str
    text: str
    true: str
    predicted: str
    confidence: float
    probabilities: list[tuple[str, float]]
    picture: str
    no_picture: str


def cases(material: Material) -> list[Case]:
    """All misclassified validation rows, the surest first; pictures as long as there is room."""
    wrong = np.flatnonzero(~material.right)
    confidence = material.probabilities.max(1)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    ids = [material.report.ids[k] for k in wrong.tolist()]
    pictures = dict.fromkeys(ids, "")
    why = "the raw pairs are gone"
    if material.records is not None:
        there = [name for name in ids if name in material.records]
        addresses = thumbnails([material.records[name] for name in there], GALLERY_SIDE, GALLERY_BYTES)
        pictures |= dict(zip(there, addresses, strict=True))
        why = "no picture, or no room for one"
    return [
        Case(
            name,
            _cut(material.text(name), LONGEST_TEXT),
            material.classes[material.labels[k]],
            material.classes[int(material.probabilities[k].argmax())],
            float(confidence[k]),
            list(zip(material.classes, material.probabilities[k].tolist(), strict=True)),
            pictures[name],
            why,
        )
        for k, name in zip(wrong.tolist(), ids, strict=True)
    ]


def errors(material: Material) -> Section:
    """The gallery, filtered by the confusion matrix."""
    found = measures.confusion(material.labels, material.probabilities)
    html = part("cells", material.classes, found.counts.tolist(), found.share.tolist())
    if material.records is None:
        html += part("note", f"No texts and pictures, the raw pairs are gone: {material.no_records}")
    return Section("Errors", "errors", html + part("gallery", cases(material)))


# -- label audit ------------------------------------------------------------------------------------------------


def label_audit(material: Material) -> Section:
    """The queue that audit_labels.py left in the run's folder, for a person to decide on."""
    path = material.run.folder / AUDIT
    if not path.is_file():
        return Section("Label audit", "label-audit", part("no_audit", str(material.run.folder)))
    rows = [dict(row) for row in read_table(path)]
    suspects = [row for row in rows if row["why"]]
    shown = [
        {**row, "text": _cut(row["text"], 200), "confidence": f"{float(row['confidence']):.3f}"}
        for row in suspects[:MOST_SUSPECTS]
    ]
    counts = f"{len(suspects):,} of {len(rows):,} labels are suspect; the first {len(shown):,}, the most suspect first."
    return Section("Label audit", "label-audit", part("audit", counts, shown, material.classes))
