"""Stage 2: cached features -> heads -> runs, predictions, reports.

    from modeling import load_features, make_split, HeadConfig, fit_head, evaluate, load_run
    from modeling import start_from_run, TuneSettings, finetune_model

The names below are found when they are first used, so that `import modeling` costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for these two a type checker would find the scripts of the same names
    from modeling.runs.leaderboard import compare_runs as compare_runs
    from modeling.runs.listing import list_runs as list_runs

_HOMES = {
    "FeatureSet": "modeling.features.joined",
    "HeadConfig": "modeling.heads.config",
    "Run": "modeling.runs.run",
    "Split": "modeling.features.stored_splits",
    "TrainConfig": "modeling.training.config",
    "TuneSettings": "modeling.finetuning.settings",
    "UsageError": "feats.errors",
    "WarmPredictor": "modeling.prediction.warm",
    "compare_runs": "modeling.runs.leaderboard",
    "evaluate": "modeling.experiments.fitting",
    "finetune_model": "modeling.finetuning.finetune",
    "fit_head": "modeling.experiments.fitting",
    "list_runs": "modeling.runs.listing",
    "load_features": "modeling.features.loading",
    "load_run": "modeling.runs.folder",
    "make_folds": "modeling.features.splits",
    "make_split": "modeling.features.splits",
    "newest_run": "modeling.runs.listing",
    "start_from_encoders": "modeling.finetuning.starts",
    "start_from_run": "modeling.finetuning.starts",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """This package. Python makes a module that is imported an attribute of its package: the scripts list_runs.py and
    compare_runs.py would hide the functions."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
