"""Explanations of some validation pairs, beside their pictures."""

import importlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from feats.acceleration import resolve_device
from feats.errors import RowError, UsageError
from feats.images import read_image
from modeling.report.material import Material
from modeling.report.sections import FigureFile, Section
from modeling.report.style import as_file
from modeling.report.template import part

TITLE, ANCHOR = "Explanations", "explanations"


def chosen_pairs(material: Material, count: int) -> list[int]:
    """Numbers of validation rows: half of them right, half wrong, the surest of each."""
    confidence = material.probabilities.max(1)
    order = np.argsort(-confidence, kind="stable")
    right, wrong = (order[material.right[order] == is_right].tolist() for is_right in (True, False))
    half = max(count - len(wrong), math.ceil(count / 2))
    return [*right[:half], *wrong[: count - len(right[:half])]]


def explanations(material: Material, count: int, weights: Mapping[str, str] = {}, device: str = "auto") -> Section:
    """The predicted class of `count` pairs explained; without raw pairs or encoders a section that says so."""
    if material.records is None:
        return Section(TITLE, ANCHOR, part("note", f"No explanations, the raw pairs are gone: {material.no_records}"))
    explanation, explained, drawing, telling = (
        importlib.import_module(f"modeling.explanations.{name}")
        for name in ("explanation", "explained", "drawing", "telling")
    )
    try:
        model = explained.load_explained(material.run, resolve_device(device), weights)
    except UsageError as error:
        return Section(TITLE, ANCHOR, part("note", f"No explanations, an encoder can't be had: {error}"))
    shown: list[tuple[FigureFile, str, list[str]]] = []
    notes = []
    for number in chosen_pairs(material, count):
        name = material.report.ids[number]
        record = material.records[name]
        try:
            picture = read_image(record.image_path)[0] if material.run.source.image else None
        except RowError as error:
            notes.append(part("note", f"{name}: {error}"))
            continue
        found: Any = explanation.explain_pair(model, picture, record.text)
        true = material.classes[material.labels[number]]
        title = f"{name}: predicted {found.target}, {'right' if found.target == true else f'true {true}'}"
        words = [f"{one.part}: {one.method}, {telling.verdict_words(one)}" for one in found.parts]
        shown.append((as_file(f"explanation-{len(shown) + 1}", drawing.draw(found)), title, words))
    html = "".join(notes) + part("explained", shown)
    return Section(TITLE, ANCHOR, html, [file for file, _, _ in shown])
