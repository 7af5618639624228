"""Text and JSON files that anybody may have written: another version, another program, a person, a broken disk.

The one door for them: whatever isn't a regular file, is too big, isn't UTF-8 or isn't JSON of the expected shape is
told in one line that names the file.

A shape says what a value must be, and nothing about what else an object may hold:

    str, int, float | None      of that type; numbers are finite and below 2^63, an int will do for a float
    [shape]                     a list of such
    {"name": shape}             an object with that member; "name?": where it is there
    {str: shape}                an object whose members, whatever their names, are all such
    (None, shape)               one of these; what is wrong is told of the last
"""

import json
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from feats.errors import UsageError, first_line, reason_of
from feats.escapes import short_name
from feats.regular import check_regular

MAX_BYTES = 1 << 28
MAX_DEPTH = 64  # of lists and objects in one another: what copies or writes them calls itself as often
LARGEST = 1 << 63
WORDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    type(None): "null",
}

Shape = Any


def read_text(path: Path, remedy: str, limit: int = MAX_BYTES) -> str:
    """A file's text, UTF-8 with or without a mark at its beginning. Raises `UsageError`, which ends with `remedy`, for
    what isn't a regular file (a pipe would be waited for), has more than `limit` bytes, or can't be read."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise UsageError(f"{path} has more than {limit} bytes; {remedy}")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} isn't UTF-8 text (at byte {error.start}); {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UsageError(f"{path} can't be read ({reason_of(error)}); {remedy}") from None


def read_json(path: Path, remedy: str, shape: Shape = dict, limit: int = MAX_BYTES) -> Any:
    """What a JSON file holds. Raises `UsageError` as `read_text`, and for what isn't JSON of that `shape`."""
    try:
        value = parse_json(read_text(path, remedy, limit))
    except ValueError as error:
        raise UsageError(f"{path} isn't JSON ({first_line(error)}); {remedy}") from None
    wrong = shape_problem(value, shape)
    if wrong:
        raise UsageError(f"{path} {wrong}; {remedy}")
    return value


def parse_json(text: str | bytes) -> Any:
    """What JSON says. Raises `ValueError` for anything else, for a key that is there twice in one object, for lists and
    objects more than `MAX_DEPTH` deep, and for text with a lone surrogate, which can be neither shown nor written."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    text = text if isinstance(text, str) else bytes(text).decode(errors="replace")
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds a lone surrogate") from None
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is there twice the library would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            one
            for outer in level
            if isinstance(outer, dict | list)
            for one in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(one, dict | list)
        ]
        if not level:
            return False
    return True


def shape_problem(value: Any, shape: Shape, at: str = "") -> str:
    """What keeps a JSON value from being of a shape, in words that follow the file's name; '' for nothing."""
    if isinstance(shape, tuple):
        problems = [shape_problem(value, one, at) for one in shape]
        return "" if "" in problems else problems[-1]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _wrong(value, list, at)
        if shape[0] is str and set(map(type, value)) <= {str}:  # a million ids
            return ""
        return _first((each, shape[0], f"{at}[{k}]") for k, each in enumerate(value))
    if not isinstance(shape, dict):
        return "" if any(_is_of(value, kind) for kind in get_args(shape) or (shape,)) else _wrong(value, shape, at)
    if not isinstance(value, dict):
        return _wrong(value, dict, at)
    if str in shape:
        return _first((each, shape[str], f"{at}.{name}".lstrip(".")) for name, each in value.items())
    parts = []
    for named, kind in shape.items():
        name, here = named.removesuffix("?"), f"{at}.{named.removesuffix('?')}".lstrip(".")
        if name in value:
            parts.append((value[name], kind, here))
        elif name == named:
            return f"lacks {here}"
    return _first(parts)


def _first(parts: Iterable[tuple[Any, Shape, str]]) -> str:
    """The first problem of some parts of a value."""
    return next((problem for part in parts if (problem := shape_problem(*part))), "")


def _is_of(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind not in (int, float):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return abs(value) < LARGEST if isinstance(value, int) else math.isfinite(value)


def _wrong(value: Any, shape: Shape, at: str) -> str:
    expected = " or ".join(WORDS.get(kind, "what belongs there") for kind in get_args(shape) or (shape,))
    found = json.dumps(value, ensure_ascii=True, default=str) if not isinstance(value, dict | list) else ""
    shown = WORDS[type(value)] if not found or len(found) > 60 else found
    return f"holds {shown}{f' as {short_name(at)}' if at else ''}, expected {expected}"


def shape_of(kind: type) -> Mapping[str, Shape]:
    """The shape of a dataclass written as JSON, of its plain fields only: each may be absent."""
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    plain = {str, int, float, bool, type(None)}
    found = {f.name: hints[f.name] for f in fields(kind)}
    return {
        f"{name}?": hint
        for name, hint in found.items()
        if (set(get_args(hint)) if isinstance(hint, types.UnionType) else {hint}) <= plain
    }
