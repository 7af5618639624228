"""Figures as text: what a terminal shows of a run."""

from collections.abc import Mapping
from typing import Any

from modeling.evaluation.metrics import figure_rows, format_table
from modeling.heads.base import ablation_number, n_parameters
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
        rows.insert(1, {"rows": f"  each of {members['count']}", **_spread(members)})
    if "test_folds" in figures:
        rows.append({"rows": f"test, each of {figures['test_folds']['count']}", **_spread(figures["test_folds"])})
    last = figures["test" if "test" in figures else "val"]
    per_class = [
        {"class": name, **of_class, **dict(zip(run.classes, confused, strict=True)), "predicted:": ""}
        for (name, of_class), confused in zip(last["per_class"].items(), last["confusion"], strict=True)
    ]
    class_columns = ["class", "precision", "recall", "f1", "support", "predicted:", *run.classes]
    return "\n\n".join(
        [format_table(rows, columns), format_table(per_class, class_columns), f"protocol: {figures['protocol']}"]
    )


def _spread(of_several: Mapping[str, Any]) -> dict[str, str]:
    """Mean±std of figures of several members or folds; of a single one its figures."""
    shown = {name: value for name, value in of_several["mean_std"].items() if name != "n"}
    return {
        name: f"{v['mean']:.3f}" + (f"±{v['std']:.3f}" if v["std"] is not None else "") for name, v in shown.items()
    }
