"""What runs' files say of them, their weights aside: enough to list runs, to choose among them and to compare them."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from csv import Error as CSVError
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from feats.csv_files import read_csv
from feats.errors import UsageError, first_line
from feats.source import SIDES
from modeling.choices import AVERAGES
from modeling.evaluation.metrics import marked
from modeling.evaluation.text_tables import spread
from modeling.heads.config import ablation_words
from modeling.heads.registry import HEADS
from modeling.runs.config import CONFIG, PREDICTION_COLUMNS, PREDICTIONS, read_metrics
from modeling.runs.listing import checked_config, is_single_head, latest, newest_first, when_made
from modeling.training.config import settings_read

DEEPEST = 3  # folders between the folder of runs and a run: finetuning_<run>/fold1/lora-8
AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class Entry:
    """A run as its config.json and metrics.json (`figures`) tell of it; `made`: when it was saved."""

    path: Path
    made: datetime
    config: Mapping[str, Any]
    figures: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """finetuned, stack (of `auto`), 5 folds, 3 heads, or head."""
        members = self.config["members"]
        folds = {member.get("fold") for member in members} - {None}
        if self.config.get("finetuned"):
            return "finetuned"
        if self.config["stacked"]:
            return "stack"
        if folds:
            return f"{len(folds)} folds"
        return f"{len(members)} heads" if len(members) > 1 else "head"

    @property
    def head(self) -> str:
        """fusion D256, linear (text only), ...; of a stack the heads it holds. Marked where it predicts one class."""
        names = dict.fromkeys(_head_words(member["train"]["head"]) for member in self.config["members"])
        return marked(", ".join(names), self.figures["val"].get("collapsed"))

    @property
    def caches(self) -> str:
        """The caches of the image side and those of the text side: "efficientnet, minilm+vader"; clip where both are
        the same, "text minilm" where there is one side."""
        of_side = {side: "+".join(self.config["features"][side]) for side in SIDES}
        image, text = (of_side[side] for side in SIDES)
        if image and text:
            return image if image == text else f"{image}, {text}"
        return f"{'image' if image else 'text'} {image or text}"

    @property
    def seed(self) -> str:
        """42, or 42-46 of an ensemble."""
        return str(spread([member["train"]["seed"] for member in self.config["members"]]))

    @property
    def monitor(self) -> str:
        """The figure of `AVERAGES` that chose its epoch; accuracy where that was the loss."""
        monitor = self.config["members"][0]["train"].get("monitor")
        return monitor if monitor in AVERAGES else AVERAGES[0]

    @property
    def n(self) -> int:
        """How many validation rows it has."""
        rows: int = self.figures["val"]["n"]
        return rows

    @property
    def epochs_chosen(self) -> bool:
        """Whether its validation rows chose an epoch."""
        return any(member.get("best_epoch") is not None for member in self.config["members"])

    @property
    def single_head(self) -> bool:
        """Whether it is one head on cached features."""
        return is_single_head(self.config)

    def score(self, figure: str) -> float:
        """One of `AVERAGES` on its validation rows."""
        value: float = self.figures["val"][figure]
        return value

    def deviation(self, figure: str) -> float | None:
        """The standard deviation of that over folds and seeds, where there are several."""
        found = self.figures.get("members", {}).get("mean_std", {}).get(figure, {}).get("std")
        return float(found) if isinstance(found, (int, float)) else None


def _head_words(head: Mapping[str, Any]) -> str:
    name = head["head"]
    width = f" D{head['D']}" if name in HEADS and "D" in settings_read(name) else ""
    sides = tuple(head.get("sides", SIDES))
    return f"{name}{width}" + (f" ({ablation_words(sides)})" if sides != SIDES else "")


# -- reading ----------------------------------------------------------------------------------------------------


def read_entry(path: Path) -> Entry:
    """Of a run's folder. Raises `UsageError` when it is none, or damaged."""
    if not (path / CONFIG).exists():
        raise UsageError(f"{path} is no run: there is no {CONFIG} in it")
    config, figures = checked_config(path), read_metrics(path)
    try:
        entry = Entry(path, when_made(config), config, figures)
        facts = (entry.kind, entry.head, entry.caches, entry.seed, entry.monitor, entry.single_head)
        numbers = [entry.n, *(entry.score(name) for name in AVERAGES)]
        numbers += [deviation for name in AVERAGES if (deviation := entry.deviation(name)) is not None]
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers):
            raise TypeError(f"figures of {facts[0]} that are no numbers")
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}: {first_line(error)}); train again") from None
    return entry


def find_entries(folder: Path) -> tuple[list[Entry], dict[Path, str]]:
    """All runs in `folder`, those inside sweeps and comparisons among them, newest first; and folders that can't be
    read as runs, with the reason."""
    found, bad = {}, dict[Path, str]()
    for path in run_folders(folder):
        try:
            found[path] = read_entry(path)
        except UsageError as error:
            bad[path] = str(error)
    return [found[path] for path in newest_first((entry.made, path) for path, entry in found.items())], bad


def run_folders(folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """Every folder below `folder` with a config.json; what lies in a run isn't searched, and what links lead to only
    where it is a run."""
    try:
        below = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError:  # another user's
        return
    for path in below:
        if (path / CONFIG).exists():
            yield path
        elif depth and not path.is_symlink():
            yield from run_folders(path, depth - 1)


@dataclass(frozen=True)
class Predicted:
    """What a run said of its validation rows, sorted by id: `labels` and `predictions` are names of classes."""

    ids: list[str]
    labels: list[str]
    predictions: list[str]

    def digest(self, classes: Iterable[str]) -> str:
        """The same for the same rows with the same labels, of the same `classes`."""
        return hashlib.sha256(json.dumps([sorted(classes), self.ids, self.labels]).encode()).hexdigest()


def read_predicted(entry: Entry) -> Predicted:
    """From its predictions_val.csv. Raises `UsageError` when that is damaged."""
    file, classes = entry.path / PREDICTIONS, set(entry.config["classes"])
    try:
        header, *rows = read_csv(file)
        if tuple(header[:3]) != PREDICTION_COLUMNS or not rows:
            raise ValueError(f"it begins with {','.join(header)[:80]}")
        rows = sorted(row[:3] for row in rows)
        if not {name for row in rows for name in row[1:]} <= classes or not all(len(row) == 3 for row in rows):
            raise ValueError("a row without id, tag and pred, or of a class that the run doesn't know")
    except (OSError, ValueError, IndexError, CSVError) as error:
        raise UsageError(f"{file} can't be read as predictions ({first_line(error)}); train again") from None
    return Predicted(*(list(column) for column in zip(*rows, strict=True)))


# -- words ------------------------------------------------------------------------------------------------------


def figure_words(figure: str) -> str:
    """weighted F1 of weighted_f1."""
    return figure.replace("_f1", " F1")


def age(seconds: float) -> str:
    """45 s, 12 min, 3 h, 2 d."""
    unit, name = next(((unit, name) for unit, name in AGES if seconds >= unit), AGES[-1])
    return f"{max(seconds, 0) // unit:.0f} {name}"


def age_of(entry: Entry) -> str:
    """How long ago a run was saved; the date of one of the future."""
    if entry.made > latest():
        return f"{entry.made:%Y-%m-%d}"
    return age((datetime.now(UTC) - entry.made).total_seconds())


def rows_words(entries: Sequence[Entry]) -> str:
    """Which rows these runs, whose validation rows are the same, were validated on."""
    of_splits = dict.fromkeys(_split_words(entry.config.get("split")) for entry in entries)
    corrected = {(entry.config.get("corrections") or {}).get("count", 0) for entry in entries} - {0}
    labels = f", {' or '.join(map(str, sorted(corrected)))} labels corrected" if corrected else ""
    return f"{entries[0].n} validation rows of train, {' or '.join(of_splits)}{labels}"


def _split_words(how: Any) -> str:
    folds = len(how) if isinstance(how, list) else 1
    first = how[0] if isinstance(how, list) and how else how
    first = first if isinstance(first, Mapping) else {}
    words = [f"{folds} folds"] if folds > 1 else []
    if "files" in first:
        return " ".join([*words, "split by", ", ".join(map(str, first["files"]))])
    return ", ".join([*words, f"split seed {first['seed']}" if "seed" in first else "split as given"])
