"""The page's templates. All that is put into them is escaped, but for what they mark as safe themselves."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def part(name: str, *given: Any) -> str:
    """What a macro of parts.html makes of the arguments."""
    found: str = str(getattr(_environment().get_template("parts.html").module, name)(*given))
    return found


def whole(**given: Any) -> str:
    """The page."""
    return _environment().get_template("page.html").render(**given)


def script_json(value: Any) -> str:
    """JSON that may stand in a <script> of HTML, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
