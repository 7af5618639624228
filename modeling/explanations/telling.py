"""An explanation in words and tables: what a terminal shows."""

from collections.abc import Mapping, Sequence
from typing import Any

from modeling.evaluation.text_tables import format_table
from modeling.explanations.explanation import Explanation, MethodCheck, PartExplanation
from modeling.explanations.methods import METHODS, OCCLUSION

SHOWN_TEXT = 60  # characters of a neighbour's text
CHECKED = ["part", "method", "scored", "better", "95 %", "by deletion", "by insertion", "orders beaten"]
AIM = 0.9  # the share of explanations better than random that a method should reach


def verdict_words(part: PartExplanation) -> str:
    """Whether the explanation does better than random orders, in words."""
    if part.score is None:
        return f"{'one word' if part.words else 'no words'}: no order to score"
    return f"better than random: {'yes' if part.score.better else 'no'}"


def explanation_lines(explanation: Explanation, texts: Mapping[str, str] = {}) -> list[str]:
    """The target, words, sides, neighbours and scores. `texts` are those of training rows, by id."""
    shown = ", ".join(f"{n} {p:.3f}" for n, p in zip(explanation.classes, explanation.probabilities, strict=True))
    lines = [f"target {explanation.target} ({shown})"]
    for part in explanation.parts:
        lines += ["", *_part_lines(part, explanation.target)]
    if explanation.sides:
        lines += ["", "a side replaced by the training rows' mean loses", _side_table(explanation)]
    if explanation.neighbours:
        lines += ["", "nearest training rows", _neighbour_table(explanation, texts)]
    return [*lines, "", "areas under the target's probability, in order of importance and in random orders",
            _score_table(explanation.parts)]  # fmt: skip


def _part_lines(part: PartExplanation, target: str) -> list[str]:
    head = f"{part.part}: {METHODS[part.method]}"
    if part.completeness is not None:
        told = "complete" if part.completeness.complete else "NOT COMPLETE"
        head += (
            f", {told}: words sum to {part.completeness.total:+.4f}, log-odds less those of padding "
            f"{part.completeness.difference:+.4f} ({part.completeness.steps} steps)"
        )
    if part.picture is not None:
        rows, columns = divmod(int(part.importance.argmax()), part.grid)
        cell = f"row {rows + 1}, column {columns + 1} of {part.grid} x {part.grid}"
        return [f"{head}; the strongest cell for {target}: {cell}"]
    if not part.words:
        return [f"{head}; the text has no words"]
    words = [{"word": w, "log-odds": f"{v:+.3f}"} for w, v in zip(part.words, part.importance, strict=True)]
    return [head, format_table(words, ["word", "log-odds"])]


def _side_table(explanation: Explanation) -> str:
    rows = [
        {"side": side.side, "probability": f"{side.probability:+.3f}", "log-odds": f"{side.log_odds:+.3f}"}
        for side in explanation.sides
    ]
    return format_table(rows, ["side", "probability", "log-odds"])


def _neighbour_table(explanation: Explanation, texts: Mapping[str, str]) -> str:
    rows = []
    for row in explanation.neighbours:
        text = " ".join(texts.get(row.id, "").split())
        shown = text if len(text) <= SHOWN_TEXT else f"{text[: SHOWN_TEXT - 1]}…"
        rows.append({"id": row.id, "label": row.label, "cosine": row.similarity, "text": shown})
    columns = ["id", "label", "cosine", *(["text"] if texts else [])]
    return format_table(rows, columns)


def _score_table(parts: Sequence[PartExplanation]) -> str:
    rows: list[dict[str, Any]] = []
    for part in parts:
        row: dict[str, Any] = {"part": part.part, "method": METHODS[part.method]}
        if part.score is not None:
            row |= {
                "deletion": part.score.deletion,
                "insertion": part.score.insertion,
                "random": float(part.score.random_deletions.mean()),
                "orders beaten": f"{part.score.below:.0%}",
            }
        rows.append({**row, "better than random": verdict_words(part).removeprefix("better than random: ")})
    return format_table(
        rows, ["part", "method", "deletion", "insertion", "random", "orders beaten", "better than random"]
    )


def check_lines(checks: Sequence[MethodCheck], pairs: int) -> list[str]:
    """How often each part's explanations beat random orders, and which method shouldn't be believed."""
    rows = []
    for check in checks:
        low, high = check.interval
        rows.append(
            {
                "part": check.part,
                "method": METHODS[check.method],
                "scored": check.count,
                "better": check.share,
                "95 %": f"{low:.3f}-{high:.3f}",
                "by deletion": check.of_deletions,
                "by insertion": check.of_insertions,
                "orders beaten": f"{check.beaten:.0%}",
            }
        )
    lines = [
        f"explanations of {pairs} validation pairs that are better than random orders (chance: 0.5)",
        format_table(rows, CHECKED),
    ]
    for check in checks:
        if check.incomplete:
            lines.append(f"{check.part}: {check.incomplete} of {pairs} integrated gradients don't add up")
        if check.count and check.share < AIM:
            other = "" if check.method == OCCLUSION else f", or take another method ({METHODS[OCCLUSION]})"
            lines.append(
                f"{check.part}: {METHODS[check.method]} is better than random in less than {AIM:.0%} of pairs; "
                f"believe single explanations only where their own score says yes{other}"
            )
    return lines
