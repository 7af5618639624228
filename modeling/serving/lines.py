"""Pairs as lines of JSON, answers as lines of JSON, in the same order: each as soon as it is there."""

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, BinaryIO, NamedTuple

from feats.errors import RowError
from modeling.prediction.warm import Answer, Picture, WarmPredictor
from modeling.serving.json_pairs import DATA_URL, as_json, picture_data, text_of

LONGEST_LINE = 64 << 20  # bytes; a picture of 48 MB in base64
PATIENCE = 1.0  # seconds for who writes the answers to end, after an interruption
AHEAD = 4  # batches that are read before the first of them is answered
_BASE64 = re.compile(r"[A-Za-z0-9+/]{32,}={0,2}")


class _Asked(NamedTuple):
    id: str | int | float
    answer: Future[Answer] | str  # or why there is none


def answer_lines(predictor: WarmPredictor, lines: BinaryIO, write: Callable[[str], object]) -> int:
    """Answer every line of `lines` until they end; returns how many. Each answer is handed to `write`, in their order:
    a line without its end.

    A line is {"id"?, "image"?, "text"?}: `image` a file or its bytes in base64, bare or as a data URL. The answer is
    {"id", "label", "probabilities"}, or {"id", "error"}: of a bad line, too, which ends nothing. Without an id it is
    the line's number, from 1. Empty lines are skipped. Raises what `write` raises.
    """
    asked: Queue[_Asked | None] = Queue(AHEAD * predictor.batches.size)
    failed, errors = Event(), list[Exception]()

    def answer() -> None:
        while (one := asked.get()) is not None:
            if failed.is_set():  # whoever puts something in mustn't wait for ever
                continue
            try:
                write(json.dumps(_answer(one), ensure_ascii=False))
            except Exception as error:  # noqa: BLE001 - raised again by who reads
                errors.append(error)
                failed.set()

    writer = Thread(target=answer, name="answers", daemon=True)
    writer.start()
    count = 0
    try:
        for number, line in enumerate(_lines_of(lines), 1):
            if line is None or line.strip():
                asked.put(_ask(predictor, line, number))
                count += 1
            if failed.is_set():
                break
    except BaseException:  # an interruption: answers that wait aren't wanted any more, and whoever writes one may hang
        failed.set()
        with suppress(Full):
            asked.put_nowait(None)
        writer.join(PATIENCE)
        raise
    asked.put(None)
    writer.join()
    for error in errors:
        raise error
    return count


def _lines_of(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines; None for one that is too long, which is never held as a whole."""
    while line := file.readline(LONGEST_LINE + 1):
        too_long = len(line) > LONGEST_LINE
        while too_long and not line.endswith(b"\n") and line:
            line = file.readline(LONGEST_LINE)
        yield None if too_long else line


def _ask(predictor: WarmPredictor, line: bytes | None, number: int) -> _Asked:
    name: str | int | float = number
    try:
        pair = _parsed(line)
        given = pair.get("id")
        if given is not None:
            if isinstance(given, bool) or not isinstance(given, (str, int, float)):
                raise RowError(f"id is a JSON {type(given).__name__}, expected a string or a number")
            name = given
        return _Asked(name, predictor.submit(_picture(pair.get("image")), text_of(pair)))
    except RowError as error:
        return _Asked(name, str(error))


def _parsed(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise RowError(f"the line is longer than {LONGEST_LINE >> 20} MB")
    try:
        pair = json.loads(line.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RowError(f"not valid JSON ({error}); expected one object a line, in UTF-8") from None
    if not isinstance(pair, dict):
        raise RowError(f"a JSON {type(pair).__name__}; expected an object with image, text or both")
    return pair


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _picture(image: object) -> Picture:
    """What looks like base64 and is no file's name is taken for a picture's bytes."""
    if not isinstance(image, str):
        return picture_data(image)
    if DATA_URL.match(image) or (_BASE64.fullmatch(image) and not os.path.exists(image)):
        return picture_data(image)
    return Path(image)


def _answer(asked: _Asked) -> dict[str, Any]:
    if isinstance(asked.answer, str):
        return {"id": asked.id, "error": asked.answer}
    try:
        return {"id": asked.id, **as_json(asked.answer.result())}
    except RowError as error:
        return {"id": asked.id, "error": str(error)}
