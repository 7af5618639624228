"""The door for tensors: safetensors and pickles that are damaged, hostile or something else are one line, run nothing."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import one_line
from safetensors.torch import save, save_file

from feats.encoders.convolutional import load_strictly
from feats.encoders.openai_clip import read_state_dict
from feats.errors import UsageError
from feats.tensor_files import read_pickled, read_safetensors, safetensors_metadata

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2)}


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def torch_saved(content: Any, archive: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", bytes(1 << 20))
    return buffer.getvalue()


PICKLES = {
    "three bytes": b"\x80\x02.",
    "text": b"hello\n",
    "empty": b"",
    "truncated archive": torch_saved(STATE)[:-50],
    "half an archive": torch_saved(STATE)[:300],
    "truncated pickle": torch_saved(STATE, archive=False)[:-9],
    "no archive": b"PK\x03\x04" + bytes(50),
    "zip bomb": zip_bomb(),
}


def test_both_kinds_are_read(tmp_path: Path):
    save_file(STATE, tmp_path / "a.safetensors", {"made": "here"})
    for archive in (True, False):
        (tmp_path / "a.pt").write_bytes(torch_saved(STATE, archive))
        for found in (read_safetensors(tmp_path / "a.safetensors", ""), read_pickled(tmp_path / "a.pt", "")):
            assert found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)
    assert safetensors_metadata(tmp_path / "a.safetensors") == {"made": "here"}
    assert safetensors_metadata(tmp_path / "a.pt") == safetensors_metadata(tmp_path / "none") == {}


@pytest.mark.parametrize("name", PICKLES)
def test_a_damaged_pickle_is_one_line(name: str, tmp_path: Path):
    path = tmp_path / "weights.pt"
    path.write_bytes(PICKLES[name])
    for read in (
        lambda: read_pickled(path, "do this"),
        lambda: load_strictly(torch.nn.Linear(3, 2), path, "tiny"),
        lambda: read_state_dict(path, ""),
    ):
        with pytest.raises(UsageError, match=r"weights\.pt ") as raised:
            read()
        assert "weights_only" not in one_line(raised)


@pytest.mark.parametrize("archive", [True, False, None], ids=["archive", "older", "bare"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_none(archive: bool | None, inside: bool, tmp_path: Path):
    proof = tmp_path / "executed"
    content = {**STATE, "x": Runs(proof)} if inside else Runs(proof)
    raw = pickle.dumps(content) if archive is None else torch_saved(content, archive)
    (tmp_path / "weights.pt").write_bytes(raw)
    with pytest.raises(UsageError, match="can't be read as tensors"):
        read_pickled(tmp_path / "weights.pt", "do this")
    assert not proof.exists()
    if archive is None:
        pickle.loads(raw)  # it would have
        assert proof.exists()


def safetensors_of(length: int, header: bytes) -> bytes:
    return length.to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        save(STATE)[:-3],
        save(STATE)[:20],
        save(STATE) + b"more",
        safetensors_of(1 << 62, b"{}"),
        safetensors_of(4, b"[[[["),
        safetensors_of(2, b"{}")[:9],
        safetensors_of(60, b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,4]}}'.ljust(60)) + bytes(4),
        torch_saved(STATE),
    ],
)
def test_damaged_safetensors_are_one_line(raw: bytes, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(raw)
    with pytest.raises(UsageError, match=r"weights\.safetensors can't be read as safetensors .*; do this$") as raised:
        read_safetensors(path, "do this")
    one_line(raised)
    with pytest.raises(UsageError):
        load_strictly(torch.nn.Linear(3, 2), path, "tiny")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path):
    os.mkfifo(tmp_path / name)
    for read in (read_pickled, read_safetensors, lambda path, _: read_state_dict(path, "")):
        with pytest.raises(UsageError, match="no regular file"):
            read(tmp_path / name, "do this")


@pytest.mark.parametrize(
    "state",
    [
        {"weight": torch.zeros(2, 3)},
        {**STATE, "weight": torch.zeros(3, 2)},
        {**STATE, "extra": torch.zeros(1)},
        {**STATE, 1: torch.zeros(1)},
        {**STATE, "weight": "text"},
        [STATE],
        None,
    ],
)
def test_other_tensors_are_one_line(state: Any, tmp_path: Path):
    (tmp_path / "w.pt").write_bytes(torch_saved(state))
    with pytest.raises(UsageError, match=r"w\.pt (doesn't fit tiny|holds no plain state dict)") as raised:
        load_strictly(torch.nn.Linear(3, 2), tmp_path / "w.pt", "tiny")
    one_line(raised)
