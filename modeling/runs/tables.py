"""Figures as text: what a terminal shows of a run."""

from collections.abc import Mapping
from typing import Any

from feats.source import SIDES
from modeling.evaluation.metrics import AVERAGES, figure_rows, format_table
from modeling.heads.base import ablation_number, ablation_words, n_parameters
from modeling.runs.run import Run
from modeling.training.config import settings_read


def head_line(run: Run) -> str:
    """One line on what was trained: head, parameters, settings."""
    head = run.members[0].config.head
    counts = sorted({n_parameters(m.head) for m in run.members})
    count = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    width = f", D {head.D}" if "D" in settings_read(head.head) else ""
    return f"head {head.head}{width}, ablation {ablation_number(head.sides)}: {count} parameters"


def report_tables(run: Run) -> str:
    """The figures of a run's report: of the validation rows and the test part, by class, and the protocol."""
    assert run.report is not None
    figures = run.report.figures
    columns = ["rows", "n", "accuracy", "weighted_f1", "macro_f1", "log_loss", "ece", "ece_calibrated"]
    rows = [row for part in ("val", "test") if part in figures for row in figure_rows(figures[part], part)]
    members = figures.get("members", {"count": 1})
    if members["count"] > 1:
        spread = {name: f"{v['mean']:.3f}±{v['std']:.3f}" for name, v in members["mean_std"].items() if name != "n"}
        rows.insert(1, {"rows": f"  each of {members['count']}", **spread})
    last = figures["test" if "test" in figures else "val"]
    per_class = [
        {"class": name, **of_class, **dict(zip(run.classes, confused, strict=True)), "predicted:": ""}
        for (name, of_class), confused in zip(last["per_class"].items(), last["confusion"], strict=True)
    ]
    class_columns = ["class", "precision", "recall", "f1", "support", "predicted:", *run.classes]
    return "\n\n".join(
        [format_table(rows, columns), format_table(per_class, class_columns), f"protocol: {figures['protocol']}"]
    )


def ablation_tables(run: Run) -> str:
    """What a run's report says of absent sides, on its validation rows and on its test part."""
    assert run.report is not None
    figures = run.report.figures
    found = []
    for part, key in (("val", "ablation_eval"), ("test", "ablation_eval_test")):
        if key in figures:
            found.append(ablation_table({ablation_words(SIDES): figures[part], **figures[key]}, part))
    return "\n\n".join(found)


def ablation_table(figures: Mapping[str, Mapping[str, Any]], part: str) -> str:
    """A trained model's figures (`metrics.figures`) on `part` of the rows with both sides, the first, and with what is
    left of one that is absent: their intervals, and the difference to both."""
    title = f"test-time ablation, {part}"
    both = next(iter(figures.values()))
    rows = []
    for left, found in figures.items():
        own, interval, majority = figure_rows(found, left)
        rows += [own, interval]
        if found is not both:
            rows.append({"rows": "  to both", **{name: f"{found[name] - both[name]:+.3f}" for name in AVERAGES}})
    return format_table([{title: row["rows"], **row} for row in [*rows, majority]], [title, "n", *AVERAGES])
