"""What was finetuned before, by what runs and comparisons left on disk."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from feats.errors import UsageError
from modeling.evaluation.metrics import collapsed_class, marked
from modeling.finetuning.comparison import SETTINGS
from modeling.runs.config import CONFIG, is_whole, read_config, read_metrics
from modeling.runs.entries import age
from modeling.search.sweep import MARKDOWN


def finetunings(runs: Path) -> list[dict[str, Any]]:
    """A row for each finetuned run in the folder `runs` and in the comparisons there, newest first: what was tuned and
    how, its validation figures, and what it cost. What can't be read is left out."""
    found = []
    for path, config in _finetuned(runs):
        try:
            row = _row(config, read_metrics(path)["val"])
            made = datetime.fromisoformat(config["created"])
        except (UsageError, KeyError, TypeError, ValueError):
            continue
        seconds = (datetime.now(UTC) - made).total_seconds()
        found.append((made, {"run": str(path.relative_to(runs)), "age": age(seconds), **row}))
    return [row for _, row in sorted(found, key=lambda of_run: of_run[0], reverse=True)]


def verdicts(runs: Path) -> dict[str, str]:
    """The last line of each comparison in the folder `runs`, by its name."""
    found = {}
    for file in sorted(runs.glob(f"[!.]*/{SETTINGS}")):
        table = file.with_name(MARKDOWN)
        if table.is_file():
            found[file.parent.name] = table.read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
    return found


def _finetuned(runs: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for pattern in ("[!.]*", "[!.]*/fold*/[!.]*"):
        for file in runs.glob(f"{pattern}/{CONFIG}"):
            if is_whole(file.parent) and (config := read_config(file.parent)).get("finetuned"):
                yield file.parent, config


def _row(config: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    facts, features = config["finetuned"]["facts"], config["features"]
    how = [f"lora-{facts['lora']}" if facts["lora"] else facts["tune"]]
    collapsed = collapsed_class(figures["confusion"], figures["classes"])
    how += [name for name, there in (("soup", facts["soup"]), ("wise-ft", facts["wise_ft"])) if there]
    return {
        "encoders": "+".join(dict.fromkeys([*features["image"], *features["text"]])),
        "head": config["members"][0]["train"]["head"]["head"],
        "tuned": marked(" ".join(how), collapsed),
        "lr": f"{facts['lr']:g}",
        "ep": facts["ep"],
        "bs": facts["bs"],
        "trained M": facts["trained_parameters"] / 1e6,
        "accuracy": figures["accuracy"],
        "macro_f1": figures["macro_f1"],
        "s": round(facts["seconds"]),
        "peak GB": facts["peak_bytes"] / 1e9,
    }
