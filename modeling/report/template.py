"""The page's templates. All that is put into them is escaped, but for what they mark as safe themselves."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


@cache
def environment(folder: Path) -> Environment:
    """Templates of a folder: whatever is filled in is escaped, and a name that isn't given is an error."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def part(name: str, *given: Any) -> str:
    """What a macro of parts.html makes of the arguments."""
    found: str = str(getattr(environment(TEMPLATES).get_template("parts.html").module, name)(*given))
    return found


def whole(**given: Any) -> str:
    """The page."""
    return environment(TEMPLATES).get_template("page.html").render(**given)


def script_json(value: Any) -> str:
    """JSON that may stand in a <script> of HTML, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
