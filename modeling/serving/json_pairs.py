"""A pair as JSON, and the answer to it: what both ways of asking share."""

import base64
import binascii
import re
from typing import Any

from feats.errors import RowError
from modeling.prediction.warm import Answer

DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


def text_of(pair: dict[str, Any]) -> str | None:
    """The text of a pair; None without one. Raises `RowError` for anything but a string."""
    text = pair.get("text")
    if text is not None and not isinstance(text, str):
        raise RowError(f"text is a JSON {type(text).__name__}, expected a string")
    return text


def picture_data(image: object) -> bytes | None:
    """The bytes of a picture in base64, bare or as a data URL; None without one. Raises `RowError` for anything else:
    nothing is taken for a file's name."""
    if image is None:
        return None
    if not isinstance(image, str):
        raise RowError(f"image is a JSON {type(image).__name__}, expected a string of base64")
    prefix = DATA_URL.match(image)
    try:
        return base64.b64decode(image[prefix.end() :] if prefix else image, validate=True)
    except (binascii.Error, ValueError):
        raise RowError("image isn't base64, expected the bytes of a picture's file so encoded") from None


def as_json(answer: Answer) -> dict[str, Any]:
    """{"label", "probabilities": {class: probability}}."""
    return {"label": answer.label, "probabilities": answer.probabilities}
