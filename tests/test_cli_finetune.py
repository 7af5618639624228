"""modeling/finetune.py as a user types it: its doors, the round trip, several processes, kills, and what it refuses."""

import csv
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import submission
from conftest import ENVIRONMENT, ROOT, content
from pairs import CLASSES, cached_pairs, make_pairs, tiny_bert, tiny_clip, tiny_vit
from safetensors.torch import load_file

from feats import roberta_extract_feats, vader_extract_feats, vit_extract_feats
from feats.encoders.registry import load_encoder
from feats.images import ResizeCrop
from feats.store import FeatureStore
from modeling import finetune, inference_head, train_head
from modeling.finetuning.studies import MODELS, TUNING_RECIPES
from modeling.heads.config import HeadConfig
from modeling.runs.folder import load_run, read_predictions

SAME = ("head.safetensors", "split.json", "metrics.json", "history.csv", "predictions_val.csv")
FAST = "--ep 2 --bs 8 --lr 1e-3 --head-lr 1e-2 --dtype fp32 --device cpu".split()
# Rates that the tiny models need to learn the toy set; the loops are the same.
LEARNING = "--ep 25 --bs 8 --lr 2e-3 --head-lr 1e-2 --dtype fp32 --device cpu --val-ratio 0.25 --monitor loss".split()


def folders(root: Path) -> list[str]:
    return ["--feats", str(root / "feats"), "--runs", str(root / "runs")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Pairs, caches of a tiny ViT and a tiny BERT with dropout, and a run of `fusion` on these."""
    weights = cached_pairs(tmp_path, dropout=0.1)
    (tmp_path / "weights.txt").write_text("\n".join(f"{name}={path}" for name, path in weights.items()))
    sides = "--vtype vit --ttype roberta --head concat --D 8 --ep 3 --bs 8 --val-ratio 0.25 --device cpu".split()
    assert train_head.main([*folders(tmp_path), *sides, "--norm", "standard"]) == 0
    return tmp_path


def weights(root: Path) -> list[str]:
    return ["--weights", *(root / "weights.txt").read_text().splitlines()]


def typed(root: Path, *options: str) -> list[str]:
    return ["--runs", str(root / "runs"), *weights(root), *FAST, *options]


def script(*arguments: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--"] if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / "modeling" / "finetune.py"), *arguments]


def run_script(*arguments: str, processes: int = 1, **more: object) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        script(*arguments, processes=processes), env=environment, capture_output=True, text=True, timeout=240, **more
    )


def finished(root: Path, name: str = "tuned") -> Path:
    run = root / "runs" / name
    assert (run / "config.json").is_file() and not list((root / "runs").glob(f".{name}*"))
    return run


def same_bytes(a: Path, b: Path) -> bool:
    encoders = [path.relative_to(a) for path in (a / "encoders").rglob("*") if path.is_file()]
    assert encoders
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in [*SAME, *encoders])


# -- the first door: a run ---------------------------------------------------------------------------------------


def test_a_run_is_tuned_from_where_it_ended(root: Path, capsys: pytest.CaptureFixture):
    capsys.readouterr()
    assert finetune.main(typed(root, "--name", "tuned", "--ablation-eval")) == 0
    out, err = capsys.readouterr()
    run = finished(root)
    assert out.splitlines()[-1] == f"finetuned run -> {run}"
    for words in ("M parameters (image/vit 0.0", "epoch 0: validation loss", "epoch 2: train loss", "paired bootstrap"):
        assert words in out
    assert "text only" in out and "image only" in out and err.count("error") == 0
    config, metrics = content(run, "config"), content(run, "metrics")
    facts = config["finetuned"]["facts"]
    assert (facts["lr"], facts["ep"], facts["tune"], config["classes"]) == (1e-3, 2, "all", CLASSES)
    assert facts["trained_parameters"] > 50_000 and facts["peak_bytes"] > 1e8 and facts["seconds"] > 0
    assert set(metrics["ablation_eval"]) == {"text only", "image only"}
    frozen = next(path for path in (root / "runs").iterdir() if path != run)
    assert content(run, "split") == content(frozen, "split")
    first, *_, last = csv.DictReader((run / "history.csv").open())
    assert first["epoch"] == "0"
    # The columns of a head's training; and a line for each epoch, best so far or not.
    assert list(last) == list(next(csv.DictReader((frozen / "history.csv").open())))
    counts = ", ".join(f"{last[f'predicted_{name}']} {name}" for name in CLASSES)
    assert f"epoch 2: train loss {float(last['train_loss']):.4f}, accuracy {float(last['train_accuracy']):.3f}" in out
    assert f", macro F1 {float(last['macro_f1']):.3f}; predicted {counts}" in out
    assert re.search(r"^epoch 0: .*; best so far$", out, re.MULTILINE)
    for part in ("training", "validation"):
        found = metrics[f"{part}_rows"]
        told = f"{sum(found.values())} for {part} ({', '.join(f'{name} {n}' for name, n in found.items())})"
        assert told in out and list(found) == CLASSES
    assert metrics["leaks"] == content(frozen, "metrics")["leaks"] and "\nleaks: " in out
    assert config["cost"] == {"device": "cpu", **{name: facts[name] for name in ("seconds", "peak_bytes")}}
    [member] = config["members"]
    networks = sum(t.numel() for file in (run / "encoders").rglob("*.safetensors") for t in load_file(file).values())
    assert member["epochs"] == 2 and 0.5 < (member["with_encoders"] - member["parameters"]) / networks <= 1
    expected = [float(row["val_loss"]) for row in csv.DictReader((frozen / "history.csv").open())]
    best = content(frozen, "config")["members"][0]["best_epoch"]
    assert float(first["val_loss"]) == pytest.approx(expected[best - 1], abs=2e-3)


def test_what_is_tuned_goes_all_the_way_round(root: Path, capsys: pytest.CaptureFixture):
    """Predictions of a split and of raw pairs, caches by the tuned encoders, a head on these: all say the same."""
    assert finetune.main(typed(root, "--name", "tuned", "--monitor", "loss", "--ep", "3")) == 0
    run = finished(root)
    assert content(run, "config")["members"][0]["best_epoch"] > 0
    common = ["--runs", str(root / "runs"), "--device", "cpu"]
    assert inference_head.main([*common, "--run", "tuned", "--split", "train", "--proba"]) == 0
    header, rows = submission(run / "submission_train.csv")
    of_id = {row[0]: [float(p) for p in row[2:]] for row in rows}
    ids, _, probabilities = read_predictions(run / "predictions_val.csv")
    assert np.abs(np.array([of_id[i] for i in ids]) - probabilities).max() < 5e-3
    capsys.readouterr()
    for number in (int(ids[0]), int(ids[1])):
        text = (root / "set" / "data" / f"{number}.txt").read_text()
        pair = ["--image", str(root / "set" / "data" / f"{number}.jpg"), "--text", text]
        assert inference_head.main([*common, "--run", "tuned", *pair]) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        found = [float(part.split()[1]) for part in said.partition("(")[2].rstrip(")").split(", ")]
        assert found == pytest.approx(of_id[str(number)], abs=2e-3)

    where = ["--data", str(root / "set"), "--out", str(root / "second"), "--weights", str(run), "--workers", "0"]
    assert vit_extract_feats.main([*where, "--device", "cpu"]) == 0
    assert roberta_extract_feats.main([*where, "--device", "cpu"]) == 0
    for name in ("vit", "roberta"):
        with FeatureStore.open(root / "second" / f"{name}_train.h5") as store:
            tuned = content(run, "config")["features"]["fingerprints"][name]
            assert store.fingerprint["weights_sha256"] == tuned["weights_sha256"]
        with FeatureStore.open(root / "feats" / f"{name}_train.h5") as store:
            assert store.fingerprint["weights_sha256"] != tuned["weights_sha256"]
    folders = ["--feats", str(root / "second"), "--runs", str(root / "seconds"), "--device", "cpu"]
    assert train_head.main([*folders, "--vtype", "vit", "--ttype", "roberta", "--ep", "2", "--val-ratio", "0.25"]) == 0


def test_without_arguments_the_newest_run_of_one_head_is_tuned(root: Path, capsys: pytest.CaptureFixture):
    assert (
        train_head.main(
            [*folders(root), *"--vtype vit --ttype roberta --folds 2 --ep 1 --bs 8 --D 8 --device cpu".split()]
        )
        == 0
    )
    capsys.readouterr()
    assert finetune.main(typed(root, "--name", "tuned")) == 0
    assert "_concat_D8_" in capsys.readouterr().out.splitlines()[0]
    assert content(finished(root), "config")["members"][0]["train"]["head"]["head"] == "concat"


@pytest.mark.parametrize("how", [["--tune", "last-1"], ["--lora", "2"], ["--tune", "head"], ["--new-head"]])
def test_ways_to_tune(how: list[str], root: Path):
    assert finetune.main(typed(root, "--name", "tuned", *how)) == 0
    run = finished(root)
    start = load_file(root / "vit" / "model.safetensors")
    end = load_file(run / "encoders" / "vit" / "model.safetensors")
    assert start.keys() == end.keys()  # adapters are folded in
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    chosen = content(run, "config")["members"][0]["best_epoch"]
    if chosen:
        assert bool(moved) == (how[-1] != "head")
    if how[-1] == "last-1":
        assert all("layer.2." in name or "layernorm." in name for name in moved)
        assert {path.name.split("-")[0] for path in (root / "feats" / "trunks").glob("*.h5")} == {"vit", "roberta"}


# -- the second door: new models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "text", "head"),
    [
        ("vit", "roberta", "fusion"),
        ("clip", "clip", "gated_transformer"),
        ("vit", None, "mlp"),
        pytest.param("clip", "minilm", "late", marks=pytest.mark.slow),
    ],
)
def test_encoders_and_heads_of_the_registries(image: str, text: str | None, head: str, tmp_path: Path):
    make_pairs(tmp_path / "set")
    made = {"vit": tiny_vit, "roberta": tiny_bert, "clip": tiny_clip}
    names = [name for name in dict.fromkeys((image, text)) if name in made]
    where = [f"{name}={made[name](tmp_path / name)['weights']}" for name in names]
    options = ["--image-encoder", image, *(["--text-encoder", text] if text else []), "--head", head, "--D", "8"]
    data = ["--data", str(tmp_path / "set"), "--runs", str(tmp_path / "runs"), "--weights", *where]
    assert finetune.main([*data, *options, *FAST, "--val-ratio", "0.25", "--name", "tuned", "--ep", "1"]) == 0
    run = load_run(finished(tmp_path))
    assert run.source.image == (image,) and run.source.text == ((text,) if text else ())
    assert sorted(run.finetuned.encoders) == sorted(dict.fromkeys(filter(None, (image, text))))
    assert inference_head.main(["--runs", str(tmp_path / "runs"), "--run", "tuned", "--device", "cpu"]) == 0
    assert len(submission(run.path / "submission_test.csv")[1]) == 4


def tiny_resnet(folder: Path) -> dict[str, str]:
    """A ResNet18 of random weights: there is none smaller. The class must show in its features, so batch norms have
    statistics of such pictures: the mean of what one batch of them gives."""
    from PIL import Image
    from torchvision.models import get_model

    torch.manual_seed(0)
    network = get_model("resnet18", weights=None).train()
    pictures = [
        Image.open(path).resize((SIDE, SIDE)) for path in sorted((folder.parent / "set" / "data").glob("*.jpg"))[:8]
    ]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures])
    with torch.no_grad():
        network((pixels - 0.45) / 0.22)
    folder.mkdir()
    torch.save(network.state_dict(), folder / "resnet18.pth")
    return {"weights": str(folder / "resnet18.pth")}


SIDE = 96  # of its pictures, in place of 224: a fifth of the work, and still 3 x 3 positions
RESNET = ["--image-encoder", "resnet=resnet18", "--ep", "10", "--lr", "2e-4"]  # large for a test: few epochs
# What makes each study's model tiny.
TINY = {
    "resnet_roberta": [*RESNET, "--D", "16"],
    "clip": ["--image-encoder", "clip", "--text-encoder", "clip", "--D", "16"],
    "bert_vit_scratch": [
        *("--sizes text.layers=2 text.width=32 text.heads=4 image.layers=2 image.width=32 image.heads=4".split()),
        *("image.patch=32", "--D", "16"),
    ],
    "vilbert_style": ["--D", "16"],
    "bert_resnet_coattention": [*RESNET, "--D", "16"],
    "bert_resnet_late": RESNET,
    "bert_resnet_early": ["--D", "16"],
    "bert_resnet_cross": RESNET,
}
MADE = {"resnet": tiny_resnet, "roberta": tiny_bert, "vit": tiny_vit, "clip": tiny_clip}


def test_every_studys_model_is_tried():
    assert set(TINY) == set(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_tiny_model_of_every_study_learns_the_toy_set(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = lambda resize, crop, interpolation: ResizeCrop(SIDE, SIDE, interpolation)  # noqa: E731
    monkeypatch.setattr("feats.encoders.torchvision_image.ResizeCrop", small)
    make_pairs(tmp_path / "set")
    chosen = MODELS[model]
    names = {choice.name for choice in (chosen.image, chosen.text) if not choice.untrained and choice.name in MADE}
    where = [f"{name}={MADE[name](tmp_path / name)['weights']}" for name in names]
    options = ["--data", str(tmp_path / "set"), "--runs", str(tmp_path / "runs"), "--feats", str(tmp_path / "feats")]
    options += ["--weights", *where] if where else []
    assert (
        finetune.main([*options, "--model", model, *LEARNING, *TINY[model], "--name", "tuned", "--dropout", "0"]) == 0
    )
    run = finished(tmp_path)
    assert inference_head.main(["--runs", str(tmp_path / "runs"), "--run", "tuned", "--split", "train"]) == 0
    said = dict(submission(run / "submission_train.csv")[1])
    train = content(run, "split")["train"]
    assert np.mean([said[i] == CLASSES[int(i) % 3] for i in train]) >= 0.95


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--model clip --head gated_transformer --layers 1", HeadConfig("gated_transformer", layers=1)),
        (
            "--model bert_resnet_coattention --attention-norm batch --image-positions absolute --image-pooling last",
            HeadConfig("coattention", attention_norm="batch", image_positions="absolute", image_pooling="last"),
        ),
    ],
)
def test_the_options_of_single_heads(typed: str, expected: HeadConfig):
    assert finetune.model_choice(finetune.build_parser().parse_args(typed.split()), {})[2] == expected


@pytest.mark.parametrize("recipe", TUNING_RECIPES)
def test_recipes_are_their_settings_and_what_is_typed_wins(recipe: str, tmp_path: Path):
    make_pairs(tmp_path / "set", 30)
    options = ["--data", str(tmp_path / "set"), "--runs", str(tmp_path / "runs"), "--name", "tuned", "--device", "cpu"]
    options += ["--weights", f"clip={tiny_clip(tmp_path / 'clip')['weights']}", "--head", "early"]
    options += ["--image-encoder", "clip", "--text-encoder", "clip"]
    assert finetune.main([*options, "--recipe", recipe, "--ep", "1", "--val-ratio", "0.3"]) == 0
    config = content(finished(tmp_path), "config")
    found = {**config["finetuned"]["facts"], **config["members"][0]["train"]["head"], **config["split"]}
    expected = TUNING_RECIPES[recipe] | {"ep": 1, "val_ratio": 0.3}
    names = {"split_seed": "seed"}
    assert {key: found[names.get(key, key)] for key in expected} == expected


# -- kills, processes, disks -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_with_the_same_bytes(root: Path):
    """Really killed, twice on the way, with checkpoints at every step."""
    options = [*typed(root, "--checkpoint-steps", "1", "--augment", "image", "text"), "--ep", "12", "--lora", "2"]
    assert finetune.main([*options, "--name", "undisturbed"]) == 0
    chance = random.Random(0)
    kills = 0
    for _ in range(2):
        working = root / "runs" / ".killed.tuning"
        process = subprocess.Popen(script(*options, "--name", "killed"), env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"})
        begun = {path.name for path in working.glob("step-*")}
        while {path.name for path in working.glob("step-????????")} <= begun and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        assert {path.name for path in working.glob("step-????????")} - begun  # it had gone on
    assert kills == 2
    assert finetune.main([*options, "--name", "killed"]) == 0
    assert same_bytes(finished(root, "undisturbed"), finished(root, "killed"))


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(root: Path):
    """At equal global batch; rows aren't counted twice, though 18 training and 6 validation rows don't divide evenly."""
    options = [*typed(root, "--bs", "7", "--micro-bs", "2", "--ep", "3", "--monitor", "loss", "--soup", "2")]
    assert finetune.main([*options, "--name", "one"]) == 0
    two = run_script(*options, "--name", "two", processes=2)
    assert two.returncode == 0, two.stderr[-2000:]
    assert two.stdout.count("finetuned run -> ") == 1 and two.stdout.count("epoch 1:") == 1
    curves = [list(csv.DictReader((finished(root, name) / "history.csv").open())) for name in ("one", "two")]
    for a, b in zip(*curves, strict=True):
        for name in ("train_loss", "val_loss"):
            if a[name]:
                assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-4)
    probabilities = [read_predictions(finished(root, name) / "predictions_val.csv") for name in ("one", "two")]
    assert probabilities[0][0] == probabilities[1][0]
    assert np.abs(probabilities[0][2] - probabilities[1][2]).max() < 1e-3


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_next_start_goes_on(root: Path):
    options = typed(root, "--checkpoint-steps", "1", "--ep", "20", "--name", "tuned")
    process = subprocess.Popen(
        script(*options, processes=2), env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    working = root / "runs" / ".tuned.tuning"
    while not list(working.glob("step-????????")) and process.poll() is None:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    workers = [int(pid) for pid in children if "finetune.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: another process of this finetuning has ended; its last checkpoint is intact" in err
    assert 'finetune.py", line' not in err  # torchrun's own traceback isn't ours
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert list(working.glob("step-????????"))
    assert finetune.main(options) == 0  # alone, it goes on
    finished(root)


def test_killed_between_its_last_two_strokes_it_leaves_one_run(root: Path):
    """The run is there, its working folder, too."""
    options = typed(root, "--checkpoint-steps", "1", "--name", "tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling.finetuning.checkpoint.WorkFolder.remove", lambda self: None)
        assert finetune.main(options) == 0
    working = root / "runs" / ".tuned.tuning"
    assert working.is_dir() and (root / "runs" / "tuned").is_dir()
    other = [*options[:-1], "other"]  # of another name, the same settings are trained
    assert finetune.main(other) == 0 and finished(root, "other")
    assert finetune.main(options) == 0
    finished(root)
    assert sorted(path.name for path in (root / "runs").glob("*tuned*")) == ["tuned"]


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(root: Path):
    options = typed(root, "--checkpoint-steps", "1", "--name", "tuned")
    room = 100_000  # less than a checkpoint

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    done = run_script(*options, preexec_fn=little_room)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "can't be" in line and "there is no checkpoint yet" in line and "make room" in line
    assert "Traceback" not in done.stderr and not list((root / "runs" / ".tuned.tuning").glob("*.writing"))
    assert finetune.main(options) == 0
    finished(root)


# -- what it refuses ---------------------------------------------------------------------------------------------


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    assert finetune.main(list(argv)) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return line


def test_other_data_are_refused(root: Path, capsys: pytest.CaptureFixture):
    make_pairs(root / "other", 27)
    line = refused(typed(root, "--data", str(root / "other")), capsys)
    assert "other holds other data than" in line and "name the right folder with --data" in line
    (root / "set" / "data" / "3.txt").write_text("something else")
    assert "1 rows in" in (line := refused(typed(root), capsys)) and "3 (text)" in line
    assert not list((root / "runs").glob(".*tuning"))


def test_encoders_without_gradients_are_refused(root: Path, capsys: pytest.CaptureFixture):
    assert vader_extract_feats.main(["--data", str(root / "set"), "--out", str(root / "feats"), "--workers", "0"]) == 0
    sides = "--vtype vit --ttype roberta vader --D 8 --ep 1 --val-ratio 0.25 --device cpu".split()
    assert train_head.main([*folders(root), *sides]) == 0
    line = refused(typed(root), capsys)
    assert "reads vader, and encoder vader has no gradients" in line and "give a run" in line
    line = refused(
        [*typed(root, "--image-encoder", "vit", "--text-encoder", "ngrams"), "--data", str(root / "set")], capsys
    )
    assert "encoder ngrams has no gradients" in line


def test_checkpoints_of_other_settings_are_refused(root: Path, capsys: pytest.CaptureFixture):
    assert finetune.main(typed(root, "--name", "tuned")) == 0
    working = root / "runs" / ".again.tuning"
    working.mkdir()
    (working / "settings.json").write_text(json.dumps({"settings": {"lr": 1}}))
    line = refused(typed(root, "--name", "again"), capsys)
    assert "holds checkpoints of another finetuning" in line and "give another --name" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tune", "last-9"], "has 3 blocks; give a smaller number, or all"),
        (["--tune", "most"], "--tune 'most': expected all, head, or last-N"),
        (["--lora", "500"], "--lora 500 is out of range; expected 1 to 32"),
        (["--head", "late"], "--head: a run has its own"),
        (["--layers", "1"], "--layers: a run has its own"),
        (["--image-pooling", "last"], "--image-pooling: a run has its own"),
        (["--model", "clip", "--head", "gated_transformer", "--layers", "0"], "--layers 0: expected 1 or more"),
        (["--val-ratio", "0.5"], "--val-ratio: a run has its own"),
        (["--run", "nowhere"], "is no run"),
        (["--model", "clip", "--run", "x"], "--run: the model is begun anew"),
        (["--model", "clip", "--folds", "2"], "--folds: one model is tuned on one split"),
        (["--model", "bert_vit_scratch", "--sizes", "text.depth=3"], "--sizes text.depth=3: expected SIDE.SIZE=N"),
        (["--bad-cases", "nothing.csv"], "can't read nothing.csv as a list of bad cases"),
        (["--class-weights", "great=2"], "'great' is no class"),
        (["--weights", "vlt=x.pt"], "--weights names vlt; the encoders in use are vit, roberta"),
        (["--image-encoder", "clip=RN50", "--text-encoder", "clip=RN101"], "both sides name encoder clip"),
        (["--new-head", "--wise-ft"], "--wise-ft mixes in the start's weights"),
        (["--image-encoder", "nonesuch"], "unknown encoder 'nonesuch'"),
        (["--image-encoder", "vit", "--head", "nonesuch"], "unknown head 'nonesuch'"),
        (["--image-encoder", "vit", "--head", "kernel"], "a new kernel head has no rows"),
    ],
)
def test_unusable_options(options: list[str], words: str, root: Path, capsys: pytest.CaptureFixture):
    data = ["--data", str(root / "set")] if "-encoder" in options[0] or options[0] == "--model" else []
    assert words in refused([*typed(root, *data, *options)], capsys)


def test_a_run_of_several_heads_is_refused(root: Path, capsys: pytest.CaptureFixture):
    sides = "--vtype vit --ttype roberta --D 8 --ep 1 --val-ratio 0.25 --device cpu --seeds 2".split()
    assert train_head.main([*folders(root), *sides]) == 0
    [several] = [path.name for path in (root / "runs").glob("*_x2")]
    assert "has 2 heads; tuning begins with one" in refused(typed(root, "--run", several), capsys)


def test_bad_cases_come_once_more_and_held_out_rows_never(root: Path, capsys: pytest.CaptureFixture):
    [frozen] = (root / "runs").iterdir()
    split = content(frozen, "split")

    def listed(ids: Sequence[str]) -> list[str]:
        lines = ["id,tag,pred,p_bad,p_good,p_rain", *(f"{i},bad,good,0.1,0.8,0.1" for i in ids)]
        (root / "bad.csv").write_text("\n".join(lines) + "\n")
        return typed(root, "--bad-cases", str(root / "bad.csv"), "--name", "tuned")

    for part in ("val",):
        assert f"are for validation or testing ({split[part][0]})" in refused(listed([split[part][0]]), capsys)
    (root / "set" / "data" / f"{split['train'][0]}.txt").write_text("changed")
    assert "hold other content" in refused(listed(split["train"][:2]), capsys)


def test_bad_cases_are_trained_on(root: Path):
    [frozen] = (root / "runs").iterdir()
    lines = [
        "id,tag,pred,p_bad,p_good,p_rain",
        *(f"{i},bad,good,0.1,0.8,0.1" for i in content(frozen, "split")["train"][:2]),
    ]
    (root / "bad.csv").write_text("\n".join(lines) + "\n")
    assert finetune.main(typed(root, "--bad-cases", str(root / "bad.csv"), "--name", "with")) == 0
    assert finetune.main(typed(root, "--name", "without")) == 0
    curves = [list(csv.DictReader((finished(root, name) / "history.csv").open())) for name in ("with", "without")]
    assert curves[0][0]["val_loss"] == curves[1][0]["val_loss"]
    assert curves[0][1]["train_loss"] != curves[1][1]["train_loss"]


def test_a_finetuned_run_is_no_base_for_bad_cases(root: Path, capsys: pytest.CaptureFixture):
    from modeling import bad_cases

    assert finetune.main(typed(root, "--name", "tuned")) == 0
    capsys.readouterr()
    assert bad_cases.main(["--runs", str(root / "runs"), "--run", "tuned"]) == 2
    assert "was finetuned" in capsys.readouterr().err


def test_test_rows_are_predicted_and_kept(root: Path):
    sides = "--vtype vit --ttype roberta --D 8 --ep 1 --val-ratio 0.25 --test-ratio 0.25 --device cpu".split()
    assert train_head.main([*folders(root), *sides]) == 0
    assert finetune.main(typed(root, "--name", "tuned")) == 0
    run = finished(root)
    ids, tags, probabilities = read_predictions(run / "predictions_test.csv")
    assert ids == content(run, "split")["test"] and len(ids) == 6
    loaded = load_run(run)
    assert loaded.finetuned is not None
    accuracy = np.mean([CLASSES[k] == tag for k, tag in zip(probabilities.argmax(1), tags)])
    assert content(run, "metrics")["test"]["accuracy"] == pytest.approx(accuracy)


def test_tuned_encoders_load_as_any(root: Path):
    assert finetune.main(typed(root, "--name", "tuned")) == 0
    encoder = load_encoder("roberta", weights=str(finished(root)))
    assert encoder.identity["pooling"] == "mean"
