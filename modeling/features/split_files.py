"""Splits that users bring: JSON, CSV, lists of ids, patterns of files."""

import glob
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from feats.csv_files import numbered_csv, parse_csv
from feats.errors import UsageError, first_line, reason_of
from feats.escapes import short_name
from feats.json_files import parse_json
from feats.regular import check_regular
from feats.strings import Labels, Strings
from modeling.features.dealing import check_labels, split_of
from modeling.features.stored_splits import PARTS, Split, check_disjoint, counted, repeated, with_ids

PLACES = ("{fold}", "{part}")  # in a pattern of file names
ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
_FORM = '{"train": [ids], "val": [ids], "test": [ids]}'


def read_split_file(paths: Path | str | Sequence[Path | str], ids: Sequence[str], labels: Sequence[str]) -> list[Split]:
    """The split in one file or three; several from a file of folds, or from lists of folds by a pattern.

    One JSON: `{"train": [ids], "val": [ids], "test": [ids]}`, also a run's split.json, or `{"folds": [...]}` of such,
    as a run with folds leaves. One CSV: columns `id` (or `guid`) and `split`. Two or three lists: CSV files whose first
    column are ids, or text files of one id per line (what follows a comma is ignored, unless it belongs to an id of
    `ids`), for the part in the file's name (`val.txt`, `my_train_ids.csv`), or, where no name tells, for train, val,
    test in that order. Lists of folds: a pattern such as `splits/{part}_{fold}.txt`, of which every name found in the
    place of `{fold}` is a fold; 2 comes before 10. Blanks around an id of a CSV or list are ignored, unless `ids` has
    it with them. Ids of `ids` that no part names stay unused. `labels` (N,) of `ids`, '' where unknown.
    Raises `UsageError` for unreadable files, unknown ids, ids named twice, an empty train or val part, rows without
    a label in them, one class only, a class that train or val lacks, and folds of which only some have a test part or,
    without test parts, several validate a row.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    source = ", ".join(map(str, files))
    ids, labels = Strings.of(ids), Labels.of(labels)
    as_json = len(files) == 1 and files[0].suffix.lower() == ".json"
    known = frozenset(() if as_json else ids)  # what a line means is told by whether it is an id, asked for each
    folds: dict[str, dict[str, Sequence[str]]] = {}  # of a pattern, by what is in the place of {fold}
    if any(place in source for place in PLACES):
        folds = _read_pattern(files, known)
        found = list(folds.values())
    elif len(files) == 1:
        found = _read_json(files[0]) if as_json else [_read_csv(files[0], known)]
    elif len(files) in (2, 3):
        found = [{part: _read_list(file, known) for part, file in zip(_parts_of_files(files), files, strict=True)}]
    else:
        raise UsageError(f"{len(files)} split files; give one (JSON or CSV), or three lists of ids: train, val, test")
    called = list(folds) or [f"{k} of {len(found)}" for k in range(1, len(found) + 1)]
    names = [f"{source}, fold {fold}" for fold in called] if len(called) > 1 else [source]
    for parts, name in zip(found, names, strict=True):
        _check_parts(parts, ids, labels, name)
    _check_folds(found, names, source)
    how: dict[str, Any] = {"files": [_from_first_place(file) for file in files]}
    hows = [{**how, "fold": fold} for fold in folds] or [how] * len(found)
    return [split_of(parts, of_fold) for parts, of_fold in zip(found, hows, strict=True)]


def _check_folds(found: Sequence[dict[str, Sequence[str]]], names: Sequence[str], source: str) -> None:
    tested = [bool(parts.get("test")) for parts in found]
    if any(tested) and not all(tested):
        without, having = names[tested.index(False)], names[tested.index(True)]
        raise UsageError(f"{without} has no test part, and {having} has one; give one to every fold or to none")
    twice = repeated([parts["val"] for parts in found])
    if twice and not any(tested):
        raise UsageError(
            f"{source}: {counted(twice, 'id')} in the val part of several folds; keep one, or give every fold a test "
            "part"
        )


def _read_pattern(files: Sequence[Path], known: Collection[str]) -> dict[str, dict[str, Sequence[str]]]:
    """The parts of each fold."""
    pattern = files[0].as_posix()
    if len(files) > 1 or not all(place in pattern for place in PLACES):
        raise UsageError(
            f"split files {', '.join(map(str, files))}: a pattern stands alone and holds {' and '.join(PLACES)}, such "
            "as splits/{part}_{fold}.txt"
        )
    part_of = {**{part: part for part in PARTS}, **ALIASES}
    lists: dict[str, dict[str, Path]] = {}
    for fold, word in _matching(pattern, part_of):
        of_fold, part = lists.setdefault(fold, {}), part_of[word.lower()]
        file = Path(pattern.replace("{fold}", fold).replace("{part}", word))
        if part in of_fold:
            raise UsageError(f"{of_fold[part]} and {file} are both the {part} part of fold {fold}; keep one")
        of_fold[part] = file
    if not lists:
        raise UsageError(f"no file is called like {pattern}, with {', '.join(PARTS)} for {{part}}; check its folder")
    for fold, of_fold in lists.items():
        for part in PARTS[:2]:
            if part not in of_fold:
                there = ", ".join(str(file) for file in of_fold.values())
                raise UsageError(f"{pattern}: fold {fold} has no {part} list (there is {there}); add it")
    return {
        fold: {part: _read_list(lists[fold][part], known) for part in PARTS if part in lists[fold]}
        for fold in sorted(lists, key=_natural)
    }


def _matching(pattern: str, words: Collection[str]) -> list[tuple[str, str]]:
    """What stands for {fold} and {part} in the names of the files there are."""
    expression = re.escape(pattern)
    for place, meant in (("fold", "[^/]+"), ("part", f"(?i:{'|'.join(sorted(words, key=len, reverse=True))})")):
        escaped = re.escape(f"{{{place}}}")
        expression = expression.replace(escaped, f"(?P<{place}>{meant})", 1).replace(escaped, f"(?P={place})")
    paths = glob.glob(glob.escape(pattern).replace("{fold}", "*").replace("{part}", "*"))
    matches = [re.fullmatch(expression, Path(path).as_posix()) for path in sorted(paths)]
    return [(match["fold"], match["part"]) for match in matches if match]


def _natural(name: str) -> list[str | int]:
    """A key that sorts 2 before 10."""
    return [int(piece) if k % 2 else piece for k, piece in enumerate(re.split(r"(\d+)", name))]


def _from_first_place(file: Path) -> str:
    """A file's name; of a pattern also the folders that have a place."""
    first = next((k for k, part in enumerate(file.parts) if any(place in part for place in PLACES)), -1)
    return "/".join(file.parts[first:])


def _check_parts(parts: dict[str, Sequence[str]], ids: Strings, labels: Labels, source: str) -> None:
    check_disjoint(parts, source)
    rows = {part: ids.positions(members) for part, members in parts.items()}
    unknown = [members[k] for part, members in parts.items() for k in np.flatnonzero(rows[part] < 0).tolist()]
    if unknown:
        raise UsageError(f"{source}: {counted(unknown, 'id')} not among the {len(ids)} rows of the data set")
    for part in ("train", "val"):
        if not len(parts.get(part, ())):
            raise UsageError(f"{source}: no ids for {part}; name some")
        bare = [parts[part][k] for k in np.flatnonzero(~labels.known[rows[part]]).tolist()]
        if bare:
            raise UsageError(f"{source}: {counted(bare, f'{part} id')} without a label in the data set")
    have = {part: set(labels[rows[part]].counts()) for part in ("train", "val")}
    check_labels(labels[np.concatenate([rows["train"], rows["val"]])])
    for part, other in (("val", "train"), ("train", "val")):
        missing = sorted(have[other] - have[part])
        if missing:
            raise UsageError(f"{source}: {part} holds no row of class {', '.join(missing)}; move some there")


def _parts_of_files(paths: Sequence[Path]) -> list[str]:
    known = {**{part: part for part in PARTS}, **ALIASES}
    told = []
    for path in paths:
        words = "".join(c if c.isalnum() else " " for c in path.stem.lower()).split()
        told.append({known[word] for word in words if word in known})
    if not any(told):
        return list(PARTS[: len(paths)])
    if any(len(parts) != 1 for parts in told) or len(set.union(*told)) != len(paths):
        raise UsageError(
            f"can't tell which of {', '.join(path.name for path in paths)} is train, val and test; put the part in "
            "each file's name, or in none and give them in that order"
        )
    return [parts.pop() for parts in told]


def _read_json(path: Path) -> list[dict[str, Sequence[str]]]:
    """The parts of one split, or of each fold."""
    try:
        content = parse_json(_read(path))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({first_line(error)}); expected {_FORM}") from None
    folds = content["folds"] if isinstance(content, dict) and set(content) == {"folds"} else [content]
    if not isinstance(folds, list) or not folds:
        raise UsageError(f'{path} names no folds; expected {_FORM}, or {{"folds": [...]}} of such')
    return [_parts_of(fold, path) for fold in with_ids(folds, path)]


def _parts_of(content: Any, path: Path) -> dict[str, Sequence[str]]:
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, expected {_FORM}")
    named: dict[str, Any] = content
    part_of = {name: ALIASES.get(name, name) for name in named if name != "how"}
    parts = {part: named[name] for name, part in part_of.items()}
    foreign = sorted(parts.keys() - set(PARTS))
    if len(parts) < len(part_of):  # two names of one part
        foreign += [name for name, part in part_of.items() if list(part_of.values()).count(part) > 1]
    if foreign or not all(map(_are_ids, parts.values())):
        problem = short_name(", ".join(map(str, foreign))) or "parts that are no lists of ids"
        raise UsageError(f"{path} holds {problem}, expected {_FORM}")
    return {
        part: members if isinstance(members, Strings) else [str(i) for i in members] for part, members in parts.items()
    }


def _are_ids(members: Any) -> bool:
    """Whether these are strings, or numbers that stand for such."""
    return isinstance(members, Strings) or (
        isinstance(members, list) and all(isinstance(i, str | int | float) and not isinstance(i, bool) for i in members)
    )


def _read_csv(path: Path, known: Collection[str]) -> dict[str, Sequence[str]]:
    (_, columns), *rows = [(line, row) for line, row in numbered_csv(_read(path)) if row] or [(1, [])]
    key = next((name for name in ("id", "guid") if name in columns), None)
    if key is None or "split" not in columns:
        raise UsageError(f"{path} has columns {', '.join(columns) or '(none)'}; expected id and split")
    parts: dict[str, list[str]] = {}
    for line, row in rows:
        cells = {**dict.fromkeys(columns, ""), **dict(zip(columns, row, strict=False))}
        part = cells["split"].strip().lower()
        part = ALIASES.get(part, part)
        if part not in PARTS:
            raise UsageError(f"{path}, line {line}: split {part!r}; expected train, val or test")
        parts.setdefault(part, []).append(_known([cells[key]], known))
    return dict(parts)


def _read_list(path: Path, known: Collection[str]) -> list[str]:
    content = _read(path)
    if path.suffix.lower() == ".csv":
        candidates = [row[:1] for row in parse_csv(content) if row]
    else:
        # "\r" ends lines where no "\n" does; else it is part of an id, as Unicode's line separators are anywhere.
        lines = content.split("\n" if "\n" in content else "\r")
        candidates = [
            [line, line.removesuffix("\r"), line.rpartition(",")[0], line.partition(",")[0]] for line in lines if line
        ]
    names = [name for texts in candidates if (name := _known(texts, known))]
    return names[1:] if names and names[0].lower() in ("id", "guid") else names


def _known(candidates: Sequence[str], known: Collection[str]) -> str:
    """The first candidate that is a known id, as it stands or without the blanks around it; the last one without them
    where none is."""
    tried = [form for text in candidates for form in (text, text.strip())]
    return next((form for form in tried if form in known), tried[-1])


def _read(path: Path) -> str:
    """A file's text with the line ends it has there."""
    try:
        check_regular(path)
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = "it isn't UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason_of(error)
        raise UsageError(f"can't read the split file {path}: {reason}") from None
