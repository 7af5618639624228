"""Which column of a table is which of ours: as asked, or guessed from usual names where that is clear."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from feats.errors import UsageError
from feats.escapes import short_name
from feats.reading.rows import MANIFEST_COLUMNS, label_of, scalar

# After our own name, which wins where it is there, what others call the same.
USUAL = {
    "id": ("guid", "key", "sku", "uid", "tweet_id"),
    "image": ("image_path", "img", "picture", "file", "filename"),
    "text": ("title", "caption", "tweet", "sentence", "description"),
    "label": ("class", "category", "target", "sentiment", "tag"),
    "split": ("fold", "partition", "subset"),
}
SIDES = ("image", "text")
_SHOWN = 8  # ignored columns that a note names ...
_LONGEST = 60  # ... and characters of each


def parse_columns(words: Iterable[str]) -> dict[str, str]:
    """ "text=title" and the like as {"text": "title"}; "label=" is "": none. Raises `UsageError`."""
    columns: dict[str, str] = {}
    for word in words:
        role, equals, column = word.partition("=")
        if not equals:
            raise UsageError(f"`columns` {word!r}: expected one of ours = the table's, e.g. text=title")
        if role in columns:
            raise UsageError(f"`columns` names {role} twice; once is enough")
        columns[role] = column
    check_columns(columns)
    return columns


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise `UsageError` for columns that aren't ours."""
    unknown = [role for role in columns if role not in MANIFEST_COLUMNS]
    if unknown:
        raise UsageError(
            f"`columns` {unknown[0]}={columns[unknown[0]]}: expected {', '.join(MANIFEST_COLUMNS)} before ="
        )


def plain(column: str) -> str:
    """A column's name as usual ones are written."""
    return column.strip().lower().replace(" ", "_").replace("-", "_")


@lru_cache
def shown(column: str) -> str:
    """A column's name in a message of one line."""
    return short_name(column, _LONGEST)


def recognised(columns: Sequence[str], asked: Mapping[str, str]) -> int:
    """How many of the columns are asked for, or have a usual name."""
    known = {*USUAL, *(name for names in USUAL.values() for name in names), *map(plain, asked.values())} - {""}
    return sum(plain(column) in known for column in columns)


@dataclass
class Columns:
    """The columns of the table `name`: `asked` for by ours ("": there is none), the others guessed. `labels_only`: no
    side is needed.

    JSONL tells its columns line by line: a row may lack some, and a later one may bring more.
    """

    name: str
    asked: Mapping[str, str] = field(default_factory=dict)
    labels_only: bool = False
    seen: dict[str, None] = field(default_factory=dict)  # all columns so far, in their order
    found: dict[str, str] = field(default_factory=dict)  # ours -> the table's
    nones: int = 0  # rows whose label is the word none, which may be meant for a class
    _checked: set[tuple[str, ...]] = field(default_factory=set, repr=False)

    @property
    def numbered(self) -> bool:
        """Whether rows are known by their number, for want of ids."""
        return "id" not in self.found

    def see(self, columns: Sequence[str], where: str = "") -> None:
        """Take note of the columns of a header, or of a line of JSONL. Raises `UsageError` for a column that is needed
        and isn't there or is there twice, and where two columns could be the same of ours."""
        if (key := tuple(columns)) in self._checked:
            return
        first = not self._checked
        self._checked.add(key)
        self.seen |= dict.fromkeys(columns)
        roles = [role for role in MANIFEST_COLUMNS if not self.labels_only or role not in SIDES]
        found = {role: column for role in roles if (column := self._column_of(role, where)) is not None}
        late = {role: column for role, column in found.items() if self.found.get(role, column) != column}
        if not first and self.numbered and "id" in found:
            late["id"] = found["id"]
        if late:
            role, column = next(iter(late.items()))
            raise UsageError(
                f"{self.name}{where}: {shown(column)} could be the {role}, too, and rows before it haven't it; say "
                f"which with `columns` {role}={shown(self.found.get(role, column))}"
            )
        self.found = found
        twice = [column for column in found.values() if columns.count(column) > 1]
        if twice:
            raise UsageError(f"{self.name}{where}: a column is named twice: {shown(twice[0])}; rename one")
        if not self.labels_only and not {found.get(side) for side in SIDES} & set(columns):
            self.check_asked()
            raise UsageError(
                f"{self.name}{where}: columns {_few(columns) or 'none'}; expected image or text among them. Say which "
                f"column is which with `columns`, e.g. text={shown(next((c for c in columns if c), 'title'))}"
            )

    def check_asked(self) -> None:
        """Raise `UsageError` for a column that was asked for and that no row has."""
        for role, column in self.asked.items():
            if column and role not in self.found and not (self.labels_only and role in SIDES):
                # A target is asked for by a setting of its own, beside which `columns` may not be one.
                asked = "" if self.labels_only and role == "label" else f" (`columns` {role}={shown(column)})"
                raise UsageError(f"{self.name} has no column {column!r}{asked}; it has {_few(list(self.seen))}")

    def _column_of(self, role: str, where: str) -> str | None:
        if role in self.asked:
            wanted = self.asked[role]
            exact = [column for column in self.seen if column.strip() == wanted.strip()]
            return next(iter(exact or [c for c in self.seen if plain(c) == plain(wanted)]), None) if wanted else None
        free = [c for c in self.seen if c.strip() and c not in self.asked.values()]
        own = [column for column in free if plain(column) == role]
        named = own or [column for column in free if plain(column) in USUAL[role]]
        if len(named) > 1:
            raise UsageError(
                f"{self.name}{where}: {' and '.join(map(shown, named))} could each be the {role}; say which with "
                f"`columns` {role}={shown(named[0])}{f', or {role}= for none' if role in SIDES else ''}"
            )
        return named[0] if named else None

    def cells(self, values: Mapping[str, Any], where: str) -> dict[str, str | None]:
        """A row's values by our columns: a label as `label_of`, others as `scalar`. Raises `UsageError` as these."""
        cells = {}
        for role, column in self.found.items():
            value, place = values.get(column), f"{where}: {shown(column)}"
            self.nones += role == "label" and isinstance(value, str) and value.strip().lower() == "none"
            cells[role] = label_of(value, place) if role == "label" else scalar(value, place)
        return cells

    def note(self) -> str | None:
        """What a user should hear of it: columns of other names than ours, numbers for ids, what is ignored. None where
        there is nothing to say."""
        renamed = [f"{role}={shown(column)}" for role, column in self.found.items() if plain(column) != role]
        ignored = [column.strip() or "(unnamed)" for column in self.seen if column not in self.found.values()]
        parts = [f"read as {', '.join(renamed)}"] if renamed else []
        parts += ["no column of ids: rows are known by their number"] if self.numbered else []
        parts += [f"other columns ignored: {_few(ignored)}"] if ignored else []
        parts += (
            [f"rows labelled none count as unlabelled ({self.nones}): rename them if it is a class"]
            if self.nones
            else []
        )
        return f"note: {self.name}: {'; '.join(parts)}" if parts else None


def _few(columns: Sequence[str]) -> str:
    return ", ".join(map(shown, columns[:_SHOWN])) + (f", ... ({len(columns)} in all)" if len(columns) > _SHOWN else "")
