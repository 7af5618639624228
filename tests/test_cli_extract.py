"""The extraction scripts as a user runs them: defaults, options, resuming, refusing, exit statuses."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from caches import assert_same, datasets
from conftest import ENVIRONMENT, ROOT, make_course
from PIL import Image
from torch.utils.data import DataLoader

from feats import (
    clip_extract_feats,
    efficientnet_extract_feats,
    minilm_extract_feats,
    ngrams_extract_feats,
    vader_extract_feats,
)
from feats.cache_reader import DONE, QUARANTINED
from feats.errors import first_line
from feats.store import FeatureStore

SMALL = ["--device", "cpu", "--workers", "0", "--batch-size", "8"]


def vader(data: Path, out: Path, *more: str) -> int:
    return vader_extract_feats.main(["--data", str(data), "--out", str(out), *SMALL, *more])


def efficientnet(data: Path, out: Path, *more: str) -> int:
    command = ["--data", str(data), "--out", str(out), "--model", "lite0", "--dtype", "fp32", *SMALL, *more]
    return efficientnet_extract_feats.main(command)


def minilm(data: Path, out: Path, *more: str) -> int:
    return minilm_extract_feats.main(["--data", str(data), "--out", str(out), "--dtype", "fp32", *SMALL, *more])


def ngrams(data: Path, out: Path, *more: str) -> int:
    return ngrams_extract_feats.main(["--data", str(data), "--out", str(out), *SMALL, *more])


@pytest.mark.slow
def test_clip_with_no_argument_at_all(tmp_path: Path):
    """`python feats/clip_extract_feats.py`: reads data/, weights from the hub's cache, writes saved/feats/."""
    from clip.model import CLIP
    from safetensors.torch import save_file

    make_course(tmp_path / "data", 6, 3)
    repository = tmp_path / "hf" / "hub" / "models--timm--vit_base_patch32_clip_224.openai"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    torch.manual_seed(0)
    model = CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)
    save_file({k: v.half() for k, v in model.state_dict().items()}, snapshot / "open_clip_model.safetensors")
    out = subprocess.run(
        [sys.executable, str(ROOT / "feats" / "clip_extract_feats.py")],
        cwd=tmp_path,
        env={**ENVIRONMENT, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert "clip_train: 6 rows done; 0 quarantined" in out.stdout and "saved/feats/clip_test.h5" in out.stdout
    assert "rows/s" in out.stdout
    for split, rows in (("train", 6), ("test", 3)):
        found = datasets(tmp_path / "saved" / "feats" / f"clip_{split}.h5")
        assert found["image_feats"].shape == found["text_feats"].shape == (rows, 512)
        assert np.isfinite(found["image_feats"]).all() and (found["status"] == DONE).all()
    shutil.rmtree(tmp_path / "hf")


def test_splits_ids_and_tags_follow_the_data(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert vader(course, tmp_path / "out") == 0
    assert capsys.readouterr().out.count(" -> ") == 2
    with FeatureStore.open(tmp_path / "out" / "vader_train.h5") as store:
        assert list(store.ids) == [str(i) for i in range(20)]
        assert list(store.tags[:3]) == ["positive", "negative", "neutral"]
        assert store.complete and store.fingerprint["encoder"] == "vader"
    with FeatureStore.open(tmp_path / "out" / "vader_test.h5") as store:
        assert list(store.ids) == [str(i) for i in range(20, 26)] and set(store.tags) == {""}


def test_name_splits_and_limit(course: Path, tmp_path: Path):
    assert vader(course, tmp_path / "out", "--name", "mood", "--splits", "train", "--limit", "7") == 0
    assert [p.name for p in (tmp_path / "out").glob("*.h5")] == ["mood_train.h5"]
    assert len(datasets(tmp_path / "out" / "mood_train.h5")["id"]) == 7


def test_a_second_run_computes_nothing(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    efficientnet(course, tmp_path / "out", "--splits", "train")
    before = datasets(tmp_path / "out" / "efficientnet_train.h5")
    capsys.readouterr()
    assert efficientnet(course, tmp_path / "out", "--splits", "train") == 0
    assert "20 rows done; 0 quarantined" in (out := capsys.readouterr().out) and "0 encoded now" in out
    for name, values in datasets(tmp_path / "out" / "efficientnet_train.h5").items():
        np.testing.assert_array_equal(values, before[name])


@pytest.mark.parametrize("script", [efficientnet, minilm, ngrams])
def test_workers_change_nothing(script, course: Path, tmp_path: Path):
    script(course, tmp_path / "a", "--splits", "train")
    script(course, tmp_path / "b", "--splits", "train", "--workers", "2")
    assert_same(*(next((tmp_path / d).glob("*_train.h5")) for d in "ab"))


def test_a_cache_of_something_else_is_refused(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    vader(course, tmp_path / "out")
    before = (tmp_path / "out" / "vader_train.h5").read_bytes()
    capsys.readouterr()
    assert vader(course, tmp_path / "out", "--text-clean", "tweet") == 2
    error = capsys.readouterr().err
    assert 'text_clean: the cache has "none", this run "tweet"' in error and "--overwrite" in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert (tmp_path / "out" / "vader_train.h5").read_bytes() == before
    assert vader(course, tmp_path / "out", "--limit", "7") == 2
    assert "ids_sha256" in capsys.readouterr().err
    assert vader(course, tmp_path / "out", "--text-clean", "tweet", "--overwrite") == 0


def test_changed_contents_are_refused(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    vader(course, tmp_path / "out"), efficientnet(course, tmp_path / "out")
    (course / "data" / "3.txt").write_text("something else entirely")
    shutil.copy(course / "data" / "5.jpg", course / "data" / "4.jpg")
    picture = course / "data" / "6.jpg"  # other content of the same size
    picture.write_bytes(picture.read_bytes()[:-10] + bytes(10))
    os.utime(picture, (time.time() + 9, time.time() + 9))
    os.utime(course / "data" / "7.jpg", (time.time() + 9, time.time() + 9))  # touched only
    capsys.readouterr()
    assert vader(course, tmp_path / "out") == 2
    assert "1 of 20 rows hold other content than when" in (error := capsys.readouterr().err) and "3 (text)" in error
    assert efficientnet(course, tmp_path / "out") == 2
    assert "2 of 20 rows hold other content" in (error := capsys.readouterr().err)
    assert "4 (picture)" in error and "6 (picture)" in error


def test_corrected_labels_need_no_encoding(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    vader(course, tmp_path / "out", "--splits", "train")
    (course / "train.txt").write_text((course / "train.txt").read_text().replace("0,positive", "0,neutral", 1))
    assert vader(course, tmp_path / "out", "--splits", "train") == 0
    assert "1 labels brought up to date; 0 encoded now" in capsys.readouterr().out
    assert datasets(tmp_path / "out" / "vader_train.h5")["tag"][0] == b"neutral"


def test_ngrams_columns_and_texts_without_words(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Cleaning may leave nothing of a text: that is a row like others, not one for the quarantine."""
    (course / "data" / "3.txt").write_text("@somebody http://t.co/abc")
    assert ngrams(course, tmp_path / "out", "--splits", "train", "--hash-columns", "64", "--strict") == 0
    with FeatureStore.open(tmp_path / "out" / "ngrams_train.h5") as store:
        assert store.complete and (store.status == DONE).all()
        assert (store.fingerprint["columns"], store.fingerprint["text_clean"]) == (64, "tweet")
        lengths = np.linalg.norm(store.read("text_feats").astype(np.float32), axis=1)
    assert lengths.shape == (20,) and lengths[3] == 0
    np.testing.assert_allclose(np.delete(lengths, 3), 1, atol=1e-3)
    capsys.readouterr()
    assert ngrams(course, tmp_path / "out", "--splits", "train") == 2
    assert "columns: the cache has 64, this run 4096" in capsys.readouterr().err
    for arguments, message in (
        (["--hash-columns", "0"], "--hash-columns 0: expected"),
        (["--weights", "x"], "leave out --weights"),
        (["--tokens"], "leave out --tokens"),
        (["--model", "bytes"], "unknown model 'bytes'; there is ngrams"),
    ):
        assert ngrams(course, tmp_path / "none", *arguments) == 2
        assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_quarantine_and_repair(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    whole = (course / "data" / "2.jpg").read_bytes()
    efficientnet(course, tmp_path / "whole", "--splits", "train")
    (course / "data" / "2.jpg").write_bytes(whole[:200])
    (course / "data" / "9.jpg").unlink()
    out = tmp_path / "out"
    assert efficientnet(course, out, "--splits", "train", "--strict") == 3
    assert "18 rows done; 2 quarantined" in capsys.readouterr().out
    found = datasets(out / "efficientnet_train.h5")
    assert [int(i) for i in found["id"][found["status"] == QUARANTINED]] == [2, 9]
    assert (
        np.isnan(found["image_feats"][[2, 9]]).all()
        and np.isfinite(found["image_feats"][found["status"] == DONE]).all()
    )
    reasons = (out / "efficientnet_train.quarantine.csv").read_text().splitlines()
    assert reasons[0] == "id,reason" and reasons[1].startswith("2,") and reasons[2].startswith("9,no picture file")
    (course / "data" / "2.jpg").write_bytes(whole)
    assert efficientnet(course, out, "--splits", "train", "--strict") == 3
    assert "19 rows done; 1 quarantined; 1 encoded now" in capsys.readouterr().out
    np.testing.assert_allclose(
        datasets(out / "efficientnet_train.h5")["image_feats"][2].astype(float),
        datasets(tmp_path / "whole" / "efficientnet_train.h5")["image_feats"][2].astype(float),
        atol=2e-3,
    )


def test_a_bad_text_stops_only_text_encoders(course: Path, tmp_path: Path):
    (course / "data" / "2.txt").unlink()
    assert vader(course, tmp_path / "out", "--splits", "train", "--strict") == 3
    assert efficientnet(course, tmp_path / "out", "--splits", "train", "--strict") == 0


def test_token_caches_are_ragged(course: Path, tmp_path: Path):
    minilm(course, tmp_path / "out", "--tokens", "--splits", "train")
    with FeatureStore.open(tmp_path / "out" / "minilm_train.h5") as store:
        tokens, offsets = store.read_tokens()
        np.testing.assert_array_equal(np.diff(offsets), store.facts("n_tokens"))
        assert tokens.shape == (offsets[-1], 384) and len(set(np.diff(offsets))) > 1
        feats = store.read("text_feats").astype(np.float32)
        for row in range(20):  # MiniLM's vector is the normalised mean of its tokens
            mean = tokens[offsets[row] : offsets[row + 1]].astype(np.float32).mean(0)
            np.testing.assert_allclose(mean / np.linalg.norm(mean), feats[row], atol=2e-3)


def test_a_repaired_text_of_another_length_has_no_room(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    text = (course / "data" / "2.txt").read_text()
    (course / "data" / "2.txt").unlink()
    minilm(course, tmp_path / "out", "--tokens", "--splits", "train")
    (course / "data" / "2.txt").write_text(text)
    assert minilm(course, tmp_path / "out", "--tokens", "--splits", "train") == 0
    assert "19 rows done; 1 quarantined" in capsys.readouterr().out
    assert (
        "when the cache was made; overwrite the cache" in (tmp_path / "out" / "minilm_train.quarantine.csv").read_text()
    )


def test_image_tokens_and_views(course: Path, tmp_path: Path):
    efficientnet(course, tmp_path / "a", "--splits", "train", "--tokens", "--views", "2")
    efficientnet(course, tmp_path / "b", "--splits", "train")
    with_views, plain = (datasets(tmp_path / d / "efficientnet_train.h5") for d in "ab")
    np.testing.assert_array_equal(with_views["image_feats"], plain["image_feats"])
    assert with_views["image_views"].shape == (20, 2, 1280)
    assert not (with_views["image_views"][:, 0] == with_views["image_views"][:, 1]).all(1).any()
    np.testing.assert_allclose(
        with_views["image_tokens"].astype(np.float32).mean(1), plain["image_feats"].astype(np.float32), atol=5e-3
    )


def test_overflow_is_quarantined_not_stored(course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from feats.encoders import vader as vader_encoder

    real = vader_encoder.load

    def loud(*args, **options):
        encoder = real(*args, **options)
        forward = encoder.text.forward
        encoder.text.forward = lambda ids: {"feats": forward(ids)["feats"].index_fill(0, torch.tensor([0]), 1e6)}
        return encoder

    monkeypatch.setattr(vader_encoder, "load", loud)
    vader(course, tmp_path / "out", "--splits", "train")
    reasons = (tmp_path / "out" / "vader_train.quarantine.csv").read_text()
    assert reasons.count("features beyond float16's range") == 3  # the first text of each batch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--splits", "dev"], "no split dev in the data; it has train, test"),
        (["--name", "a/b"], "--name 'a/b'"),
        (["--batch-size", "0"], "invalid positive integer value: '0'"),
        (["--dtype", "fp16"], "--dtype fp16 needs a GPU"),
        (["--device", "tpu9"], "device 'tpu9' can't be used"),
        (["--device", "meta"], "device 'meta' can't be used"),
        (["--out", "/proc/nowhere"], "can't be written"),
        (["--out", __file__], "can't be written"),
        (["--name", "x" * 300], "it takes 300 bytes, of 180 there may be"),
        (["--layout", "manifest"], "manifest"),
        (["--tokens"], "token"),
        (["--weights", "x"], "weights"),
    ],
)
def test_unusable_arguments(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments, message):
    try:
        status = vader(course, tmp_path / "out", *arguments)
    except SystemExit as exit:  # argparse's own
        status = exit.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.glob("out/*.h5"))


INTERRUPTED = 240  # rows: two seconds and more of encoding after the first 64


def rows_done(path: Path) -> int:
    """Of a cache that is being written, without a lock; all of one of another encoder, or that can't be read yet."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return int((file["status"][:] == DONE).sum()) if "image_feats" in file else INTERRUPTED
    except (OSError, KeyError, RuntimeError):
        return INTERRUPTED


def interrupted(root: Path, how: signal.Signals, *more: str) -> int:
    """Extract pairs and stop it after some 64; returns how many rows the cache then holds."""
    if not (root / "set").exists():
        make_course(root / "set", INTERRUPTED)
    command = [sys.executable, str(ROOT / "feats" / "efficientnet_extract_feats.py"), *LITE0, *more]
    command += ["--data", str(root / "set"), "--out", str(root / "out"), "--workers", "1"]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not 64 <= rows_done(root / "out" / "efficientnet_train.h5") < INTERRUPTED:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted: the cache is intact" in error and b"Traceback" not in error
    with FeatureStore.open(root / "out" / "efficientnet_train.h5") as store:
        assert not store.complete and 0 < (store.status == DONE).sum() < INTERRUPTED
        return int((store.status == DONE).sum())


LITE0 = ["--model", "lite0", "--device", "cpu", "--dtype", "fp32", "--batch-size", "2"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_interrupted_by_the_user(tmp_path: Path, how: signal.Signals):
    interrupted(tmp_path, how)


@pytest.mark.slow
def test_the_same_command_goes_on_under_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_course(tmp_path / "set", INTERRUPTED)
    data, cache = str(tmp_path / "set"), tmp_path / "out" / "efficientnet_train.h5"
    vader(tmp_path / "set", tmp_path / "out", "--name", "efficientnet")  # to be replaced

    def again(*more: str, out: str = "out") -> str:
        command = ["--data", data, "--out", str(tmp_path / out), "--workers", "0", *LITE0, *more, "--overwrite"]
        assert efficientnet_extract_feats.main(command) == 0
        return capsys.readouterr().out

    capsys.readouterr()
    done = interrupted(tmp_path, signal.SIGINT, "--overwrite")
    assert f" {INTERRUPTED - done} encoded now" in again()
    again(out="calm")
    assert_same(cache, tmp_path / "calm" / "efficientnet_train.h5")
    assert f" {INTERRUPTED} encoded now" in again()  # complete: the user wants it anew


@pytest.mark.parametrize(
    "change",
    [
        "nothing",
        *(
            pytest.param(what, marks=pytest.mark.slow)
            for what in ("text", "batches", "label", "picture", "chunk", "version", "views")
        ),
    ],
)
def test_overwrite_goes_on_only_with_its_own_beginning(change: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Whatever isn't sound and exactly what this command would have begun is made anew."""
    data, cache = make_course(tmp_path / "set", 70), tmp_path / "out" / "efficientnet_train.h5"
    efficientnet(data, tmp_path / "out", "--batch-size", "2")
    with FeatureStore.append(cache) as store:  # as if interrupted before the last rows
        store._file.attrs.modify("complete", False)
        store._set_status(np.arange(64, 70), 0)
        if change == "version":
            changed = {**store.fingerprint, "versions": {**store.fingerprint["versions"], "torch": "1.0"}}
            store._file.attrs["fingerprint"] = np.bytes_(json.dumps(changed))
        if change == "chunk":
            chunk = store._file["image_feats"].id.get_chunk_info(0)
    if change == "chunk":
        with cache.open("r+b") as file:
            file.seek(chunk.byte_offset + 100)
            file.write(b"\xff" * 8)
    if change == "label":
        (data / "train.txt").write_text((data / "train.txt").read_text().replace("0,positive", "0,neutral"))
    if change == "text":
        (data / "data" / "3.txt").write_text("no part of what a picture encoder makes")
    if change == "picture":
        shutil.copy(data / "data" / "5.jpg", data / "data" / "3.jpg")
    more = {"batches": ["--batch-size", "4"], "views": ["--views", "1"]}.get(change, [])
    capsys.readouterr()
    assert efficientnet(data, tmp_path / "out", "--batch-size", "2", *more, "--overwrite") == 0
    goes_on = change in ("nothing", "label", "text")
    assert f" {6 if goes_on else 70} encoded now" in capsys.readouterr().out
    assert efficientnet(data, tmp_path / "calm", "--batch-size", "2", *more) == 0
    assert_same(cache, tmp_path / "calm" / "efficientnet_train.h5")


@pytest.mark.usefixtures("in_foreground")
def test_interrupted_while_workers_start(
    course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """In the middle of a fork, that is in two processes, an interruption would be lost."""
    start, started = DataLoader.__iter__, []

    def interrupted(self: DataLoader) -> Any:
        signal.raise_signal(signal.SIGINT)
        started.append(start(self))
        return started[0]

    monkeypatch.setattr(DataLoader, "__iter__", interrupted)
    arguments = ["--data", str(course), "--out", str(tmp_path / "out"), "--model", "lite0", "--workers", "1"]
    assert efficientnet_extract_feats.main(arguments) == 130
    error = capfd.readouterr().err
    assert "interrupted: the cache is intact" in error and "Traceback" not in error and started


def test_interrupted_while_taking_pictures_from_a_worker(
    course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """The worker finds that nobody takes them any more, and has nothing to say about it."""

    def hang_up(address: str, authkey: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as to_worker:
            to_worker.connect(address)
        time.sleep(0.2)  # for the worker to notice
        raise KeyboardInterrupt

    monkeypatch.setattr("multiprocessing.connection.Client", hang_up)
    arguments = ["--data", str(course), "--out", str(tmp_path / "out"), "--model", "lite0", "--workers", "1"]
    assert efficientnet_extract_feats.main(arguments) == 130
    error = capfd.readouterr().err
    assert "interrupted: the cache is intact" in error and "Traceback" not in error


# Imports once, then forks runs and kills them: ten kills cost ten extractions, not ten imports. A run tells
# through a pipe when extraction proper starts, and each block that it has written; it is killed a part of a block's time
# (as an undisturbed run shows it) after its start or its first block, so that ten kills fall within one run's work.
KILLER = """
    import importlib, os, random, signal, sys, time
    name, data, out, *more = sys.argv[1:]
    import feats.encoders.registry, feats.extraction.local, torch
    script = importlib.import_module(f"feats.{name}_extract_feats")
    importlib.import_module(feats.encoders.registry.ENCODERS[name].module)
    arguments = ["--data", data, "--batch-size", "2", "--workers", "1", "--dtype", "fp32", *more, "--out"]
    extract, write = feats.extraction.local.extract, feats.extraction.local.write_block

    def start(folder):
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            sys.stdout = sys.stderr = open(os.devnull, "w")
            feats.extraction.local.extract = lambda *a, **k: (os.write(tell, b"!"), extract(*a, **k))[1]
            feats.extraction.local.write_block = lambda *a: (write(*a), os.write(tell, b"."))[0]
            os._exit(script.main([*arguments, os.path.join(out, folder)]))
        os.close(tell)
        os.read(ready, 1)
        return child, ready

    random.seed(0)
    (child, ready), began, blocks = start("calm"), time.perf_counter(), 0
    while os.read(ready, 1):
        blocks += 1
    assert os.waitpid(child, 0)[1] == 0 and blocks >= 20
    seconds = (time.perf_counter() - began) / blocks
    kills = 0
    for number in range(10):
        child, ready = start("killed")
        if number % 2:
            os.read(ready, 1)
        time.sleep(random.uniform(0, 1) * seconds)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(ready)
    child, _ = start("killed")
    print(kills, os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize("name", ["minilm", "efficientnet"])
@pytest.mark.slow
def test_ten_kills_end_with_the_same_bytes(name: str, tmp_path: Path):
    """Twenty in all, half of them of pictures, half of texts."""
    make_course(tmp_path / "set", 500 if name == "minilm" else 320, size=(24, 24))
    smallest = ["--model", "lite0"] if name == "efficientnet" else []
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), name, str(tmp_path / "set"), str(tmp_path), *smallest],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    kills, status = map(int, out.stdout.split())
    assert kills == 10 and status == 0, out.stderr
    assert_same(tmp_path / "killed" / f"{name}_train.h5", tmp_path / "calm" / f"{name}_train.h5")
    with FeatureStore.open(tmp_path / "killed" / f"{name}_train.h5") as store:
        assert store.complete and (store.status == DONE).all() and store.verify() == []


@pytest.mark.slow
def test_a_resumed_run_keeps_its_batch_size(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_course(tmp_path / "set", 50)
    efficientnet(tmp_path / "set", tmp_path / "calm")
    cache = tmp_path / "out" / "efficientnet_train.h5"
    efficientnet(tmp_path / "set", tmp_path / "out")
    with FeatureStore.append(cache) as store:  # as if killed before the last rows
        store._file.attrs.modify("complete", False)
        store._set_status(np.arange(30, 50), 0)
    command = ["--data", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--model", "lite0", "--workers", "0"]
    assert efficientnet_extract_feats.main([*command, "--device", "cpu"]) == 0  # no --batch-size
    assert "warning" not in capsys.readouterr().err
    assert_same(cache, tmp_path / "calm" / "efficientnet_train.h5")
    with FeatureStore.append(cache) as store:
        store._file.attrs.modify("complete", False)
        store._set_status(np.arange(30, 50), 0)
    assert efficientnet_extract_feats.main([*command, "--device", "cpu", "--batch-size", "3"]) == 0
    assert "was begun with batches of 8" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.slow
def test_compiled_where_it_pays_and_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool):
    """Enough work switches the compiler on; a machine without a C++ compiler goes on without."""
    from feats import acceleration

    monkeypatch.setitem(acceleration.COMPILE_PAYS_FLOPS, "cpu", 1)
    backend = "eager" if not broken else "no such backend"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    make_course(tmp_path / "set", 11)
    command = ["--data", str(tmp_path / "set"), "--out", str(tmp_path / "fast"), "--model", "lite0", "--dtype", "bf16"]
    assert efficientnet_extract_feats.main([*command, *SMALL]) == 0
    monkeypatch.undo()
    command[3] = str(tmp_path / "plain")
    assert efficientnet_extract_feats.main([*command, *SMALL]) == 0
    with FeatureStore.open(tmp_path / "fast" / "efficientnet_train.h5") as store:
        assert store.plan["compiled"] is not broken
        fast = store.read("image_feats").astype(np.float32)
    plain = datasets(tmp_path / "plain" / "efficientnet_train.h5")["image_feats"].astype(np.float32)
    np.testing.assert_allclose(fast, plain, atol=0.05)


def test_a_library_s_words_stay_its_own(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Torch names `weights_only` in backquotes, as we name settings: it is no option of ours, and to set it would run
    what the file holds."""
    (tmp_path / "notes.pt").write_text("no weights")
    assert clip_extract_feats.main(["--data", str(course), "--weights", str(tmp_path / "notes.pt")]) == 2
    said = capsys.readouterr().err
    assert "can't be read as tensors" in said and "weights_only" not in said and "--" not in said and "`" not in said
    assert first_line(ValueError("\nset `weights_only` so\nor so")) == "set 'weights_only' so"


def test_one_pair_is_a_data_set(tmp_path: Path):
    make_course(tmp_path / "set", 1)
    assert efficientnet(tmp_path / "set", tmp_path / "out") == 0
    assert minilm(tmp_path / "set", tmp_path / "out", "--tokens") == 0


def test_all_rows_bad_is_still_a_cache(tmp_path: Path):
    make_course(tmp_path / "set", 10)
    for path in (tmp_path / "set" / "data").glob("*.jpg"):
        path.write_bytes(b"no picture")
    assert efficientnet(tmp_path / "set", tmp_path / "out", "--strict") == 3
    assert (datasets(tmp_path / "out" / "efficientnet_train.h5")["status"] == QUARANTINED).all()


def test_duplicate_hashes_group_equal_pictures_and_texts(tmp_path: Path):
    make_course(tmp_path / "set", 6)
    pairs = tmp_path / "set" / "data"
    shutil.copy(pairs / "0.jpg", pairs / "4.jpg")
    (pairs / "1.txt").write_text("RT @you: So HAPPY today! http://t.co/abc")
    (pairs / "5.txt").write_text("so happy   today! ")
    vader(tmp_path / "set", tmp_path / "out"), efficientnet(tmp_path / "set", tmp_path / "out")
    keys = datasets(tmp_path / "out" / "vader_train.h5")["text_key"]
    hashes = datasets(tmp_path / "out" / "efficientnet_train.h5")["image_hash"]
    assert keys[1] == keys[5] and len(set(keys)) == 5
    assert hashes[0] == hashes[4] and len(set(hashes)) == 5


def test_a_million_pixel_png_and_a_thumbnail(tmp_path: Path):
    """The same picture in different containers gives nearly the same features; none is refused for its size."""
    make_course(tmp_path / "set", 2)
    picture = Image.effect_noise((1200, 900), 40).convert("RGB")
    picture.save(tmp_path / "set" / "data" / "0.jpg", quality=98)
    picture.save(tmp_path / "set" / "data" / "1.png")
    (tmp_path / "set" / "data" / "1.jpg").unlink()
    efficientnet(tmp_path / "set", tmp_path / "out")
    a, b = datasets(tmp_path / "out" / "efficientnet_train.h5")["image_feats"].astype(np.float64)
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99
