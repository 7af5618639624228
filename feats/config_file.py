"""Files of options: TOML with a line for each option, or the config.json of a run."""

import json
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feats.errors import UsageError, first_line
from feats.json_files import parse_json, read_json, read_text

EXPECTED = "expected TOML with lines like lr = 1e-3, or the config.json of a run"
OPTIONS = "options"  # where a run's config.json keeps the options that made it


def read_options(path: Path) -> dict[str, Any]:
    """The options of a file by name: strings, numbers, booleans, and lists of strings and numbers.

    Raises `UsageError` for a file that can't be read, is neither TOML nor a run's config.json, comes of a run that
    records no options, or holds other values.
    """
    text = read_text(path, EXPECTED)
    try:
        content = parse_json(text) if path.suffix == ".json" else tomllib.loads(text)
    except RecursionError:
        raise UsageError(f"{path} can't be read as options (it is nested too deeply); {EXPECTED}") from None
    except ValueError as error:
        raise UsageError(f"{path} can't be read as options ({first_line(error)}); {EXPECTED}") from None
    options = _of_run(path, content) if path.suffix == ".json" else content
    for name, value in options.items():
        if not _is_value(value):
            raise UsageError(
                f"{path}: {name} is {json.dumps(value, default=str)[:80]}; expected a string, a number, true, false, "
                "or a list of strings or numbers, without tables"
            )
    return dict(options)


def made_by(path: Path) -> str:
    """The script that made a run's config.json, as it was typed; '' for another file, or where it isn't known."""
    try:
        words = shlex.split(read_json(path, "", {"command": str})["command"])
    except (UsageError, ValueError):
        return ""
    return words[1] if len(words) > 1 else ""


def _of_run(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or "members" not in content:
        raise UsageError(f"{path} isn't the config.json of a run; name such a file, or TOML as *.toml")
    options = content.get(OPTIONS)
    if not isinstance(options, dict):
        raise UsageError(
            f"{path} is of a run made from Python or by an earlier version: it records no options to repeat; write "
            "them into a TOML file"
        )
    return options


def _is_value(value: Any) -> bool:
    single = (str, int, float)
    return isinstance(value, single) or (
        isinstance(value, list) and all(isinstance(x, single) and not isinstance(x, bool) for x in value)
    )


def as_plain(value: Any) -> Any:
    """An option's value as JSON and TOML know it: paths as strings."""
    if isinstance(value, (list, tuple)):
        return [as_plain(x) for x in value]
    return value if isinstance(value, (str, int, float)) else str(value)


def as_toml(value: Any) -> str:
    """A value of `as_plain` as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    return repr(value)


def toml_lines(groups: Sequence[tuple[str, Mapping[str, Any], Mapping[str, str]]]) -> list[str]:
    """Lines of a file that `read_options` reads. Each group has a title, values by name (None: not set), and what to
    say of those that aren't set, which are comments."""
    lines = []
    for title, values, about in groups:
        lines += ["", f"# -- {title}"]
        for name, value in values.items():
            said = " ".join(about[name].split())
            lines.append(f"# {name} isn't set: {said}" if value is None else f"{name} = {as_toml(value)}")
    return lines[1:]
