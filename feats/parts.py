"""A cache in parts: what several processes have made of a split, each of them a cache of some rows.

Beside the place of the joined cache, `<name>_<split>.h5`, lies the folder `<name>_<split>.parts/` with `plan.json`,
what all workers agree on, and one `part-<number>.h5` for each piece of the split, complete and readable alone. A part
appears under its name only when it is whole.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from feats.cache_reader import CacheError, CacheReader, fingerprint_difference
from feats.errors import UsageError, first_line
from feats.escapes import few
from feats.json_files import parse_json, read_text
from feats.quarantine import quarantine_path
from feats.row_runs import pieces, split_where
from feats.source import Source, data_identity
from feats.store import FeatureStore
from feats.strings import Labels, Strings
from feats.writing import settle

FORMAT_VERSION = 1
OPEN_PARTS = 16  # files a reader holds open at a time


def parts_folder(path: Path) -> Path:
    """Where the parts of the cache at `path` lie."""
    return path.with_suffix(".parts") if path.name else path / ".parts"  # "." has no name to put an end to


def part_path(folder: Path, number: int) -> Path:
    """Where part `number` lies in a folder of parts."""
    return folder / f"part-{number:08d}.h5"


@dataclass(frozen=True)
class PartsPlan:
    """What all who make parts of one cache agree on.

    `fingerprint` is the features' without its "data", which each part and the joined cache have of their own rows;
    `kept` as `feats.extraction.plan.Plan.kept`; `features` maps datasets to the shape of one row; `pieces` describe
    the rows of each part (`feats.pieces.Pieces.describe`).
    """

    fingerprint: Mapping[str, Any]
    kept: Mapping[str, Any]
    features: Mapping[str, Sequence[int]]
    layout: str
    split: str
    pieces: Sequence[Mapping[str, Any]]

    @cached_property
    def text(self) -> str:
        """As `plan.json` holds it."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "PartsPlan":
        """The plan of that text. Raises `ValueError` that says what is wrong for anything else."""
        told = parse_json(text)
        if not isinstance(told, dict) or told.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"it isn't a plan of format {FORMAT_VERSION}")
        kinds = {"fingerprint": dict, "kept": dict, "features": dict, "layout": str, "split": str, "pieces": list}
        if told.keys() != {"format_version", *kinds}:
            raise ValueError(f"it has {', '.join(told)}; expected format_version, {', '.join(kinds)}")
        wrong = [name for name, kind in kinds.items() if not isinstance(told[name], kind)]
        if not isinstance(told["kept"], dict) or not isinstance(told["kept"].get("block_rows"), int):
            wrong.append("kept.block_rows")
        if not wrong and not all(map(_is_shape, told["features"].values())):
            wrong.append("features")
        if not wrong and not told["pieces"]:
            wrong.append("pieces")
        if not wrong and not all(isinstance(piece, dict) for piece in told["pieces"]):
            wrong.append("pieces")
        if wrong:
            raise ValueError(f"its {wrong[0]} isn't of the right kind")
        return cls(**{name: told[name] for name in kinds})


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(isinstance(size, int) and size > 0 for size in shape)


def plan_path(folder: Path) -> Path:
    """Where the plan lies in a folder of parts."""
    return folder / "plan.json"


def read_plan(folder: Path) -> PartsPlan | None:
    """The plan of a folder of parts; None where there is none yet. Raises `UsageError` for one that is damaged."""
    path = plan_path(folder)
    remedy = f"remove {folder} and make it again"
    try:
        return PartsPlan.from_json(read_text(path, remedy))
    except ValueError as error:
        raise UsageError(f"{path} can't be read ({first_line(error)}); {remedy}") from None
    except UsageError as error:
        # It may come and go at any moment: what counts is what reading it met, not whether it is there afterwards.
        if isinstance(error.__context__, FileNotFoundError) or not path.exists():
            return None
        raise


def publish(unfinished: Path, path: Path) -> None:
    """Give a finished cache its name, after its reasons have theirs; both are on disk when this returns. Raises
    `OSError`."""
    if quarantine_path(unfinished).exists():
        os.replace(quarantine_path(unfinished), quarantine_path(path))
    else:
        quarantine_path(path).unlink(missing_ok=True)
    os.replace(unfinished, path)
    settle(path)


def is_plan_of(plan: PartsPlan, folder: Path) -> bool:
    """Whether a folder of parts holds this very plan. Raises `UsageError` as `read_plan`."""
    with suppress(OSError, ValueError):
        if plan_path(folder).read_text(encoding="utf-8") == plan.text:
            return True  # asked for every part, and to understand a plan of as many pieces takes long
    return read_plan(folder) == PartsPlan.from_json(plan.text)


# -- caches, whole or in parts -----------------------------------------------------------------------------------


def joined_path(path: Path | str) -> Path:
    """A cache's own path, for it or for the folder of its parts."""
    path = Path(path)
    return path.with_suffix(".h5") if path.suffix == ".parts" else path


def is_cache(path: Path) -> bool:
    """Whether there is a cache at `path`, or parts of one."""
    return path.is_file() or plan_path(parts_folder(path)).is_file()


def cache_paths(folder: Path, split: str | None = None) -> list[Path]:
    """The paths `<name>_<split>.h5` of all caches in a folder, those in parts included, sorted; without `split` of all
    splits."""
    names = f"*_{split}" if split else "*"
    in_parts = (plan.parent for plan in folder.glob(f"{names}.parts/plan.json"))
    return sorted({*folder.glob(f"{names}.h5"), *map(joined_path, in_parts)})


def open_cache(path: Path | str) -> CacheReader:
    """Open a cache for reading: the file at `path`, else its parts. While parts are joined it is they that are read.

    `path` may also be the folder of parts. Raises `CacheError` when there is neither, or it is damaged.
    """
    path = joined_path(path)
    if not plan_path(parts_folder(path)).is_file():
        return FeatureStore.open(path)
    if not path.is_file():
        return PartedStore(path)
    try:
        store = FeatureStore.open(path)
    except CacheError:
        parts = PartedStore(path)
        if not parts.complete:
            raise
        return parts
    if store.complete:
        return store
    store.close()
    return PartedStore(path)


class PartedStore(CacheReader):
    """All parts of a cache, read as if they were one: rows are numbered through them in order.

    `path` is the folder of parts, `shared` the plan they were made by, `missing` numbers the parts that aren't there
    yet. With any missing only `path`, `plan`, `features`, `complete` and `verify` tell something, the rest raises
    `CacheError`, as it does when parts contradict the plan or have an id in common. Few files are open at a time.
    """

    def __init__(self, path: Path | str):
        self.path = parts_folder(joined_path(path))
        shared = read_plan(self.path)
        if shared is None:
            raise CacheError(f"no cache {joined_path(path)}, nor parts of it in {self.path}; make it by an extraction")
        self.shared = shared
        self.plan = dict(shared.kept)
        self.missing = [n for n in range(len(shared.pieces)) if not part_path(self.path, n).is_file()]
        self._open: OrderedDict[int, FeatureStore] = OrderedDict()
        self._trusted: dict[int, set[str]] = {}

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def _part(self, number: int) -> FeatureStore:
        """A part, open. It stays so until `OPEN_PARTS` others have been asked for."""
        if number not in self._open:
            if len(self._open) >= OPEN_PARTS:
                self._open.popitem(last=False)[1].close()
            part = self._open[number] = FeatureStore.open(part_path(self.path, number))
            # Checking takes as long as reading all of a part: once is enough, however often it is opened again.
            part.trusted = self._trusted.setdefault(number, part.trusted)
        self._open.move_to_end(number)
        return self._open[number]

    def _parts(self) -> Iterator[FeatureStore]:
        """All parts in order. Raises `CacheError` when there are any missing."""
        if self.missing:
            raise CacheError(
                f"{len(self.missing)} of {len(self.shared.pieces)} parts are still to be made in {self.path}: run the "
                "same extraction again"
            )
        return (self._part(number) for number in range(len(self.shared.pieces)))

    @cached_property
    def _rows(self) -> "_Rows":
        """What is kept of all rows while the parts aren't open."""
        ids, status = [], []
        reasons: dict[str, str] = {}
        for part in self._parts():
            self._check_part(part)
            ids.append(part.ids)
            status.append(part.status)
            reasons |= part.reasons
        found = _Rows(Strings.concatenate(ids), np.concatenate(status), reasons, np.cumsum([0, *map(len, ids)]))
        twice = found.ids.repeated()
        if twice:
            raise CacheError(
                f"{len(twice)} ids are in more than one row of {self.path}: {few(twice)}; give the rows ids of their "
                "own and extract again with another `name`"
            )
        return found

    def _check_part(self, part: FeatureStore) -> None:
        """Raise `CacheError` for a part that isn't whole or was made by another plan."""
        own = {key: value for key, value in part.fingerprint.items() if key != "data"}
        remedy = f"remove {part.path} and run the same extraction again"
        if not part.complete:
            raise CacheError(f"{part.path} isn't complete; {remedy}")
        difference = fingerprint_difference(own, self.shared.fingerprint)
        if difference:
            raise CacheError(f"{part.path} was made by something else than the other parts ({difference}); {remedy}")
        if part.plan != self.plan or part.features != self.features:
            raise CacheError(f"{part.path} was made by another plan than the other parts; {remedy}")

    # -- facts --------------------------------------------------------------------------------------------------

    @cached_property
    def ids(self) -> Strings:
        """N of them."""
        return self._rows.ids

    @cached_property
    def status(self) -> np.ndarray:
        """(N,) uint8, done or quarantined."""
        return self._rows.status

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Id -> why it is in quarantine."""
        return self._rows.reasons

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """As that of the joined cache."""
        ids = self.ids  # raises where the parts are no cache
        return {**next(self._parts()).fingerprint, **self.shared.fingerprint, "data": data_identity(ids)}

    @property
    def complete(self) -> bool:
        """No part is missing."""
        return not self.missing

    @property
    def tags(self) -> Labels:
        """N labels, '' where unknown."""
        return Labels.concatenate([part.tags for part in self._parts()])

    @property
    def features(self) -> dict[str, tuple[int, ...]]:
        """Dataset -> shape of one row, for the feature datasets; of one token for `text_tokens`."""
        return {name: tuple(shape) for name, shape in sorted(self.shared.features.items())}

    @property
    def schema(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Dataset -> (shape, dtype), as that of the joined cache."""
        schemas = [part.schema for part in self._parts()]
        found = {}
        for name, (shape, _) in schemas[0].items():
            rows = sum(schema[name][0][0] for schema in schemas)
            if name == "text_offsets":
                rows -= len(schemas) - 1
            widest = np.result_type(*(np.dtype(schema[name][1]) for schema in schemas))
            found[name] = ((rows, *shape[1:]), str(widest))
        return found

    @property
    def written_at(self) -> float:
        """When the first part was made, in seconds since the epoch."""
        return min(part.written_at for part in self._parts())

    def facts(self, name: str) -> np.ndarray:
        """A dataset of `ROW_FACTS`, (N,)."""
        return np.concatenate([part.facts(name) for part in self._parts()])

    @property
    def parameters(self) -> dict[str, int] | None:
        """How many parameters the encoder of each side has."""
        return next(self._parts()).parameters

    def token_counts(self) -> np.ndarray:
        """Tokens there is room for, per row (N,); only in a cache with `text_tokens`."""
        return self._token_counts

    @cached_property
    def _token_counts(self) -> np.ndarray:
        return np.concatenate([part.token_counts() for part in self._parts()])

    @property
    def source(self) -> Source | None:
        """Where the raw pairs lay; the folder is the one of the first part."""
        sources = [part.source for part in self._parts()]
        told = [source for source in sources if source is not None]
        if not told or len(told) < len(sources):
            return None
        sides = [source.images for source in told], [source.texts for source in told]
        images, texts = (Strings.concatenate([Strings.of(paths) for paths in of_side]) for of_side in sides)
        return replace(told[0], images=images, texts=texts)

    # -- reading ------------------------------------------------------------------------------------------------

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """As `FeatureStore.read_rows`. Memory beyond the result is one block."""
        self._check_rows(rows)
        shape, dtype = next(self._parts()).shape_of(name)
        out = np.empty((len(rows), *shape), dtype)
        for chosen, part, own in self._by_part(rows):
            out[chosen] = part.read_rows(name, own)
        return out

    def read_token_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `FeatureStore.read_token_rows`."""
        self._check_rows(rows)
        shape, dtype = next(self._parts()).shape_of("text_tokens")
        starts = np.concatenate([[0], np.cumsum(self.token_counts()[rows])])
        out = np.empty((starts[-1], *shape), dtype)
        for chosen, part, own in self._by_part(rows):
            values, offsets = part.read_token_rows(own)
            for side_by_side in split_where(np.arange(len(chosen)), chosen, 1):
                first, last = side_by_side[0], side_by_side[-1]
                out[starts[chosen[first]] : starts[chosen[last] + 1]] = values[offsets[first] : offsets[last + 1]]
        return out, starts

    def _by_part(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, FeatureStore, np.ndarray]]:
        """Positions in `rows`, the part those rows are in, and their numbers there; ascending, a block at a time."""
        starts = self._rows.starts
        order = np.argsort(rows, kind="stable")
        part_of = np.searchsorted(starts, rows[order], "right") - 1
        for same_part in split_where(np.arange(len(rows)), part_of):
            number = int(part_of[same_part[0]])
            for piece in pieces(order[same_part], self.block_rows):
                yield piece, self._part(number), rows[piece] - starts[number]

    def stored(self, first: int, stop: int) -> dict[str, np.ndarray]:
        """As `FeatureStore.stored`."""
        starts = self._rows.starts
        found = []
        for number in range(int(np.searchsorted(starts, first, "right")) - 1, int(np.searchsorted(starts, stop))):
            low, high = int(starts[number]), int(starts[number + 1])
            found.append(self._part(number).stored(max(first, low) - low, min(stop, high) - low))
        return {name: np.concatenate([piece[name] for piece in found]) for name in found[0]}

    def verify(self) -> list[str]:
        """Verify every part that is there; returns what is wrong, one line each, missing parts included."""
        problems = []
        for number in range(len(self.shared.pieces)):
            if number not in self.missing:
                try:
                    part = self._part(number)
                    self._check_part(part)
                    problems += [f"{part.path.name}: {problem}" for problem in part.verify()]
                except CacheError as error:
                    problems.append(str(error))
        if not problems:
            try:
                _ = self._rows
            except CacheError as error:
                problems.append(str(error))
        return problems


@dataclass(frozen=True)
class _Rows:
    ids: Strings
    status: np.ndarray  # (N,) uint8
    reasons: dict[str, str]
    starts: np.ndarray  # (parts + 1,) int64, the first row of each part, then N
