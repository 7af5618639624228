"""The rows of a table whose encoders the study tuned: trained end to end on raw pairs, each a run beside the others."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from feats.errors import CantWriteError, UsageError
from feats.leftovers import temporary_folder
from feats.parts import open_cache
from modeling.finetuning.settings import TuneSettings
from modeling.finetuning.studies import MODELS, EncoderChoice, tuning_recipe, with_one_rate
from modeling.heads.config import HeadConfig
from modeling.reproduction.published import Row, Table
from modeling.reproduction.sources import SUFFIX, caches_in
from modeling.reproduction.tables import NOT_TUNED, TUNED, Result, Settings, side_removed, split_of
from modeling.runs.config import is_whole
from modeling.runs.pairs import DataPlace, kept_place

Progress = Callable[[int, int], Any]  # rows done, rows to do


def place_of(settings: Settings, given: DataPlace) -> DataPlace:
    """Where raw pairs lie: as `given`, else as the first of the caches says, else in `data`."""
    for cache in caches_in(settings.feats):
        with open_cache(settings.feats / f"{cache.name}{SUFFIX}") as store:
            source = store.source
        if source is not None:
            return given.over(kept_place(source))
    return given


def encoders_of(row: Row) -> list[EncoderChoice]:
    """The encoders of the study's model that a row's head reads."""
    model = MODELS[row.model or ""]
    return [choice for side, choice in (("image", model.image), ("text", model.text)) if side in row.sides]


def tuned_results(
    table: Table,
    rows: Sequence[Row],
    settings: Settings,
    place: DataPlace = DataPlace(),
    weights: Mapping[str, str] = {},
    *,
    train: bool,
    made_by: Mapping[str, Any] = {},
    say: Callable[[str], Any] = lambda line: None,
    bar: Callable[[str], AbstractContextManager[Progress]] | None = None,
) -> list[Result]:
    """The tuned rows among `rows`: those with a finished run in the table's folder, and with `train` the others, tuned
    now by the study's recipe. `weights` by encoder, as `start_from_encoders` takes them; those of encoders that a row
    has none of are left aside. `made_by` as in `frozen_results`.

    A row whose weights or pairs can't be had has a result that says why."""
    rows = [row for row in rows if row.tuned]
    if not rows:
        return []
    place = place_of(settings, place)
    folder = settings.folder_of(table)
    content = pairs_digest(place) if train or any(folder.glob("tuned_*")) else None
    found: dict[str, Result] = {}
    for row in rows:
        if row.ablation_of is not None:
            continue
        if isinstance(content, UsageError):
            found[row.label] = Result(row, TUNED, reason=str(content) if train else NOT_TUNED)
            continue
        own = {choice.name: weights[choice.name] for choice in encoders_of(row) if choice.name in weights}
        path = folder / run_name(table, row, content, own)
        if is_whole(path):
            found[row.label] = _result(row, path)
        elif not train:
            found[row.label] = Result(row, TUNED, reason=NOT_TUNED)
        else:
            scored_without = any(other.ablation_of == row.label for other in table.rows)
            say(f"tune {row.label}")
            try:
                if path.exists():
                    raise UsageError(f"{path} is damaged; remove it, and run the command again")
                _tune(table, row, path, place, own, settings, scored_without, made_by, say, bar)
                found[row.label] = replace(_result(row, path), made=(path,))
            except CantWriteError:
                raise
            except UsageError as error:
                found[row.label] = Result(row, TUNED, reason=" ".join(str(error).split()))
    for row in rows:
        if row.ablation_of is not None:
            found[row.label] = side_removed(row, TUNED, found)
    return [found[row.label] for row in rows]


def _result(row: Row, path: Path) -> Result:
    model = MODELS[row.model or ""]
    told = [] if row.head == model.head else [f"model {row.model} with head {row.head}"]
    return Result(row, TUNED, (path,), tuple(told))


def pairs_digest(place: DataPlace) -> str | UsageError:
    """A digest of the labelled pairs' ids, labels and texts, or why they can't be read."""
    try:
        records = place.read()["train"]
    except (UsageError, KeyError) as error:
        return UsageError(f"the pairs can't be read ({error}); name their folder with `data`")
    told = [[record.id, record.label, record.text] for record in records]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def run_name(table: Table, row: Row, content: str | None, weights: Mapping[str, str]) -> str:
    """The same for the same tuning of the same pairs, known before any weights are loaded."""
    shape, settings = tuning_of(table, row)
    decides = [row.model, asdict(shape), asdict(settings), asdict(split_of(table.study)), content]
    digest = hashlib.sha256(json.dumps([*decides, sorted(weights.items())], default=str).encode()).hexdigest()
    plain = "".join(c if c.isalnum() else "-" for c in row.label)
    return f"tuned_{plain}_{digest[:10]}"


def tuning_of(table: Table, row: Row) -> tuple[HeadConfig, TuneSettings]:
    """A row's head and how it is tuned: the study's recipe for tuned encoders, and what is the row's own."""
    recipe = with_one_rate({**tuning_recipe(table.study.letter, row.model), **row.settings})
    values = {**recipe, "head": row.head, "sides": row.sides}
    of_head, of_tuning = ({f.name for f in fields(kind)} & values.keys() for kind in (HeadConfig, TuneSettings))
    head = HeadConfig(**{name: values[name] for name in of_head})
    return head, TuneSettings(**{name: values[name] for name in of_tuning})


def _tune(
    table: Table,
    row: Row,
    path: Path,
    place: DataPlace,
    weights: Mapping[str, str],
    settings: Settings,
    ablation_eval: bool,
    made_by: Mapping[str, Any],
    say: Callable[[str], Any],
    bar: Callable[[str], AbstractContextManager[Progress]] | None,
) -> None:
    # With these torch, transformers and peft: slow to import.
    from modeling.finetuning.finetune import finetune_model, no_bar
    from modeling.finetuning.starts import start_from_encoders

    head, tuning = tuning_of(table, row)
    model = MODELS[row.model or ""]
    with temporary_folder() as scratch:
        start = start_from_encoders(
            model.image,
            model.text,
            head,
            tuning,
            split_of(table.study),
            device=settings.device,
            place=place,
            weights=weights,
            tokens=model.tokens,
            scratch=Path(scratch),
        )
        finetune_model(
            start,
            tuning,
            path.parent,
            name=path.name,
            ablation_eval=ablation_eval,
            caches=settings.feats,
            **made_by,
            say=say,
            bar=bar or no_bar,
        )
