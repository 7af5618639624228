"""Run folders: what is saved comes back bit for bit, what is damaged is refused, and no folder is half a run."""

import csv
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import make_cache
from conftest import one_line
from safetensors.torch import load_file, save_file

from feats.errors import UsageError
from modeling import train_head
from modeling.command_line.options import experiment_settings
from modeling.command_line.training import grid_from
from modeling.evaluation.metrics import softmax
from modeling.experiments.experiment import load_experiment
from modeling.experiments.fitting import train_run
from modeling.features.joined import FeatureSet
from modeling.features.loading import load_features
from modeling.features.normalizer import Normalizer
from modeling.heads.registry import HEADS
from modeling.runs import folder as runs
from modeling.runs.config import TENSORS, is_whole, read_config
from modeling.runs.folder import load_run, read_predictions, run_name, save_run, write_predictions
from modeling.runs.listing import list_runs, newest_run
from modeling.runs.run import Report, Run
from modeling.search import auto

fork = multiprocessing.get_context("fork")
SHORT = ["--ep", "2", "--D", "8", "--bs", "16"]


@pytest.fixture(scope="module")
def feats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feats")
    make_cache(folder, "clip", 60, tokens=True)
    make_cache(folder, "vader", 60)
    return folder


def trained(feats: Path, *argv: str) -> tuple[Run, FeatureSet, Report]:
    """What train_head.py has in hand before it saves."""
    args = train_head.build_parser().parse_args(["--feats", str(feats), "--vtype", "clip", *SHORT, *argv])
    grid = grid_from(args)
    experiment = load_experiment(experiment_settings(args), grid.heads)
    run = train_run(grid.configs(experiment.classes), experiment)
    return run, experiment.features, run.report


def save(run: Run, report: Report, folder: Path, name: str = "run", command: str = "a test", **changed: Any) -> Path:
    return save_run(replace(run, report=replace(report, **changed)), folder / name, numbered=True, command=command).path


@pytest.fixture(scope="module")
def made(feats: Path) -> tuple[Run, FeatureSet, Report]:
    return trained(feats, "--ttype", "clip", "vader", "--norm", "standard", "vader=l2")


@pytest.fixture
def saved(made: tuple[Run, FeatureSet, Report], tmp_path: Path) -> Path:
    return save(made[0], made[2], tmp_path)


# -- round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_every_head_comes_back_bit_for_bit(name: str, feats: Path, tmp_path: Path):
    run, features, report = trained(feats, "--head", name, "--norm", "standard", "--scale", "clip=0.5")
    back = load_run(save(run, report, tmp_path))
    assert [m.config for m in back.members] == [m.config for m in run.members] and back.classes == run.classes
    assert (back.split, back.source) == (run.split, run.source) and back.stacking is None
    for member, other in zip(run.members, back.members, strict=True):
        logits = member.logits(features)
        assert np.array_equal(other.logits(features), logits) and np.abs(logits).max() > 0
        assert (member.temperature, member.best_epoch, member.facts) == (
            other.temperature,
            other.best_epoch,
            other.facts,
        )
        assert not other.head.training
    assert np.array_equal(back.probabilities(features), run.probabilities(features))
    rows = torch.tensor([5, 2, 40])
    np.testing.assert_allclose(back.probabilities(features, rows), run.probabilities(features)[rows], atol=1e-6)
    # The validation rows' probabilities are those of the report.
    val = back.probabilities(features, features.positions(run.split.val))
    np.testing.assert_allclose(val, report.probabilities, atol=1e-5)


def test_folds_come_back(feats: Path, tmp_path: Path):
    run, features, report = trained(feats, "--folds", "3")
    back = load_run(save(run, report, tmp_path))
    assert back.split == run.split and len(back.split) == 3 and [m.fold for m in back.members] == [1, 2, 3]
    mean = np.mean([softmax(m.logits(features) / m.temperature) for m in back.members], axis=0)
    np.testing.assert_allclose(back.probabilities(features), mean, atol=1e-12)


def test_a_loaded_run_is_saved_as_what_it_has_become(saved: Path, made: tuple[Run, FeatureSet, Report]):
    loaded = load_run(saved)
    (member,) = loaded.members
    with torch.no_grad():
        next(member.head.parameters()).mul_(2)
    changed = replace(loaded, source=replace(loaded.source, folder=saved / "elsewhere"))
    again = load_run(save(changed, made[2], saved.parent, command="another"))
    config, before = read_config(again.path), read_config(saved)
    assert (config["command"], config["features"]["folder"]) == ("another", str(saved / "elsewhere"))
    assert config["tensors_sha256"] != before["tensors_sha256"] and config["created"] > before["created"]
    assert np.array_equal(again.probabilities(made[1]), loaded.probabilities(made[1]))


def test_a_stacked_ensemble_comes_back(feats: Path, tmp_path: Path):
    argv = ["--feats", str(feats), "--vtype", "clip", "--ttype", "vader", *SHORT]
    args = train_head.build_parser().parse_args(argv)
    experiment = load_experiment(experiment_settings(args), [])
    run, _ = auto.auto(experiment, grid_from(args, head=["kernel", "linear", "mlp"]).configs(experiment.classes))
    back = load_run(save(run, run.report, tmp_path))
    features = experiment.features
    found = back.probabilities(features)
    assert np.array_equal(found, run.probabilities(features)) and len({m.group for m in back.members}) > 2
    # Stacking by hand: softmax(weight * centred logits + bias), the folds of a head averaged first.
    tensors = load_file(back.path / TENSORS)
    groups: dict[int, list[np.ndarray]] = {}
    for member in back.members:
        z = member.logits(features).astype(np.float64)
        groups.setdefault(member.group, []).append(z - z.mean(1, keepdims=True))
    joined = np.concatenate([np.mean(groups[g], axis=0) for g in sorted(groups)], 1)
    logits = joined @ tensors["stacking/weight"].numpy() + tensors["stacking/bias"].numpy()
    np.testing.assert_allclose(found, softmax(logits), atol=1e-12)


def test_the_folder_is_readable_without_this_program(saved: Path, made: tuple[Run, FeatureSet, Report]):
    run, features, report = made
    assert {p.name for p in saved.iterdir()} == {
        "config.json",
        "head.safetensors",
        "split.json",
        "metrics.json",
        "history.csv",
        "predictions_val.csv",
    }
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert config["classes"] == ["negative", "neutral", "positive"] and config["command"] == "a test"
    assert set(config["features"]["fingerprints"]) == {"clip", "vader"}
    assert config["members"][0]["widths"] == {"image": 8, "text": 12}
    split = json.loads((saved / "split.json").read_text(encoding="utf-8"))
    assert sorted(split["train"] + split["val"]) == sorted(features.ids)
    tensors = load_file(saved / "head.safetensors")
    np.testing.assert_array_equal(
        tensors["0/norm/image/clip/mean"], run.members[0].preprocessing.state()["image/clip/mean"]
    )
    assert "0/norm/text/vader/mean" not in tensors and "0/head/out.weight" in tensors
    with (saved / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["seed"], r["epoch"]) for r in rows] == [("42", "1"), ("42", "2")]
    assert float(rows[1]["train_loss"]) == report.history[1]["train_loss"]


def test_every_file_of_a_run_is_open_to_whom_the_mask_allows(made: tuple[Run, FeatureSet, Report], tmp_path: Path):
    before = os.umask(0o027)
    try:
        path = save(made[0], made[2], tmp_path)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()}
    assert "head.safetensors" in modes and set(modes.values()) == {"0o640"}, modes


def test_predictions_are_read_as_written(tmp_path: Path):
    ids = ["1", 'a "quoted", id', "zwei\nZeilen", "мир 😀", ""]
    tags = ["b,c", "", "a", "ü", 'd"']
    classes = ["a", "b,c", "ü", 'd"']
    probabilities = softmax(np.random.default_rng(0).normal(size=(5, 4)) * 3)
    write_predictions(tmp_path / "p.csv", ids, tags, probabilities, classes)
    found_ids, found_tags, found = read_predictions(tmp_path / "p.csv")
    assert (found_ids, found_tags) == (ids, tags)
    np.testing.assert_allclose(found, probabilities, atol=5.1e-7, rtol=0)
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "tag", "pred", "p_a", "p_b,c", "p_ü", 'p_d"']
    assert [row["pred"] for row in rows] == [classes[k] for k in probabilities.argmax(1)]


@pytest.mark.parametrize(
    "content", [b"", b"id,tag", b"id,tag,pred,p_a\n1,a,a\n", b"id,tag,pred,p_a\n1,a,a,x\n", b"\xff"]
)
def test_damaged_predictions_are_one_clear_line(tmp_path: Path, content: bytes):
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(
        UsageError, match="p.csv can't be read as predictions .*remove its folder and train again"
    ) as error:
        read_predictions(tmp_path / "p.csv")
    one_line(error)


# -- predicting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["fusion", "coattention", "kernel"])
def test_only_the_rows_asked_for_are_prepared(head: str, feats: Path, monkeypatch: pytest.MonkeyPatch):
    run, features, _ = trained(feats, "--head", head, "--norm", "standard")
    rows = torch.tensor([50, 3, 3, 17])
    expected, seen = run.probabilities(features), []
    apply = Normalizer.apply
    monkeypatch.setattr(Normalizer, "apply", lambda self, x: seen.append(len(x)) or apply(self, x))
    np.testing.assert_allclose(run.probabilities(features, rows), expected[rows], atol=1e-6)
    assert len(seen) >= 2 and max(seen) <= 4 * len(rows)  # a text has at most four tokens


def test_double_precision_stays_where_it_is_sure_to_be(feats: Path):
    """A GPU like mps has none: its tensors can't even be made."""
    run, features, _ = trained(feats, "--head", "kernel", "--norm", "standard")
    moved = run.to("mps")
    assert np.array_equal(moved.probabilities(features), run.probabilities(features))
    double = [t for m in moved.members for t in m.head.state_dict().values() if t.dtype == torch.float64]
    assert double and all(t.device.type == "cpu" for t in double)


def test_a_copy_on_a_device_leaves_the_run_where_it_is(feats: Path):
    run, features, _ = trained(feats, "--head", "fusion", "--norm", "standard")
    before = run.probabilities(features)
    assert {p.device.type for m in run.to("meta").members for p in m.head.parameters()} == {"meta"}
    assert np.array_equal(run.probabilities(features), before)


# -- damage -----------------------------------------------------------------------------------------------------


def rewrite(saved: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Other tensors, with a checksum that fits: only strictness can tell."""
    tensors = load_file(saved / "head.safetensors")
    change(tensors)
    save_file(tensors, saved / "head.safetensors")
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config["tensors_sha256"] = hashlib.sha256((saved / "head.safetensors").read_bytes()).hexdigest()
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_the_rewriting_itself_does_no_harm(saved: Path, made: tuple[Run, FeatureSet, Report]):
    rewrite(saved, lambda tensors: None)
    assert np.array_equal(load_run(saved).probabilities(made[1]), made[0].probabilities(made[1]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("0/head/out.weight"), "run is damaged .*there is no tensor out.weight"),
        (lambda t: t.pop("0/norm/image/clip/std"), "normalisation 'standard'"),
        (lambda t: t.update({"0/head/extra": torch.ones(2)}), "run is damaged .*there is a tensor extra"),
        (lambda t: t.update({"0/norm/text/vader/mean": torch.ones(4)}), "normalisation 'l2'"),
        (lambda t: t.update({"0/norm/image/resnet/mean": torch.ones(4)}), "resnet"),
        (lambda t: t.update({"1/head/out.bias": torch.ones(3)}), "no member has .1/head/out.bias"),
        (lambda t: t.update({"stacking/bias": torch.ones(3)}), "no member has .stacking/bias"),
        (lambda t: t.update({"0/head/out.bias": torch.ones(4)}), "run is damaged .*the tensor out.bias is"),
    ],
)
def test_tensors_must_be_those_of_the_head(saved: Path, change: Callable, told: str):
    rewrite(saved, change)
    with pytest.raises(UsageError, match=told) as error:
        load_run(saved)
    assert str(saved) in one_line(error) or "damaged" in one_line(error)


@pytest.mark.parametrize("place", [0, 9, 0.5, 0.999])
def test_a_flipped_bit_is_found(saved: Path, place: float):
    path = saved / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match="head.safetensors is damaged .*train again") as error:
        load_run(saved)
    one_line(error)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_found(saved: Path, share: float):
    path = saved / "head.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UsageError, match="head.safetensors is damaged"):
        load_run(saved)


@pytest.mark.parametrize("name", ["config.json", "head.safetensors", "split.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "a folder"])
def test_every_file_is_needed(saved: Path, name: str, how: str):
    (saved / name).unlink()
    if how == "empty":
        (saved / name).write_bytes(b"")
    if how == "a folder":
        (saved / name).mkdir()
    with pytest.raises(UsageError, match="train again|is no run: there is no config.json") as error:
        load_run(saved)
    assert str(saved) in one_line(error)


def without(*path: str | int) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        *way, last = path
        for key in way:
            config = config[key]
        del config[last]

    return change


def having(value: Any, *path: str | int) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        *way, last = path
        for key in way:
            config = config[key]
        config[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        having(1, "format_version"),
        without("features_from_run"),
        without("format_version"),
        without("members"),
        without("classes"),
        without("features"),
        without("tensors_sha256"),
        without("stacked"),
        having(True, "stacked"),
        having([], "members"),
        having("text", "members"),
        having({"a": 1}, "members"),
        having(["a", "b"], "classes"),
        without("members", 0, "temperature"),
        without("members", 0, "train", "head"),
        having("brain", "members", 0, "train", "head", "head"),
        having(1, "members", 0, "train", "surprise"),
        having(16, "members", 0, "train", "head", "D"),
        having({}, "members", 0, "widths"),
        having(9, "members", 0, "widths", "image"),
        having("l2", "members", 0, "preprocessing", "kinds", "image/clip"),
        having([], "members", 0, "preprocessing", "kinds"),
        without("members", 0, "preprocessing"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved: Path, change: Callable):
    path = saved / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UsageError) as error:
        load_run(saved)
    assert one_line(error)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"format_version": 1}'])
def test_a_config_that_is_none_is_refused(saved: Path, content: bytes):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match="train again") as error:
        load_run(saved)
    assert str(saved) in one_line(error)


def test_what_is_no_run_names_those_beside_it(saved: Path):
    with pytest.raises(UsageError, match="typo is no run.*beside it: run"):
        load_run(saved.parent / "typo")
    with pytest.raises(UsageError, match="beside it: none"):
        load_run(saved.parent / "nowhere" / "typo")


def test_whole_or_not_without_a_look_at_the_neighbours(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """A sweep asks for each of its runs, among thousands."""
    monkeypatch.setattr(runs, "runs_in", lambda folder: pytest.fail("the whole folder was read"))
    assert is_whole(saved)
    assert not is_whole(saved.parent / "typo")
    for path in list(saved.iterdir()):
        path.rename(saved.parent / "aside")
        assert not is_whole(saved), path.name
        (saved.parent / "aside").rename(path)
    (saved / "config.json").write_text("{")
    assert not is_whole(saved)


# -- names, and which is the newest -----------------------------------------------------------------------------


def test_names_never_collide(made: tuple[Run, FeatureSet, Report], tmp_path: Path):
    run, _, report = made
    (tmp_path / "run-3").write_text("a file of that name")
    paths = [save(run, report, tmp_path, command=f"number {i}") for i in range(4)]
    assert [p.name for p in paths] == ["run", "run-2", "run-4", "run-5"]
    assert [read_config(p)["command"] for p in paths] == [f"number {i}" for i in range(4)]
    again = save_run(run, tmp_path / "run", overwrite=True, command="number 9").path
    with pytest.raises(UsageError, match="run is there already; give another name, or replace it with `overwrite`"):
        run.save(tmp_path / "run")
    assert again == paths[0] and read_config(again)["command"] == "number 9"
    assert not list(tmp_path.glob(".*"))


def test_processes_that_save_at_once_each_keep_their_run(made: tuple[Run, FeatureSet, Report], tmp_path: Path):
    run, _, report = made

    def work(number: int) -> None:
        for i in range(6):
            save(run, report, tmp_path, command=str(10 * number + i))

    processes = [fork.Process(target=work, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 4
    found = sorted(int(read_config(load_run(p).path)["command"]) for p in list_runs(tmp_path))
    assert found == sorted(10 * number + i for number in range(4) for i in range(6))
    assert len(list(tmp_path.iterdir())) == 24


def test_names_tell_runs_apart(made: tuple[Run, FeatureSet, Report]):
    run, _, _ = made
    (member,) = run.members

    def with_config(**changes: Any) -> Run:
        head = {name: changes.pop(name) for name in ("head", "D", "sides") if name in changes}
        config = replace(member.config, head=replace(member.config.head, **head), **changes)
        return replace(run, members=[replace(member, config=config)])

    others = [with_config(**c) for c in ({"head": "late"}, {"D": 9}, {"sides": ("text",)}, {"seed": 7})]
    others += [replace(run, source=replace(run.source, text=("vader",))), replace(run, members=[member] * 3)]
    assert len({run_name(each, 0) for each in [run, *others]}) == 7
    assert run_name(run, 0) != run_name(run, 1) and run_name(run, 0) == run_name(run, 0.4)
    assert run_name(run, 0).endswith("_clip_clip+vader_fusion_D8_a0_s42")


def test_a_label_takes_the_place_of_the_head(made: tuple[Run, FeatureSet, Report]):
    assert run_name(made[0], 0, label="auto").endswith("_clip_clip+vader_auto_s42")


def test_caches_in_folders_and_many_of_them(made: tuple[Run, FeatureSet, Report], tmp_path: Path):
    run, _, report = made

    def reading(*names: str) -> Run:
        return replace(run, source=replace(run.source, image=names, text=()))

    many = [f"кэш-{k}" for k in range(100)]
    odd = [reading("sub/clip"), reading(*many), reading(*many, "clip"), reading("sub/a b:c")]
    names = [run_name(each, 0) for each in odd]
    assert len(set(names)) == 4 and "_sub-clip_none_fusion_" in names[0] and "кэш-0+кэш-1+" in names[1]
    for each, name in zip(odd, names, strict=True):
        path = save(each, report, tmp_path / "runs", name)
        assert path == tmp_path / "runs" / name and load_run(path).source == each.source
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(names)


def test_the_newest_is_the_last_created_and_whole(made: tuple[Run, FeatureSet, Report], tmp_path: Path):
    run, _, report = made
    with pytest.raises(UsageError, match="no complete run in .*train_head.py `vtype` clip `D` 256"):
        newest_run(tmp_path)
    with pytest.raises(UsageError, match="no complete run"):
        newest_run(tmp_path / "nowhere")
    paths = [save(run, report, tmp_path, name) for name in ("z", "m", "a")]
    assert list_runs(tmp_path) == paths[::-1] and newest_run(tmp_path) == paths[2]
    os.utime(paths[0] / "config.json")  # touched, not created
    assert newest_run(tmp_path) == paths[2]
    hidden = save(run, report, tmp_path, ".y.1234.writing")  # as a killed process leaves it
    assert (hidden / "config.json").is_file() and newest_run(tmp_path) == paths[2]
    (paths[2] / "config.json").write_text("{")
    assert newest_run(tmp_path) == paths[1]
    (tmp_path / "sweep").mkdir()
    save(run, report, tmp_path / "sweep", "later")
    assert list_runs(tmp_path) == [paths[1], paths[0]]


# -- half a run -------------------------------------------------------------------------------------------------


def in_a_child(work: Callable[[], Any]) -> int:
    """Exit code of a forked process that does `work`."""
    process = fork.Process(target=work)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("kill", ["after the tensors", "in the predictions"])
def test_a_killed_save_leaves_no_run(kill: str, made: tuple[Run, FeatureSet, Report], tmp_path: Path):
    run, _, report = made
    ids = len(report.ids)

    def fatal() -> Iterator[str]:
        yield from report.ids[: ids // 2]
        os.kill(os.getpid(), signal.SIGKILL)

    class Fatal(dict):
        def items(self):
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        if kill == "in the predictions":
            save(run, report, tmp_path, ids=fatal())
        else:
            save(run, report, tmp_path, figures=Fatal(a=1))

    assert in_a_child(work) == -signal.SIGKILL
    (left,) = tmp_path.glob("*.writing")
    assert left.name.startswith(".") and (left / "head.safetensors").is_file()
    assert list_runs(tmp_path) == []
    assert load_run(save(run, report, tmp_path)).path.name == "run"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_living_process_writes_is_left_to_it(
    made: tuple[Run, FeatureSet, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It may count its processes otherwise: a container's numbers, under the same host name, mean nothing here."""
    run, _, report = made
    gone = fork.Process(target=int)
    gone.start()
    gone.join()
    writing, go_on = fork.Event(), fork.Event()

    def ids() -> Iterator[str]:
        yield report.ids[0]
        writing.set()
        assert go_on.wait(60)
        yield from report.ids[1:]

    def work() -> None:
        monkeypatch.setattr(os, "getpid", lambda: gone.pid)
        save(run, report, tmp_path, "other", ids=ids())

    process = fork.Process(target=work)
    process.start()
    assert writing.wait(60)
    (unfinished,) = tmp_path.glob(".*.writing")
    save(run, report, tmp_path)
    assert (unfinished / "head.safetensors").is_file()
    go_on.set()
    process.join(60)
    assert process.exitcode == 0
    assert load_run(tmp_path / "other").split == run.split
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]


def test_what_a_killed_process_left_is_removed_whoever_has_its_number_now(
    made: tuple[Run, FeatureSet, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, _, report = made
    alive = os.getppid()

    def ids() -> Iterator[str]:
        yield report.ids[0]
        os.kill(own, signal.SIGKILL)

    def work() -> None:
        nonlocal own
        own = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: alive)
        save(run, report, tmp_path, ids=ids())

    own = 0
    assert in_a_child(work) == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.writing"))) == 1
    save(run, report, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("lock", ["none", "a folder", "of a file system without locks"])
def test_what_cant_be_judged_stays(
    lock: str, made: tuple[Run, FeatureSet, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, _, report = made
    gone = fork.Process(target=int)
    gone.start()
    gone.join()
    kept = [f".{socket.gethostname()}.{gone.pid}.writing", ".abc.writing", ".writing", "abc.writing"]
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "head.safetensors").write_text("half")
    if lock == "a folder":
        (tmp_path / ".abc.writing.lock").mkdir()
    elif lock != "none":
        (tmp_path / ".abc.writing.lock").touch()

        def refuse(*args: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    before = set(tmp_path.iterdir())
    path = save(run, report, tmp_path)
    assert set(tmp_path.iterdir()) == {*before, path} and load_run(path).split == run.split
    assert all((tmp_path / name / "head.safetensors").read_text() == "half" for name in kept)


@pytest.mark.parametrize("limit", [0, 300, 10_000])
def test_a_full_disk_is_one_clear_line(limit: int, made: tuple[Run, FeatureSet, Report], tmp_path: Path):
    run, _, report = made
    size = sum(t.numel() * t.element_size() for t in runs._tensors(run).values())
    assert 300 < size < 10_000  # so that tensors don't fit in the first two, and what comes after not in the third

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        figures = {"figures": list(range(10_000))}
        with pytest.raises(
            UsageError, match="can't write the run .*run: .*File too large.*; give another folder for `runs`"
        ) as error:
            save(run, report, tmp_path, figures=figures)
        one_line(error)

    assert in_a_child(work) == 0
    assert not list(tmp_path.iterdir())


def test_predictions_that_do_not_fit_leave_nothing(made: tuple[Run, FeatureSet, Report], tmp_path: Path):
    run, _, report = made
    with pytest.raises(ValueError, match="shorter"):
        save(run, report, tmp_path, tags=report.tags[:-1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_is_a_file(where: str, made: tuple[Run, FeatureSet, Report], tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match="can't write the run .*give another folder for `runs`") as error:
        save(made[0], made[2], tmp_path / where)
    assert one_line(error) and (tmp_path / "file").read_text() == "kept"


# -- fingerprints -----------------------------------------------------------------------------------------------


def features_made_by(folder: Path, **fingerprint: Any) -> FeatureSet:
    made_by = {"weights_sha256": "0" * 64, "pooling": "eot", "versions": {"torch": "2"}, **fingerprint}
    make_cache(folder, "clip", 60, fingerprint=made_by)
    make_cache(folder, "resnet", 60, fingerprint=made_by)
    return load_features(folder, "train", ["clip", "resnet"], ["clip"])


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"weights_sha256": "1" * 64}, True),
        ({"model": "large"}, True),
        ({"pooling": "mean"}, True),
        ({"text_clean": "tweet"}, True),
        ({"surprise": 1}, True),
        ({"data": {"rows": 5, "ids_sha256": "x"}}, False),
        ({"versions": {"torch": "9"}}, False),
        ({"dtype": "fp16", "views": 4, "tokens": True}, False),
    ],
)
def test_features_of_another_encoder_are_refused(changed: dict[str, Any], refused: bool, tmp_path: Path):
    features_made_by(tmp_path / "a")
    run, _, report = trained(tmp_path / "a", "--vtype", "clip", "resnet")
    run = load_run(save(run, report, tmp_path))
    other = features_made_by(tmp_path / "b", **changed)
    if refused:
        with pytest.raises(UsageError, match=f"the cache clip in .* isn't what .*{next(iter(changed))}") as error:
            run.check(other)
        value = changed.get("weights_sha256") or str(next(iter(changed.values())))
        assert value in one_line(error) and str(run.path) in one_line(error)
    else:
        run.check(other)


def test_text_cleaning_does_not_matter_to_pictures(tmp_path: Path):
    make_cache(tmp_path / "a", "clip", 60, fingerprint={"text_clean": "none"})
    run, _, report = trained(tmp_path / "a", "--ablation", "2")
    run = load_run(save(run, report, tmp_path))
    make_cache(tmp_path / "b", "clip", 60, fingerprint={"text_clean": "tweet"})
    run.check(load_features(tmp_path / "b", "train", ["clip"], []))
