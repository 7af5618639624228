"""Layouts of a folder: the pairs as files `<id>.jpg` and `<id>.txt`, with lists of ids and labels or with a folder for
each class."""

import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from feats.errors import UsageError
from feats.reading.rows import EXPECTED, PICTURES, Row, Rows, decode_file, label_of, read_text_file

SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "dev", "test")
SENTIMENTS = ("negative", "neutral", "positive")


def read_course(path: Path) -> Rows:
    """`train.txt` and `test_without_label.txt`, lines `guid,tag`; tag `null` or empty: unknown."""
    files = {"train": path / "train.txt", "test": path / "test_without_label.txt"}
    present = {split: file for split, file in files.items() if file.is_file()}
    if not present:
        raise UsageError(f"{path} is not of layout course; expected {EXPECTED['course']}")
    rows: list[Row] = []
    for split, file in present.items():
        rows += [Row(split, guid, file.name, number, label=tag) for guid, tag, number in _course_lines(file)]
    _attach_pairs(rows, path)
    filled = {row.split for row in rows}
    return rows, [f"{file.name} holds no rows" for split, file in present.items() if split not in filled]


def _course_lines(file: Path) -> Iterator[tuple[str, str | None, int]]:
    header_possible = True
    for number, line in _numbered_lines(file):
        if not line.strip():
            continue
        if header_possible:
            header_possible = False
            names = [cell.strip().lower() for cell in line.split(",")]
            if names[0] in ("guid", "id") or names[-1] == "tag":
                if names not in (["guid", "tag"], ["guid"]):
                    raise UsageError(f"{file.name} line {number}: columns {','.join(names)}; expected guid,tag")
                continue
        # From the right: a comma can be part of an id, never of a tag.
        guid, _, tag = line.rpartition(",") if "," in line else (line, "", "")
        yield guid.strip(), label_of(tag), number


def read_mvsa(path: Path) -> Rows:
    """`labelResultAll.txt`, tab separated: an id, then `text label,image label` once per annotator."""
    file = path / "labelResultAll.txt"
    if not file.is_file():
        raise UsageError(f"{path} is not of layout mvsa; expected {EXPECTED['mvsa']}")
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    total = 0
    for number, line in _numbered_lines(file):
        if not line.strip() or line.strip().lower().startswith("id\t"):
            continue
        total += 1
        guid, *cells = line.rstrip().split("\t")
        label, why_not = _mvsa_label(cells)
        if label is None:
            dropped[why_not] += 1
        else:
            rows.append(Row("train", guid.strip(), file.name, number, label=label))
    _attach_pairs(rows, path)
    return rows, [f"{count} of {total} pairs dropped: {reason}" for reason, count in dropped.items()]


def _mvsa_label(cells: list[str]) -> tuple[str | None, str]:
    """The published rule: `(label, "")`, or `(None, reason)` for a pair that has none."""
    votes = [[label.strip().lower() for label in cell.split(",")] for cell in cells if cell.strip()]
    if not votes or any(len(vote) != 2 or not set(vote) <= set(SENTIMENTS) for vote in votes):
        return None, f"their labels are not pairs of {', '.join(SENTIMENTS)}"
    text, image = (_majority(labels) for labels in zip(*votes, strict=True))
    if text is None or image is None:
        return None, "the annotators have no majority"
    if text == image or image == "neutral":
        return text, ""
    if text == "neutral":
        return image, ""
    return None, "text and image labels contradict (positive against negative)"


def _majority(labels: Iterable[str]) -> str | None:
    labels = list(labels)
    label, count = Counter(labels).most_common(1)[0]
    return label if 2 * count > len(labels) else None


def _attach_pairs(rows: list[Row], root: Path) -> None:
    """Give each row the files `<id>.<extension>` of the pairs' folder.

    The folder is listed, ids are never joined to a path: one like `../x` has no files rather than a stranger's.
    """
    folder, pictures, texts = _list_pairs(root)
    for row in rows:
        row.image = pictures.get(row.id)
        row.text_path = texts.get(row.id)
        if row.text_path:
            row.raw, row.error = read_text_file(row.text_path, row.text_path.name)
        else:
            row.error = f"no text file {row.id}.txt in {folder.name}"


def _list_pairs(root: Path) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """The folder of the pairs, and its pictures and texts by id."""
    folder = next((root / name for name in ("data", "pics_texts_pair") if (root / name).is_dir()), root)
    pictures: dict[str, tuple[int, str, Path]] = {}
    texts: dict[str, tuple[int, str, Path]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, extension = os.path.splitext(entry.name)
            kinds, by_id = (PICTURES, pictures) if extension.lower() in PICTURES else ((".txt",), texts)
            if extension.lower() in kinds:
                found = (kinds.index(extension.lower()), entry.name, folder / entry.name)
                by_id[stem] = min(by_id.get(stem, found), found)
    first = [{stem: path for stem, (_, _, path) in by_id.items()} for by_id in (pictures, texts)]
    return folder, first[0], first[1]


def _numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    return enumerate(io.StringIO(decode_file(file), newline=None), 1)


# -- a folder for each class -------------------------------------------------------------------------------------


def read_class_folders(path: Path) -> Rows:
    """Files `<name>.jpg` and/or `<name>.txt` in a folder for each class, with all that is below it; without such
    folders beside each other, unlabelled. All that perhaps under `train/`, `val/`, `test/`. An id is the file's path
    without its extension."""
    if not path.is_dir():
        raise UsageError(f"{path} is not of layout folders; expected {EXPECTED['folders']}")
    rows: list[Row] = []
    warnings: list[str] = []
    for split, folder in _split_folders(path).items():
        classes = _class_folders(folder)
        if classes and (beside := [name for name in _own_files(folder) if _is_picture(name)]):
            raise UsageError(
                f"{folder} holds pictures both in folders ({classes[0].name}, ...) and beside them ({beside[0]}, ...); "
                "put each into the folder of its class, or all into one"
            )
        for place in classes or [folder]:
            label = label_of(place.name) if classes else None
            found = _files_of(place, path, deep=bool(classes), warnings=warnings)
            rows += [_row_of(split, name, label, place.name, files) for name, files in found.items()]
    if len(warnings) > 1:
        warnings = [f"{warnings[0]} ({len(warnings)} such files)"]
    return rows, warnings


def looks_like_class_folders(path: Path) -> bool:
    """Whether a folder holds at least two folders of pairs, or pairs themselves, perhaps in folders of splits."""
    folders = _split_folders(path).values()
    return any(len(_class_folders(folder)) > 1 or _own_files(folder) for folder in folders)


def _split_folders(path: Path) -> dict[str, Path]:
    """The folders of the splits by name; the folder itself, as train, where there are none."""
    named = {entry.name: entry for entry in _folders_in(path) if entry.name.lower() in SPLIT_FOLDERS}
    return named if named and not _own_files(path) and len(named) == len(_folders_in(path)) else {"train": path}


def _folders_in(path: Path) -> list[Path]:
    return sorted(path / entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _class_folders(path: Path) -> list[Path]:
    """Folders with pairs right in them."""
    return [folder for folder in _folders_in(path) if _own_files(folder)]


def _own_files(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if _is_pair_file(entry.name) and not entry.is_dir())


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)


def _is_pair_file(name: str) -> bool:
    return not name.startswith(".") and (_is_picture(name) or name.lower().endswith(".txt"))


def _files_of(folder: Path, root: Path, deep: bool, warnings: list[str]) -> dict[str, dict[str, Path]]:
    """Pictures and texts of a folder ("image", "text"), by their path below `root` without the extension."""
    found: dict[str, dict[str, Path]] = {}
    for place, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith(".")) if deep else []
        for name in sorted(filter(_is_pair_file, names)):
            file = Path(place, name)
            files = found.setdefault(file.relative_to(root).with_suffix("").as_posix(), {})
            side = "image" if _is_picture(name) else "text"
            if side in files:
                warnings.append(f"{file} is left out: {files[side].name} beside it has the same name")
            files.setdefault(side, file)
    return found


def _row_of(split: str, name: str, label: str | None, folder: str, files: dict[str, Path]) -> Row:
    row = Row(split, name, folder, name, label=label, image=files.get("image"), text_path=files.get("text"))
    if isinstance(row.text_path, Path):
        row.raw, row.error = read_text_file(row.text_path, row.text_path.name)
    else:
        row.error = f"no text file {Path(name).name}.txt in {folder}"
    return row
