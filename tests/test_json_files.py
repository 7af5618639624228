"""The door for JSON: what it refuses, in which words; shapes, each against values that fit and that don't."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import one_line

from feats.errors import UsageError
from feats.json_files import MAX_DEPTH, parse_json, read_json, read_text, shape_of, shape_problem


@dataclass
class Settings:
    name: str = ""
    rate: float = 0.1
    rows: int | None = None
    several: tuple[str, ...] = ()
    by_name: dict[str, float] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", r"isn't UTF-8 text \(at byte 0\)"),
        (b"", "isn't JSON .*line 1 column 1"),
        (b'{"a": 1', "isn't JSON"),
        (b"[" * 100_000, "isn't JSON .*nested too deeply"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), f"isn't JSON .*nested more than {MAX_DEPTH} deep"),
        (b'{"a": "\\ud800"}', "isn't JSON .*lone surrogate"),
        (b"[1]", "holds a list, expected an object"),
        (b"null", "holds null, expected an object"),
        (b'{"a": "' + b"x" * 200 + b'"}', "has more than 100 bytes"),
        (b"1" * 5000, "has more than 100 bytes"),
    ],
)
def test_anything_else_is_one_line_that_names_the_file(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    limit = 100 if "100 bytes" in message else 1 << 20
    with pytest.raises(UsageError, match=rf"a\.json {message}.*; do this$") as raised:
        read_json(path, "do this", limit=limit)
    one_line(raised)


@pytest.mark.parametrize("kind", ["pipe", "folder", "missing", "loop", "long", "nul", "device"])
def test_what_is_no_regular_file_is_refused_unread(kind: str, tmp_path: Path):
    path = {"long": tmp_path / ("x" * 300), "nul": tmp_path / "a\0b", "device": Path("/dev/zero")}.get(
        kind, tmp_path / "a"
    )
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to("a")
    with pytest.raises(UsageError, match="do this") as raised:
        read_text(path, "do this")
    one_line(raised)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no names of descriptors")
def test_a_pipe_from_the_shell_is_read():
    """As in `--config <(echo lr = 1)`."""
    end, begin = os.pipe()
    os.write(begin, b"lr = 1")
    os.close(begin)
    assert read_text(Path(f"/dev/fd/{end}"), "do this") == "lr = 1"
    os.close(end)


def test_what_is_well_formed_is_read(tmp_path: Path):
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = [deep]
    for value in ({}, {"a": [1, None, 0.5, "\U0001f600é"]}, {"deep": deep[0]}, {"many": [[1]] * 1000}):
        for mark in (b"", b"\xef\xbb\xbf"):
            (tmp_path / "a").write_bytes(mark + json.dumps(value).encode())
            assert read_json(tmp_path / "a", "") == value
    assert parse_json(json.dumps(deep)) == deep


@pytest.mark.parametrize(
    ("shape", "fits", "not_fits"),
    [
        (int, [0, -5], [True, 1.0, "1", None, 2**63, 10**400]),
        (float, [0, 1.5, -2], [True, float("nan"), float("inf"), 10**400, "1"]),
        (bool, [True], [0, None, "true"]),
        (str, ["", "é"], [None, 1, []]),
        (int | None, [None, 3], [0.5, "x", False]),
        ([str], [[], ["a", "b"]], [{}, "ab", ["a", 1], None]),
        ({"a": int, "b?": str}, [{"a": 1}, {"a": 1, "b": "x", "c": []}], [{}, {"b": "x"}, {"a": 1, "b": 2}, [], None]),
        ({str: [int]}, [{}, {"x": [1]}], [{"x": 1}, {"x": ["1"]}, []]),
        ((None, {"a": int}), [None, {"a": 2}], [{"a": "2"}, 0, [], {}]),
        (dict, [{}], [[], None]),
        (list, [[]], [{}, None]),
    ],
)
def test_shapes(shape: Any, fits: list[Any], not_fits: list[Any]):
    assert [shape_problem(value, shape) for value in fits] == [""] * len(fits)
    for value in not_fits:
        problem = shape_problem(value, shape)
        assert problem.startswith(("holds ", "lacks ")) and len(problem.splitlines()) == 1, value


def test_a_problem_says_where_and_what():
    value = {"members": [{"lr": 1.0}, {"lr": "x"}]}
    assert shape_problem(value, {"members": [{"lr": float}]}) == 'holds "x" as members[1].lr, expected a finite number'
    assert shape_problem(value, {"members": [{"lr": float, "ep": int}]}) == "lacks members[0].ep"
    assert shape_problem({"a\n`b`": 1}, {str: str}) == "holds 1 as a\\n'b', expected text"
    assert (
        shape_problem({"a": ["x" * 99]}, {"a": [int | None]}) == "holds text as a[0], expected a whole number or null"
    )


def test_the_shape_of_a_dataclass_is_that_of_its_plain_fields():
    shape = shape_of(Settings)
    assert shape == {"name?": str, "rate?": float, "rows?": int | None}
    assert not shape_problem({"name": "x", "rate": 1, "rows": None, "several": 5}, shape)
    assert shape_problem({"rows": "many"}, shape) == 'holds "many" as rows, expected a whole number or null'
