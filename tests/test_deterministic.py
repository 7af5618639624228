"""The setting `deterministic`: in force while something is trained, kept in the run, and one line where it can't be."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import make_cache
from conftest import content

from feats import acceleration
from feats.acceleration import WORKSPACE, deterministic
from feats.errors import UsageError
from modeling import finetune, sweep_heads, train_head
from modeling.experiments.fitting import fit_head
from modeling.features.loading import load_features
from modeling.features.splits import make_split
from modeling.heads.study_d import Fusion
from modeling.runs.folder import load_run
from modeling.runs.listing import list_runs


def state() -> dict[str, Any]:
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
    }


IN_FORCE = {"algorithms": True, "benchmark": False, "tf32": False}


@pytest.fixture(autouse=True)
def otherwise(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Everything set otherwise, and found so again at the end."""
    monkeypatch.setenv(WORKSPACE, "")
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    usual = cudnn.benchmark, products.allow_tf32
    cudnn.benchmark, products.allow_tf32 = True, True
    before = state()
    assert before == {"algorithms": False, "benchmark": True, "tf32": True}
    yield before
    after = state()
    cudnn.benchmark, products.allow_tf32 = usual
    assert after == before


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The state at each forward pass of a fusion head."""
    states: list[dict[str, Any]] = []
    forward = Fusion.forward

    def watched(self: Fusion, batch: Any) -> torch.Tensor:
        states.append(state())
        return forward(self, batch)

    monkeypatch.setattr(Fusion, "forward", watched)
    return states


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fusion head with an operation that has no deterministic version, on any device."""
    forward = Fusion.forward

    def unsteady(self: Fusion, batch: Any) -> torch.Tensor:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return forward(self, batch)

    monkeypatch.setattr(Fusion, "forward", unsteady)


@pytest.fixture(scope="module")
def feats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feats")
    make_cache(folder, "clip")
    return folder


def options(feats: Path, runs: Path, *more: str) -> list[str]:
    small = ["--vtype", "clip", "--D", "4", "--ep", "2", "--device", "cpu"]
    return ["--feats", str(feats), "--runs", str(runs), *small, *more]


def test_off_nothing_changes(feats: Path, tmp_path: Path, seen: list[dict[str, Any]], otherwise: dict[str, Any]):
    assert train_head.main(options(feats, tmp_path)) == 0
    assert seen and all(of_step == otherwise for of_step in seen)
    config = content(list_runs(tmp_path)[0], "config")
    assert config["deterministic"] is False and os.environ[WORKSPACE] == ""


def test_train_head(feats: Path, tmp_path: Path, seen: list[dict[str, Any]]):
    for runs in ("a", "b"):
        assert train_head.main(options(feats, tmp_path / runs, "--deterministic")) == 0
    assert seen and all(of_step == IN_FORCE for of_step in seen)
    [first], [second] = (list_runs(tmp_path / runs) for runs in ("a", "b"))
    assert content(first, "config")["deterministic"] is True and os.environ[WORKSPACE] == ":4096:8"
    assert load_run(first).members[0].config.deterministic
    assert (first / "head.safetensors").read_bytes() == (second / "head.safetensors").read_bytes()


def test_sweep_heads(feats: Path, tmp_path: Path, seen: list[dict[str, Any]]):
    command = options(feats, tmp_path, "--deterministic", "--head", "fusion", "linear")
    assert sweep_heads.main(command) == 0
    assert seen and all(of_step == IN_FORCE for of_step in seen)
    runs = list_runs(tmp_path / "sweep")
    assert len(runs) == 2 and all(content(run, "config")["deterministic"] for run in runs)


def test_from_python(feats: Path, seen: list[dict[str, Any]]):
    data = load_features(feats, "train", "clip", "clip")
    run = fit_head(data, make_split(data), D=4, ep=1, device="cpu", deterministic=True)
    assert run.members[0].config.deterministic and seen and all(of_step == IN_FORCE for of_step in seen)


def test_finetune(tmp_path: Path, seen: list[dict[str, Any]]):
    pytest.importorskip("peft")
    from pairs import cached_pairs

    weights = cached_pairs(tmp_path)
    folders = ["--feats", str(tmp_path / "feats"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    head = ["--vtype", "vit", "--ttype", "roberta", "--D", "4", "--ep", "1", "--val-ratio", "0.25"]
    assert train_head.main([*folders, *head]) == 0
    seen.clear()
    named = ["--weights", *(f"{name}={place}" for name, place in weights.items())]
    tuning = ["--ep", "1", "--bs", "12", "--tune", "head", "--name", "tuned", "--deterministic"]
    assert finetune.main([*folders, *named, *tuning]) == 0
    assert seen and all(of_step == IN_FORCE for of_step in seen)
    config = content(tmp_path / "runs" / "tuned", "config")
    assert config["deterministic"] is True and config["finetuned"]["facts"]["deterministic"] is True


# -- what has no such version -----------------------------------------------------------------------------------


def test_one_line_for_an_operation_without_one(feats: Path, tmp_path: Path, put: None, capsys: pytest.CaptureFixture):
    assert train_head.main(options(feats, tmp_path)) == 0
    capsys.readouterr()
    assert train_head.main(options(feats, tmp_path, "--deterministic")) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: --deterministic: put_ does not have a deterministic implementation; use another head"
    )
    data = load_features(feats, "train", "clip", "clip")
    with pytest.raises(UsageError, match="`deterministic`: put_ does not"):
        fit_head(data, make_split(data), D=4, ep=1, device="cpu", deterministic=True)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="^unrelated$"), deterministic():
        raise RuntimeError("unrelated")


def test_too_late_once_a_gpu_is_in_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UsageError, match=f"comes too late: .*set {WORKSPACE}=:4096:8"), deterministic():
        pass
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic():
        assert state() == IN_FORCE and os.environ[WORKSPACE] == ":16:8"
    assert acceleration.WORKSPACES == (":4096:8", ":16:8")  # those that torch takes


def test_within_another(otherwise: dict[str, Any]):
    with deterministic():
        with deterministic():
            pass
        assert state() == IN_FORCE
    with deterministic(False):
        assert state() == otherwise
