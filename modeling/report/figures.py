"""The figures of a run's report, drawn from the numbers of `measures`, `inside` and `embedding`."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from modeling.report.embedding import Embedded
from modeling.report.inside import FirstLayer, SideAttention
from modeling.report.measures import KEPT_SHARES, Confusion, Course, Density, Group, Reliability, RiskCoverage
from modeling.report.sections import FigureFile
from modeling.report.style import DASHES, INK, MARKERS, SIZE, colour, figure_file, shorten

FIGURE_NAMES = {"accuracy": "accuracy", "weighted_f1": "weighted F1", "macro_f1": "macro F1"}


# -- data -------------------------------------------------------------------------------------------------------


def label_distribution(counts: Mapping[str, np.ndarray], classes: Sequence[str]) -> FigureFile:
    """`counts` (C,) of each part of the split; bars show shares, their labels rows."""

    def draw(axes: Axes) -> None:
        width = 0.8 / len(counts)
        for k, (part, of_part) in enumerate(counts.items()):
            shares = 100 * of_part / max(1, of_part.sum())
            at = np.arange(len(classes)) + (k - (len(counts) - 1) / 2) * width
            bars = axes.bar(at, shares, width * 0.92, color=colour(k), label=f"{part}, {of_part.sum():,} rows")
            axes.bar_label(bars, [f"{n:,}" for n in of_part.tolist()], fontsize=7, padding=1)
        axes.set_xticks(range(len(classes)), [shorten(name) for name in classes])
        axes.set(ylabel="share of the part's rows (%)", title="Labels by part of the split")
        axes.margins(y=0.12)
        axes.grid(axis="x", visible=False)
        axes.legend()

    return figure_file("labels", draw)


def token_lengths(tokens: np.ndarray, truncated: int) -> FigureFile:
    """Tokens of each text (N,)."""

    def draw(axes: Axes) -> None:
        axes.hist(tokens, bins=min(40, int(tokens.max()) + 1), color=colour(1))
        axes.axvline(float(np.median(tokens)), color=INK, lw=1, ls="--", label=f"median {np.median(tokens):.0f} tokens")
        axes.set(xlabel="length of the text (tokens)", ylabel="rows", title=f"Text lengths; {truncated:,} texts cut")
        axes.legend()

    return figure_file("text-lengths", draw)


# -- training ---------------------------------------------------------------------------------------------------


def losses(trainings: Sequence[Course], best: Sequence[int | None]) -> FigureFile:
    """Training and validation loss; `best` is each training's chosen epoch."""

    def draw(axes: Axes) -> None:
        for k, course in enumerate(trainings):
            for number, (column, name) in enumerate((("train_loss", "training"), ("val_loss", "validation"))):
                if column in course.values:
                    label = name if k == 0 else None
                    axes.plot(course.epochs, course.values[column], DASHES[number], color=colour(number), label=label)
        _mark_best(axes, trainings, best, "val_loss", 1)
        axes.set(ylabel="loss (nats per row)", title="Loss")
        _epochs(axes)

    return figure_file("loss", draw)


def scores(trainings: Sequence[Course], best: Sequence[int | None]) -> FigureFile:
    """Accuracy and F1s of validation (solid) and training (dashed)."""

    def draw(axes: Axes) -> None:
        for number, (column, name) in enumerate(FIGURE_NAMES.items()):
            for k, course in enumerate(trainings):
                label = f"{name}" if k == 0 else None
                if column in course.values:
                    axes.plot(course.epochs, course.values[column], color=colour(number), label=label)
                if f"train_{column}" in course.values:
                    axes.plot(course.epochs, course.values[f"train_{column}"], ":", color=colour(number), lw=1.2)
        _mark_best(axes, trainings, best, "accuracy", 0)
        axes.set(ylabel="figure (0 to 1)", title="Validation (solid), training (dotted)")
        _epochs(axes)

    return figure_file("metrics", draw)


def predicted_counts(trainings: Sequence[Course], classes: Sequence[str], true: np.ndarray) -> FigureFile:
    """How many validation rows are predicted as each class; `true` (C,) rows there are of it."""

    def draw(axes: Axes) -> None:
        for number, name in enumerate(classes):
            for k, course in enumerate(trainings):
                if f"predicted_{name}" in course.values:
                    label = shorten(name, 20) if k == 0 else None
                    counts = course.values[f"predicted_{name}"]
                    axes.plot(course.epochs, counts, color=colour(number), marker=_marker(number), ms=3.5, label=label)
            if len(trainings) == 1:
                axes.axhline(float(true[number]), color=colour(number), lw=1, ls=":")
        axes.set(ylabel="validation rows", title="Predicted labels (dotted: true)")
        _epochs(axes)

    return figure_file("predicted-counts", draw)


def side_weights(trainings: Sequence[Course]) -> FigureFile | None:
    """The course of a weighted sum's weights; None for heads without."""
    names = [name for name in trainings[0].values if name.startswith("weight_")]
    if not names:
        return None

    def draw(axes: Axes) -> None:
        for number, name in enumerate(names):
            for k, course in enumerate(trainings):
                label = name.removeprefix("weight_") if k == 0 else None
                axes.plot(course.epochs, course.values[name], DASHES[number], color=colour(number), label=label)
        axes.set(ylabel="weight of the side (0 to 1)", title="Weights of the sum")
        _epochs(axes)

    return figure_file("side-weights", draw)


def layer_change(found: FirstLayer) -> list[FigureFile]:
    """The first linear layer's weights and outputs at the start and in the end."""

    def draw_of(what: str) -> FigureFile:
        def draw(axes: Axes) -> None:
            for number, (when, one) in enumerate(zip(("start", "end"), getattr(found, what), strict=True)):
                label = f"{when}: mean {round(one.mean, 3) + 0.0:.3f}, sd {one.std:.3f}"
                axes.stairs(one.density, one.edges, color=colour(number), fill=True, alpha=0.25)
                axes.stairs(one.density, one.edges, color=colour(number), lw=1.4, ls=DASHES[number], label=label)
            axes.set(xlabel=f"value of {what}", ylabel="density", title=f"First linear layer: {what}")
            axes.margins(y=0.22)
            axes.legend(loc="upper right")

        return figure_file(f"first-layer-{what}", draw)

    return [draw_of("weights"), draw_of("outputs")]


def attention(found: SideAttention, classes: Sequence[str]) -> FigureFile:
    """What share of its attention the head pays each side, by true class."""

    def draw(axes: Axes) -> None:
        width = 0.8 / len(found.sides)
        for k, side in enumerate(found.sides):
            at = np.arange(len(classes)) + (k - (len(found.sides) - 1) / 2) * width
            bars = axes.bar(at, 100 * np.nan_to_num(found.shares[:, k]), width * 0.92, color=colour(k), label=side)
            axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
        axes.axhline(100 / len(found.sides), color=INK, lw=0.8, ls="--")
        axes.set_xticks(range(len(classes)), [shorten(name) for name in classes])
        axes.set(ylabel="attention paid (%)", title="Attention between the sides, by true class")
        axes.set_ylim(0, 119)
        axes.legend(ncols=2, loc="upper center")

    return figure_file("attention", draw)


def _epochs(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.legend()


def _mark_best(axes: Axes, trainings: Sequence[Course], best: Sequence[int | None], column: str, number: int) -> None:
    for k, (course, epoch) in enumerate(zip(trainings, best, strict=True)):
        at = np.flatnonzero(course.epochs == epoch)
        if not len(at) or column not in course.values:
            continue
        if len(trainings) == 1:
            axes.axvline(float(epoch or 0), color=INK, lw=1, ls="-.", label=f"chosen: epoch {epoch}")
        label = "chosen epoch" if k == 0 and len(trainings) > 1 else None
        axes.plot([epoch or 0], course.values[column][at], "o", color=colour(number), mec=INK, ms=5, label=label)


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


# -- results ----------------------------------------------------------------------------------------------------


def confusion_matrix(found: Confusion, classes: Sequence[str]) -> FigureFile:
    """Counts, and beneath each its share of the true class's rows, which is the colour."""
    n = len(classes)

    def draw(axes: Axes) -> None:
        axes.imshow(found.share, cmap="cividis", vmin=0, vmax=1)
        for true in range(n):
            for predicted in range(n):
                share = found.share[true, predicted]
                ink = "#ffffff" if share < 0.55 else "#111111"
                words = f"{found.counts[true, predicted]:,}\n{100 * share:.0f} %"
                axes.text(predicted, true, words, ha="center", va="center", color=ink, fontsize=8 if n < 6 else 5)
        names = [shorten(name, 12) for name in classes]
        axes.set_xticks(range(n), names, rotation=0 if n < 5 else 60)
        axes.set_yticks(range(n), names)
        axes.set(xlabel="predicted", ylabel="true", title="Rows, and share of the true class's")
        axes.grid(visible=False)

    side = max(3.4, 0.62 * n + 1.4)
    return figure_file("confusion", draw, (max(SIZE[0], side), side))


def confidence(densities: Sequence[Density | None], classes: Sequence[str]) -> FigureFile:
    """Densities of the prediction's probability, by true class."""

    def draw(axes: Axes) -> None:
        for k, (one, name) in enumerate(zip(densities, classes, strict=True)):
            if one is not None:
                label = f"{shorten(name)}, {one.rows:,} rows"
                axes.plot(one.points, one.values, DASHES[k % len(DASHES)], color=colour(k), label=label)
        axes.set_xlim(1 / len(classes) - 0.05, 1)
        axes.set(xlabel="probability of the prediction", ylabel="density", title="Confidence by true class")
        axes.legend()

    return figure_file("confidence", draw)


def reliability_diagram(after: Reliability, before: Reliability | None) -> FigureFile:
    """Accuracy by confidence; points grow with their rows."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":", label="perfectly calibrated")
        shown = [(after, "calibrated" if before is not None else "as stored", 1)]
        shown += [(before, "before temperature", 0)] if before is not None else []
        for found, name, number in reversed(shown):
            axes.plot(found.confidence, found.accuracy, DASHES[1 - number], color=colour(number), lw=1)
            sizes = 8 + 90 * found.rows / found.rows.max()
            label = f"{name}: ECE {found.ece:.3f}"
            look = {"s": sizes, "color": colour(number), "marker": _marker(number)}
            axes.scatter(found.confidence, found.accuracy, **look, alpha=0.75, label=label)
        axes.set(xlabel="probability of the prediction", ylabel="share that is right", title="Reliability")
        axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.05))
        legend = axes.legend(loc="upper left")
        for handle in legend.legend_handles:
            if handle is not None and hasattr(handle, "set_sizes"):
                handle.set_sizes([25])

    return figure_file("reliability", draw)


def pattern(rows: np.ndarray, starts: np.ndarray, classes: Sequence[str]) -> FigureFile:
    """The probabilities (N, C) of all rows, by true class."""

    def draw(axes: Axes) -> None:
        image = axes.imshow(rows, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for start in starts[1:-1]:
            axes.axhline(start - 0.5, color="#ffffff", lw=1.2)
        there = [k for k in range(len(classes)) if starts[k + 1] > starts[k]]
        middles = [(starts[k] + starts[k + 1] - 1) / 2 for k in there]
        axes.set_yticks(middles, [shorten(classes[k]) for k in there])
        axes.set_xticks(range(len(classes)), [shorten(name) for name in classes])
        axes.set(xlabel="probability of", ylabel="rows by true class", title="Prediction pattern")
        axes.grid(visible=False)
        axes.figure.colorbar(image, ax=axes, label="probability (0 to 1)")

    return figure_file("pattern", draw)


def accuracy_by(groups: Sequence[Group], name: str, what: str, unit: str) -> FigureFile:
    """Accuracy with its interval in groups of rows by a value of `what`."""

    def draw(axes: Axes) -> None:
        at = np.arange(len(groups))
        values = np.array([group.accuracy for group in groups])
        errors = np.array([[g.accuracy - g.interval[0], g.interval[1] - g.accuracy] for g in groups]).T
        axes.errorbar(at, 100 * values, 100 * errors, fmt="o", color=colour(1), capsize=3)
        axes.set_xticks(at, [f"{_span(group)}\n{group.rows:,} rows" for group in groups], fontsize=7)
        axes.set(xlabel=f"{what} ({unit})", ylabel="accuracy (%), 95 % interval", title=f"Accuracy by {what}")
        axes.set_ylim(0, 100)

    return figure_file(name, draw)


def _span(group: Group) -> str:
    low, high = (f"{value:.2g}" for value in (group.low, group.high))
    return low if low == high else f"{low}–{high}"


def coverage(found: RiskCoverage, baseline: float | None) -> FigureFile:
    """Accuracy when only the surest share of the rows is predicted."""

    def draw(axes: Axes) -> None:
        axes.plot(100 * found.coverage, 100 * found.accuracy, color=colour(1))
        for share in KEPT_SHARES:
            value = 100 * found.at(share)
            axes.plot([100 * share], [value], "o", color=colour(0), ms=4)
            where = (-2, 7) if share == 1 else (0, 7)
            axes.annotate(f"{value:.0f} %", (100 * share, value), where, textcoords="offset points", ha="center",
                          fontsize=8)  # fmt: skip
        if baseline is not None:
            axes.axhline(100 * baseline, color=INK, lw=0.9, ls=":", label="always the majority class, all rows")
            axes.legend(loc="lower left")
        axes.set(xlabel="rows kept, the surest first (%)", ylabel="accuracy of these (%)")
        axes.set(title="Predict only when sure", ylim=(min(40, 100 * found.accuracy.min() - 5), 104), xlim=(0, 104))

    return figure_file("risk-coverage", draw)


# -- embeddings -------------------------------------------------------------------------------------------------


def scatter(
    found: Embedded, method: str, what: str, labels: np.ndarray, held_out: np.ndarray, classes: Sequence[str]
) -> FigureFile:
    """Points by class; those of validation rows (`held_out` (N,) bool) are ringed."""
    points = found.points[method]

    def draw(axes: Axes) -> None:
        order = np.random.default_rng(0).permutation(len(points))
        drawn = [colour(label) for label in labels[order].tolist()]
        x, y = points[order].T
        axes.scatter(x, y, 7, drawn, alpha=0.65, linewidths=0, rasterized=True)
        ringed = points[held_out]
        axes.scatter(
            ringed[:, 0], ringed[:, 1], 12, facecolors="none", edgecolors=INK, linewidths=0.35, rasterized=True
        )
        for k, name in enumerate(classes):
            axes.scatter([], [], 18, colour(k), label=shorten(name))
        axes.scatter([], [], 18, facecolors="none", edgecolors=INK, linewidths=0.6, label="validation")
        names = [f"{method} {axis}" for axis in (1, 2)]
        if method == "PCA":
            names = [f"{n} ({100 * share:.0f} % of variance)" for n, share in zip(names, found.explained, strict=True)]
        axes.set(title=f"{method} of the {what}", xlabel=names[0], ylabel=names[1])
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        axes.figure.legend(loc="outside lower center", ncols=min(4, len(classes) + 1), fontsize=7.5)

    return figure_file(f"{method.lower()}-{what.split()[0]}", draw, (4.3, 4.0))
