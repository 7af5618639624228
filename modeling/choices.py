"""Names and defaults that command lines show, of modules that are slow to import: they take them from here."""

from dataclasses import dataclass
from pathlib import Path

FEATS, RUNS = Path("saved/feats"), Path("saved/runs")  # the folders of caches and of runs
ENCODERS = "encoders"  # the folder of a finetuned run's own, in the run's
FORMATS = ("csv", "json", "jsonl")  # of submissions
LAYOUTS = ("terminal", "markdown", "latex", "csv")  # of leaderboards
METHODS = ("frozen", "lp_ft", "last-2", "lora-8", "full", "soup")  # of finetuning, compared with one another
NORMS = ("none", "l2", "standard")
STREAMING = ("auto", "always", "never")
SHARE = 0.5  # of the memory available: what features in float32 may take before they are streamed
ABSENT = ("blank", "mean")
AVERAGES = ("accuracy", "weighted_f1", "macro_f1")  # the figures that get intervals and tests
VOTES = ("soft", "majority")
TIE = "neutral"
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
DRAWS = 5
FOLDS = 5
CURVE_FILE = "learning_curve.csv"
SEEDS = 3  # one alone may be a lucky one
NEWEST, BEST = "newest", "best"


@dataclass(frozen=True)
class SplitSettings:
    """How the labelled rows are split: by `files`, else into `folds`, else by the ratios."""

    val_ratio: float = 0.1
    test_ratio: float = 0.0
    seed: int = 42
    folds: int | None = None
    files: tuple[Path, ...] = ()
    duplicates_together: bool = True  # pairs with the same picture or text: in one part, or wherever they fall


@dataclass(frozen=True)
class VoteSettings:
    """How several runs decide: by the mean of their calibrated probabilities (soft), or by most votes (majority).

    `tie` is the class that gets a tie if it is among the tied (None: neutral, where that is a class)."""

    vote: str = "soft"
    tie: str | None = None
