"""Figures as text: what a terminal shows of a run."""

from collections.abc import Iterable, Mapping
from typing import Any

from feats.source import SIDES
from modeling.choices import AVERAGES
from modeling.evaluation.text_tables import SHOWN_AVERAGES, confusion_text, figure_rows, format_table, spread
from modeling.heads.base import n_parameters
from modeling.heads.config import ablation_number, ablation_words
from modeling.runs.run import Run
from modeling.training.config import settings_read

PARTS = {"val": "validation", "test": "test"}
MORE_FIGURES = (*(name for name in SHOWN_AVERAGES if name not in AVERAGES), "log_loss", "ece", "ece_calibrated")
MOST_SHOWN = 5  # trainings whose epochs are shown


def head_line(run: Run) -> str:
    """One line on what was trained: head, parameters, settings."""
    head = run.members[0].config.head
    counts = sorted({n_parameters(m.head) for m in run.members})
    count = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    width = f", D {head.D}" if "D" in settings_read(head.head) else ""
    whole = {m.parameters_with_encoders(run.source) for m in run.members} - {None}
    encoders = f", with its encoders {millions(max(filter(None, whole)))}" if whole else ""
    line = f"head {head.head}{width}, ablation {ablation_number(head.sides)}: {count} parameters{encoders}"
    trained = [m for m in run.members if m.best_epoch is not None and m.epochs is not None]
    if trained:
        best, last = (spread([getattr(m, name) for m in trained]) for name in ("best_epoch", "epochs"))
        line += f"; best epoch {best} of {trained[0].config.ep}, stopped at {last}"
    return line


def millions(count: int) -> str:
    """28.1 M; of less than 0.1 M with three digits."""
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e6:.3f} M"


def cost_line(cost: Mapping[str, Any]) -> str:
    """Seconds and peak memory of a training, and the rates of one that was streamed."""
    line = f"training took {cost['seconds']:.1f} s on {cost['device']}, peak memory {cost['peak_bytes'] / 1e9:.2f} GB"
    if rates := cost.get("streamed"):
        line += (
            f"; streamed {rates['rows_per_second']:,.0f} rows/s, {rates['waiting']:.0%} of it waiting for blocks "
            f"(reading alone: {rates['reading_rows_per_second']:,.0f} rows/s)"
        )
    return line


# -- epochs -----------------------------------------------------------------------------------------------------


def epoch_line(row: Mapping[str, Any], best: str = "") -> str:
    """A row of a history in one line, with its member's fold and seed where it names them; `best`: what to say of an
    epoch that is."""
    whose = [f"{name} {row[name]}" for name in ("fold", "seed") if row.get(name) not in (None, "")]
    name = ", ".join([*whose, f"epoch {row['epoch']}"])
    parts = []
    if row.get("train_loss") is not None:
        parts.append(f"train {_figures(row['train_loss'], row, 'train_')}")
    parts.append(f"validation {_figures(row['val_loss'], row)}")
    counts = {key.removeprefix("predicted_"): n for key, n in row.items() if key.startswith("predicted_")}
    if counts:
        parts.append(f"predicted {', '.join(f'{n} {label}' for label, n in counts.items())}")
    return f"{name}: {'; '.join([*parts, *([best] if best else [])])}"


def _figures(loss: float, row: Mapping[str, Any], prefix: str = "") -> str:
    names = {"accuracy": "accuracy", "weighted_f1": "weighted F1", "macro_f1": "macro F1"}
    known = [f"{words} {row[prefix + name]:.3f}" for name, words in names.items() if row.get(prefix + name) is not None]
    return ", ".join([f"loss {loss:.4f}", *known])


def epochs_shown(run: Run) -> list[str]:
    """The best and the last epoch of each member, of the first `MOST_SHOWN` members where there are more. A member in
    closed form has none."""
    assert run.report is not None
    of_member: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for row in run.report.history:
        of_member.setdefault((row["fold"], row["seed"]), []).append(row)
    trained = [(m, of_member[m.fold or "", m.config.seed]) for m in run.members if m.best_epoch is not None]
    lines = []
    for member, rows in trained[:MOST_SHOWN]:
        best = next(row for row in rows if row["epoch"] == member.best_epoch)
        last = rows[-1]
        for row, words in [(best, "best")] if best is last else [(best, "best"), (last, "last")]:
            named = row if len(run.members) > 1 else {**row, "fold": "", "seed": ""}
            lines.append(epoch_line(named, words))
    if len(trained) > MOST_SHOWN:
        lines.append(f"... and {len(trained) - MOST_SHOWN} more trainings in history.csv")
    return lines


# -- figures ----------------------------------------------------------------------------------------------------


def collapse_notes(run: Run) -> list[str]:
    """What there is to say of heads that predict one class for every validation row."""
    assert run.report is not None
    figures = run.report.figures
    remedy = f"no result; {collapse_remedy([run.members[0].config.head.head])}"
    one = figures["val"].get("collapsed")
    if one:
        return [f"note: this head predicts {one} for every validation row: {remedy}"]
    members = figures.get("members", {})
    lost = members.get("collapsed", [])
    if not lost:
        return []
    named = [
        ", ".join(f"{name} {of[name]}" for name in ("fold", "seed") if of[name] is not None) + f": {of['class']}"
        for of in lost
    ]
    count = f"{len(lost)} of {members['count']} heads predict one class for every validation row"
    return [f"note: {count} ({'; '.join(named)}): {remedy}"]


def collapse_remedy(heads: Iterable[str]) -> str:
    """What lets `heads` that predict one class only tell classes apart: settings that they read."""
    read = [settings_read(head) for head in heads]
    ways = ["raise `lr` or `ep`" if "lr" in of else "raise `C`" if "C" in of else "lower `ridge`" for of in read]
    return f"{', '.join(dict.fromkeys(ways))}, or give `class_weights` balanced"


def report_tables(run: Run) -> str:
    """The figures of a run's report: of the validation rows and the test part, by class, and the protocol."""
    assert run.report is not None
    figures = run.report.figures
    rows = [row for part in ("val", "test") if part in figures for row in figure_rows(figures[part], part)]
    members = figures.get("members", {"count": 1})
    if members["count"] > 1:
        lost = members.get("collapsed", [])
        count = f"  each of {members['count']}" + (f" ({len(lost)} of one class)" if lost else "")
        rows.insert(1, {"rows": count, **_spread(members)})
    if "test_folds" in figures:
        rows.append({"rows": f"test, each of {figures['test_folds']['count']}", **_spread(figures["test_folds"])})
    more = [row for row in rows if "log_loss" in row]
    part = "test" if "test" in figures else "val"
    last, whose = figures[part], f"the {figures[part]['n']} {PARTS[part]} rows"
    per_class = [{"class": name, **of_class} for name, of_class in last["per_class"].items()]
    return "\n\n".join(
        [
            format_table(rows, ["rows", "n", *AVERAGES]),
            format_table(more, ["rows", *MORE_FIGURES]),
            f"by class, {whose}\n{format_table(per_class, ['class', 'precision', 'recall', 'f1', 'support'])}",
            f"confusion, {whose}\n{confusion_text(last['confusion'], run.classes)}",
            f"protocol: {figures['protocol']}",
        ]
    )


def _spread(of_several: Mapping[str, Any]) -> dict[str, str]:
    """Mean±std of figures of several members or folds; of a single one its figures."""
    shown = {name: value for name, value in of_several["mean_std"].items() if name != "n"}
    return {
        name: f"{v['mean']:.3f}" + (f"±{v['std']:.3f}" if v["std"] is not None else "") for name, v in shown.items()
    }


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
