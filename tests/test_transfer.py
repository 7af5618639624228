"""Results that come back late change nothing: what a GPU's streams put off, played on a CPU."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_course
from test_extraction import ALONE, both_sides

from feats.extraction import encode
from feats.extraction.encode import encode_blocks
from feats.extraction.local import extract
from feats.extraction.plan import make_plan
from feats.extraction.transfer import Fetched, Transfer, transfer_for
from feats.records import read_dataset


class Late(Transfer):
    """Copies results when they are asked for, as late as a GPU may, and writes down when that is."""

    ahead = True

    def __init__(self) -> None:
        self.log: list[str] = []

    def send(self, values: torch.Tensor) -> torch.Tensor:
        self.log.append("send")
        return values.clone()

    def fetch(self, values: torch.Tensor) -> Fetched:
        def arrived() -> np.ndarray:
            self.log.append("arrive")
            return values.cpu().numpy()

        return arrived


def unpinned(prepare: Callable[..., Iterator[Any]], *args: Any, pin_memory: bool) -> Iterator[Any]:
    assert pin_memory  # which only a machine with a GPU can do
    return prepare(*args, pin_memory=False)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    transfer = Late()
    monkeypatch.setattr(encode, "transfer_for", lambda device: transfer)
    monkeypatch.setattr(encode, "prepare", partial(unpinned, encode.prepare))
    return transfer


def bad_course(folder: Path) -> Path:
    """40 pairs, three blocks of 16, one picture missing and one damaged."""
    course = make_course(folder, 40)
    (course / "data" / "17.jpg").unlink()
    (course / "data" / "5.jpg").write_bytes(b"\xff\xd8 no picture")
    return course


@pytest.mark.parametrize("tokens", [False, True])
def test_late_results_make_the_same_cache(tokens: bool, tmp_path: Path, request: pytest.FixtureRequest):
    records = read_dataset(bad_course(tmp_path / "set"))["train"]
    plain = extract(both_sides(tokens), records, tmp_path / "a" / "x_train.h5", ALONE)
    transfer = request.getfixturevalue("late")
    late = extract(both_sides(tokens), records, tmp_path / "b" / "x_train.h5", ALONE)
    assert transfer.log.count("send") == 20
    assert (late.done, late.quarantined) == (plain.done, plain.quarantined) == (38, 2)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_block_s_results_are_waited_for_when_the_next_one_is_queued(late: Late, tmp_path: Path):
    plan = make_plan(both_sides(), read_dataset(make_course(tmp_path, 40))["train"], ALONE)
    blocks = encode_blocks(plan, range(3), workers=0)
    assert next(blocks).rows[0] == 0
    assert late.log[:16] == ["send"] * 16 and set(late.log[16:]) == {"arrive"}
    assert [block.rows[0] for block in blocks] == [16, 32]
    assert late.log.count("send") == 20


def test_a_cpu_has_nothing_to_put_off():
    transfer = transfer_for(torch.device("cpu"))
    values = torch.ones(2)
    assert not transfer.ahead and transfer.send(values) is values
    np.testing.assert_array_equal(transfer.fetch(values)(), [1, 1])
