"""Damage and forge files that the program reads and settings that it is given, and see what it says of them.

    python -m tests.bench.fuzz_foreign --inputs 30000

Kinds of inputs: caches (bytes, structure, values), run folders (config.json, metrics.json, split.json, tensors),
settings of every script, weights (safetensors, pickles, model folders), and other JSON. Each goes in by the door that a
user takes, in a child process. An input is accepted, or refused by one line and status 2; anything else is a finding:
a traceback, a hang, a crash of the process, a file touched outside the folder that may be written, a process started.
Exit status 0 where there are none, else 1. An input is made again by its kind and number: `--kind run --only 1234`.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import h5py  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from caches import make_cache  # noqa: E402
from safetensors.torch import load_file, save, save_file  # noqa: E402

from feats.errors import UsageError  # noqa: E402

SECONDS = 5  # after which an input is a hang
CRASHED = 60  # after which the process that reads it is taken for dead
ACCEPTED, REFUSED = "accepted", "refused"
TRACEBACK, HANG, CRASH, OUTSIDE, EXECUTED = "traceback", "hang", "crash", "outside", "executed"
BAD = (TRACEBACK, HANG, CRASH, OUTSIDE, EXECUTED)


class Hang(BaseException):
    """An input took too long."""


@dataclass
class Place:
    """A folder for a process: what is `given` stays as it is, `work` is emptied for each input, in it `out` may be
    written by the program. `root` lies deep enough for ../../ to be seen."""

    top: Path
    given: Path = field(init=False)
    work: Path = field(init=False)
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        self.given, self.work = self.top / "a/b/given", self.top / "a/b/work"
        self.out = self.work / "out"
        self.given.mkdir(parents=True)
        self.empty()
        make_given(self.given)
        self.before = self.state()

    def empty(self) -> None:
        """Ready for the next input."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.out.mkdir(parents=True)

    def state(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file but those of `work`."""
        found = {}
        for folder, _, names in os.walk(self.top):
            if not Path(folder).is_relative_to(self.work):
                for name in names:
                    status = os.lstat(os.path.join(folder, name))
                    found[os.path.join(folder, name)] = (status.st_size, status.st_mtime_ns)
        return found


def make_given(folder: Path) -> None:
    """The sound files that are damaged: two caches, three runs, a tiny checkpoint."""
    from modeling import train_head
    from modeling.runs.listing import list_runs

    make_cache(folder / "feats", "clip", 40, tokens=True)
    make_cache(folder / "feats", "vader", 40)
    small = ["--D", "4", "--ep", "1", "--bs", "64", "--device", "cpu"]
    common = ["--feats", str(folder / "feats"), "--runs", str(folder / "runs"), *small]
    sides = ["--vtype", "clip", "--ttype", "vader"]
    with silent():
        assert train_head.main([*common, *sides, "--head", "concat", "--norm", "standard"]) == 0
        assert train_head.main([*common, *sides, "--folds", "2"]) == 0
        assert train_head.main([*common, "--vtype", "clip", "--head", "linear", "--C", "1"]) == 0
    for number, path in enumerate(sorted(list_runs(folder / "runs"))):
        path.rename(path.with_name(f"run{number}"))


# -- damage -----------------------------------------------------------------------------------------------------

ODD_NUMBERS = [0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e-308, 1e308, -1e308, 10**10]
ODD_NUMBERS += [float("nan"), float("inf"), float("-inf"), True]
ODD_TEXTS = ["", " ", "x", "../../x", "..", "/", "/nowhere/x", "a" * 300, "\0", "\n", "\x1b[31m", "`x`", "café", "nan"]
ODD_TEXTS += ["\u202e", "-1", "{}", "%s", "null", "a/b", "1e999"]


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, mostly one that doesn't belong where it is put."""
    choice = rng.random()
    if choice < 0.4:
        return rng.choice(ODD_NUMBERS)
    if choice < 0.65:
        return rng.choice(ODD_TEXTS)
    if choice < 0.72:
        return None
    if choice < 0.76:
        return nested(rng.choice([5, 60, 70, 900]))
    if depth > 2 or choice < 0.82:
        return rng.choice([[], {}, [None], {"": ""}, [[]], ["x"] * 5000])
    if choice < 0.9:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(ODD_TEXTS): odd_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys."""
    found, todo = [], [value]
    while todo:
        here = todo.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        for key in keys:
            found.append((here, key))
            if isinstance(here[key], dict | list):
                todo.append(here[key])
    return found


def changed_json(rng: random.Random, text: str) -> bytes:
    """JSON with one to three values changed, removed, added, swapped; or its bytes damaged."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # damaged before
        value = None
    if value is None or rng.random() < 0.12:
        return damaged(rng, text.encode(errors="surrogatepass"))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = places_in(value)
        if not places:
            break
        # By level first: else the ids of a split hide everything else.
        container, key = rng.choice(rng.choice([places, [place for place in places if isinstance(place[0], dict)]]))
        how = rng.random()
        old = container[key]
        if how < 0.55:
            container[key] = odd_value(rng)
        elif how < 0.7:
            del container[key]
        elif how < 0.8:
            other, at = rng.choice(places)
            container[key] = other[at] if other is not container and not isinstance(other[at], dict | list) else None
        elif how < 0.9 and isinstance(container, dict):
            container[rng.choice(ODD_TEXTS)] = odd_value(rng)
        elif isinstance(old, bool) or not isinstance(old, int | float):
            container[key] = [old, old] if rng.random() < 0.5 else {"x": old}
        else:
            container[key] = old * rng.choice([-1, 0, 2, 10**6, 1.5]) + rng.choice([0, 1])
    if rng.random() < 0.02:
        value = odd_value(rng)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def damaged(rng: random.Random, raw: bytes) -> bytes:
    """Bytes cut, flipped, repeated, exchanged."""
    how = rng.random()
    if not raw or how < 0.05:
        return rng.choice(
            [b"", b"\0" * 100, b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"\xef\xbb\xbf{}", b"null"]
        )
    at = rng.randrange(len(raw))
    if how < 0.3:
        return raw[:at]
    if how < 0.6:
        out = bytearray(raw)
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            # The beginning holds the structure.
            place = rng.randrange(len(raw)) if rng.random() < 0.5 else rng.randrange(min(len(raw), 2048))
            out[place] = rng.choice([out[place] ^ (1 << rng.randrange(8)), 0, 255, rng.randrange(256)])
        return bytes(out)
    size = rng.choice([1, 4, 8, 64, 512])
    if how < 0.75:
        return raw[:at] + rng.choice([b"\xff", b"\0", bytes([rng.randrange(256)])]) * size + raw[at + size :]
    if how < 0.9:
        other = rng.randrange(len(raw))
        return raw[:at] + raw[other : other + size] + raw[at + size :]
    return raw + rng.randbytes(size)


# -- kinds of inputs --------------------------------------------------------------------------------------------

Try = Callable[[random.Random, Place], Any]


def try_cache(rng: random.Random, place: Place) -> Any:
    """A cache: inspected and verified, or read to its end, or trained on."""
    name = rng.choice(["clip", "vader"])
    path = place.work / "feats" / f"{name}_train.h5"
    shutil.copytree(place.given / "feats", path.parent)
    if rng.random() < 0.45:
        path.write_bytes(damaged(rng, path.read_bytes()))
    elif rng.random() < 0.5:
        change_structure(rng, path)
    else:
        rewrite(rng, path)
    door = rng.random()
    if door < 0.35:
        return script("feats.inspect_feats", str(path), *(["--verify"] if rng.random() < 0.7 else []))
    if door < 0.8:
        return read_all(path)
    if door < 0.9:
        sides = [f"--{side}type" for side in ("vt" if name == "clip" else "t")]
        common = ["--feats", str(path.parent), "--runs", str(place.out), "--D", "4", "--ep", "1", "--device", "cpu"]
        return script("modeling.train_head", *common, *(word for side in sides for word in (side, name)))
    return script("feats.export_feats", str(path), "--out", str(place.out / "export"))


def read_all(path: Path) -> None:
    """Everything that a cache tells."""
    from feats.store import FeatureStore, is_complete

    is_complete(path)
    with FeatureStore.open(path) as store:
        list(store.ids), list(store.tags), store.parameters, store.source, store.content_digest(), store.schema
        done = store.done_ids().tolist()
        for dataset in store.features:
            store.read_tokens(done) if dataset == "text_tokens" else store.read(dataset, done)
        for first, stop in store.spans(1 << 10):
            store.stored(first, stop)
        store.verify()


def change_structure(rng: random.Random, path: Path) -> None:
    """Attributes and links as HDF5 itself lets one write them."""
    with h5py.File(path, "r+", libver=("v108", "v108")) as file:
        for _ in range(rng.choice([1, 1, 2])):
            how = rng.random()
            name = rng.choice(list(file.attrs) or ["x"])
            if how < 0.45 and name in file.attrs and isinstance(file.attrs[name], bytes):
                file.attrs[name] = np.bytes_(changed_json(rng, file.attrs[name].decode(errors="replace") or "{}"))
            elif how < 0.6:
                value = rng.choice(
                    [b"", b"x", 0, -1, 2**40, 1.5, np.nan, True, "text", np.zeros(3), [b"a", b"b"], b"\xff"]
                )
                file.attrs[name] = value
            elif how < 0.7 and name in file.attrs:
                del file.attrs[name]
            else:
                change_dataset(rng, file)


def change_dataset(rng: random.Random, file: h5py.File) -> None:
    """A dataset gone, renamed, linked elsewhere, or another in its place."""
    name = rng.choice(list(file) or ["id"])
    if name in file and rng.random() < 0.8:
        del file[name]
    name = rng.choice([name, "other_feats", "ids", "image_views", "x" * 300, "é"])
    if name in file:
        return
    how = rng.randrange(8)
    if how == 0:
        file[name] = h5py.SoftLink("/status")
    elif how == 1:
        file[name] = h5py.ExternalLink("/dev/zero", "/x")
    elif how == 2:
        file.create_group(name)
    elif how == 3:
        file.create_dataset(name, (1 << 40,), "f2", chunks=(1 << 10,))
    elif how == 4:
        file.create_dataset(name, data=[b"a"] * 40, dtype=h5py.string_dtype())
    elif how == 5:
        file.create_dataset(name, (40, 3), rng.choice(["f2", "f4", "f8", "i8", "u1", "S3", "c8"]), fletcher32=True)
    elif how == 6:
        file.create_dataset(name, (40, 3), "f2", fletcher32=True, compression="gzip", chunks=(40, 3))


def rewrite(rng: random.Random, path: Path) -> None:
    """The whole cache written anew, by its own rules, with other values: only what it says is wrong."""
    from feats import cache_layout as layout

    with h5py.File(path) as file:
        data = {name: dataset[:] for name, dataset in file.items()}
        attributes = dict(file.attrs)
    for _ in range(rng.choice([1, 1, 2])):
        change_values(rng, data)
    block_rows = int(rng.choice([512, 512, 1, 3]))
    with h5py.File(path, "w", libver=("v108", "v108")) as file:
        for name, values in data.items():
            if not values.size:  # no chunk can be of that
                continue
            dataset = layout.new_dataset(file, name, values.shape, values.dtype, block_rows)
            dataset[...] = values
        for name, value in attributes.items():
            file.attrs[name] = value
        indices = {name: layout.index_digest(dataset) for name, dataset in file.items()}
        file.attrs["chunk_indices"] = np.bytes_(json.dumps(indices))
        file.attrs["plan"] = np.bytes_(json.dumps({"block_rows": rng.choice([block_rows, block_rows, 0, -3, 10**12])}))


def change_values(rng: random.Random, data: dict[str, np.ndarray]) -> None:
    """One dataset's values, shape, or dtype."""
    name = rng.choice(list(data))
    values = data[name]
    if not len(values):
        return
    row, how = rng.randrange(len(values)), rng.random()
    if how < 0.6:
        values = values.copy()
        if values.dtype.kind == "S":
            values[row] = rng.choice([b"\xff\xfe", b"", values[0], b"a\0b", "\u202e".encode(), b"\n\x1b[1m", b"x" * 99])
        elif values.dtype.kind == "f":
            values.reshape(len(values), -1)[row, -1] = rng.choice([np.nan, np.inf, -np.inf, 65504, 0])
        else:
            limits = np.iinfo(values.dtype)
            values[row] = rng.choice([0, 1, 3, int(limits.max), int(limits.min), min(7, limits.max)])
    elif how < 0.7:
        values = values[: rng.choice([1, row + 1, len(values) - 1])]
    elif how < 0.8:
        values = values.astype(
            rng.choice(["S1", "S200"]) if values.dtype.kind == "S" else rng.choice(["f4", "f2", "i4", "u1"])
        )
    elif how < 0.9:
        values = np.repeat(values[:, None], 2, 1) if rng.random() < 0.5 else values.reshape(len(values), -1)[:, :1]
    else:
        del data[name]
        return
    data[name] = values
    if how >= 0.6 and rng.random() < 0.3:  # all of them shorter
        for other in list(data):
            data[other] = data[other][: len(values)]


def try_run(rng: random.Random, place: Place) -> Any:
    """A run's folder: predicted with, listed, compared, reported on, its command repeated."""
    run = place.work / "runs" / "run"
    shutil.copytree(rng.choice(sorted((place.given / "runs").iterdir())), run)
    names = ["config.json"] * 5 + ["metrics.json"] * 2 + ["split.json", "head.safetensors", "head.safetensors"]
    names += ["predictions_val.csv", "history.csv"]
    for _ in range(rng.choice([1, 1, 1, 2])):
        change_file(rng, run / rng.choice(names))
    if rng.random() < 0.7 and (run / "head.safetensors").is_file():  # whoever forges a file forges its checksum
        with contextlib.suppress(Exception):
            assert (run / "config.json").is_file()
            config = json.loads((run / "config.json").read_text())
            config["tensors_sha256"] = hashlib.sha256((run / "head.safetensors").read_bytes()).hexdigest()
            (run / "config.json").write_text(json.dumps(config))
    runs, out, door = str(run.parent), str(place.out), rng.random()
    feats = ["--feats", str(place.given / "feats")]
    if door < 0.5:
        which = rng.choice([["--run", str(run)], [], ["--run", "best"]])
        return script(
            "modeling.inference_head", *which, "--runs", runs, *feats, "--split", "train", "--out", out + "/p.csv"
        )
    if door < 0.6:
        return script("modeling.list_runs", "--runs", runs)
    if door < 0.7:
        return script("modeling.compare_runs", "--runs", runs, *rng.choice([[], ["--format", "csv"]]))
    if door < 0.78:
        return script(
            "modeling.inference_head", "--run", str(run), "--runs", runs, *feats, "--ablation-eval", "--absent", "mean"
        )
    if door < 0.86:
        small = ["--runs", out, *feats, "--ep", "1", "--device", "cpu"]
        return script("modeling.train_head", "--config", str(run / "config.json"), *small)
    if door < 0.93:
        sides = ["--vtype", "clip", "--D", "4", "--ep", "1", "--device", "cpu"]
        return script("modeling.train_head", "--split-file", str(run / "split.json"), "--runs", out, *feats, *sides)
    return script("modeling.bad_cases", "--run", str(run), "--runs", runs, *feats, "--out", out + "/bad")


def change_file(rng: random.Random, path: Path) -> None:
    """A file of a run, by its kind; sometimes no file at all."""
    if not path.is_file():
        return
    if rng.random() < 0.03:
        path.unlink()
        how = rng.randrange(4)
        if how == 0:
            path.mkdir()
        elif how == 1:
            os.mkfifo(path)
        elif how == 2:
            path.symlink_to(rng.choice(["/dev/zero", "nowhere", path.name, "/dev/stdin"]))
    elif path.suffix == ".json":
        path.write_bytes(changed_json(rng, path.read_text(errors="replace")))
    elif path.suffix == ".safetensors":
        change_tensors(rng, path)
    else:
        path.write_bytes(damaged(rng, path.read_bytes()))


def change_tensors(rng: random.Random, path: Path) -> None:
    """Bytes, header, or tensors of a safetensors file."""
    how = rng.random()
    raw = path.read_bytes()
    if how < 0.3:
        path.write_bytes(damaged(rng, raw))
        return
    if how < 0.5:
        size = int.from_bytes(raw[:8], "little")
        header = changed_json(rng, raw[8 : 8 + size].decode(errors="replace"))
        length = len(header) if rng.random() < 0.9 else rng.choice([0, 2**40, 2**63])
        path.write_bytes(length.to_bytes(8, "little") + header + raw[8 + size :])
        return
    try:
        tensors = load_file(path)
        name = rng.choice(list(tensors))
    except Exception:  # damaged before
        return
    path.unlink()
    name = rng.choice(list(tensors))
    old = tensors[name]
    odd = [
        lambda: old.double(),
        lambda: old.half(),
        lambda: old.to(torch.int64),
        lambda: old.bool(),
        lambda: old.repeat(2, *[1] * (old.dim() - 1)) if old.dim() else old.repeat(2),
        lambda: old.flatten()[:1].clone(),
        lambda: torch.full_like(old.float(), float("nan")),
        lambda: torch.full_like(old.float(), 1e38),
        lambda: torch.zeros_like(old),
        lambda: torch.zeros(0),
        lambda: torch.tensor(1.0),
        lambda: old.to(torch.complex64),
        lambda: old.to(torch.float8_e4m3fn),
    ]
    if rng.random() < 0.75:
        tensors[name] = rng.choice(odd)().contiguous()
    elif rng.random() < 0.5:
        del tensors[name]
    else:
        tensors[
            rng.choice(["extra", "0/head/x", "9/head/out.weight", "0/norm/image/clip/mean/x", "stacking/weight", ""])
        ] = old.clone()
    save_file(tensors, path)


# Not compare_finetuning.py, which starts processes of its own that take long by right.
SCRIPTS = {
    "modeling.train_head": ("--D", "4", "--ep", "1"),
    "modeling.sweep_heads": ("--D", "4", "--ep", "1", "--head", "concat"),
    "modeling.learning_curve": ("--D", "4", "--ep", "1", "--head", "concat"),
    "modeling.inference_head": (),
    "modeling.bad_cases": (),
    "modeling.list_runs": (),
    "modeling.compare_runs": (),
    "modeling.audit_labels": (),
    "modeling.explain": (),
    "modeling.finetune": (),
    "modeling.serve": (),
    "feats.pixels_extract_feats": (),
    "feats.vader_extract_feats": (),
    "feats.inspect_feats": (),
    "feats.merge_feats": (),
    "feats.export_feats": (),
    "feats.import_feats": (),
}
ODD_WORDS = ["0", "-1", "1", "10000000000", "1" + "0" * 30, "nan", "inf", "-inf", "1e308", "1e-308", "", " ", "x" * 300]
ODD_WORDS += [
    "../../x",
    "..",
    "a/b",
    "/nowhere/x",
    "\n",
    "caf\u00e9",
    "true",
    "clip=1e308",
    "clip=nan",
    "neutral=1e308",
]
ODD_WORDS += [
    "neutral=1e-300",
    "a=b=c",
    "=",
    "auto",
    "all",
    "last-99999999999999999999",
    "newest",
    "best",
    "None",
    "1.5",
    "2",
]
# What would take long by right, or open doors to the network.
NEVER = {
    "--help",
    "--version",
    "--port",
    "--http",
    "--host",
    "--auto",
    "--address",
    "--ray-workers",
    "--engine",
    "--device",
    "--report",
    "--tensorboard",
}


def try_settings(rng: random.Random, place: Place) -> Any:
    """Odd values of a script's options, one to three of them."""
    module = rng.choice([*SCRIPTS, *["modeling.train_head", "modeling.sweep_heads"] * 4])
    parser = import_module(module).build_parser()
    actions = [a for a in parser._actions if a.option_strings and not NEVER & {*a.option_strings}]
    words = list(SCRIPTS[module])
    names = {name for action in parser._actions for name in action.option_strings}
    feats = str(place.given / "feats")
    shutil.copytree(place.given / "runs", place.work / "runs")
    defaults = {
        "--feats": [feats],
        "--runs": [str(place.work / "runs")],
        "--device": ["cpu"],
        "--out": [str(place.out / "o")],
    }
    if module in ("modeling.train_head", "modeling.sweep_heads", "modeling.learning_curve"):
        defaults |= {"--runs": [str(place.out)], "--vtype": ["clip"], "--ttype": ["vader"]}
    for option, values in defaults.items():
        if option in names:
            words += [option, *values]
    for action in rng.sample(actions, min(len(actions), rng.choice([1, 1, 2, 3]))):
        words.append(action.option_strings[0])
        if action.nargs != 0:
            known = [str(choice) for choice in action.choices or ()]
            count = rng.choice([1, 1, 2]) if action.nargs in ("+", "*") else 1
            # Where a user types a path, it is the user's.
            odd = [word for word in ODD_WORDS if not (action.type is Path and "/" in word)]
            words += [rng.choice([*odd, *known]) for _ in range(count)]
    if rng.random() < 0.2:
        words.append(rng.choice(ODD_WORDS))
    with contextlib.chdir(place.out):
        return script(module, *words)


def try_weights(rng: random.Random, place: Place) -> Any:
    """Files of weights of every format, through the loaders that `weights` leads to."""
    from feats.encoders.convolutional import load_strictly
    from feats.encoders.openai_clip import read_state_dict
    from feats.encoders.weights import sha256_of

    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    door = rng.random()
    if door < 0.3:
        return model_folder(rng, place)
    path = place.work / rng.choice(["w.pt", "w.safetensors", "w.bin"])
    path.write_bytes(weights_file(rng, network.state_dict(), place.work / "executed"))
    if rng.random() < 0.02:
        path.unlink()
        os.mkfifo(path)
    if door < 0.65:
        return load_strictly(network, path, "tiny")
    return read_state_dict(path, sha256_of(path) if path.is_file() else "")


class Runs:
    """Unpickled, it runs a command."""

    def __init__(self, path: Path, how: int):
        self.path, self.how = path, how

    def __reduce__(self) -> tuple[Any, ...]:
        ways = [
            (os.system, (f"touch {self.path}",)),
            (eval, (f"open({str(self.path)!r}, 'w')",)),
            (Path.touch, (self.path,)),
            (torch.jit.load, (str(self.path),)),
        ]
        return ways[self.how]


def weights_file(rng: random.Random, state: dict[str, torch.Tensor], proof: Path) -> bytes:
    """Bytes of a state dict, sound or not, in one of the formats."""
    state = dict(state)
    for _ in range(rng.choice([0, 1, 2])):
        name = rng.choice(list(state))
        state[rng.choice([name, "x", "text_model.embeddings.token_embedding.weight", "state_dict"])] = rng.choice(
            [
                state[name],
                torch.zeros(2, 2),
                torch.tensor(float("nan")),
                torch.zeros(0),
                state[name].to(torch.complex64),
            ]
        )
    how = rng.random()
    if how < 0.25:
        raw = save({name: value.contiguous().clone() for name, value in state.items()})
        return damaged(rng, raw) if rng.random() < 0.8 else raw
    if how < 0.45:
        odd = rng.choice(
            [Runs(proof, rng.randrange(4)), nested(200), {1: torch.zeros(1)}, [state], None, 3, {"a": "b"}]
        )
        content = odd if rng.random() < 0.5 else {**state, "x": odd}
        raw = pickle.dumps(content, rng.choice([0, 2, 4])) if rng.random() < 0.5 else saved(content, rng)
        return raw if rng.random() < 0.7 else damaged(rng, raw)
    if how < 0.6:
        return rng.choice(
            [b"\x80\x02.", b"abc", b"", b"hello, this is text\n", b"PK\x03\x04", b"\x80\x04" + rng.randbytes(30)]
        )
    if how < 0.65:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("w/data.pkl", bytes(1 << 20))
            archive.writestr(rng.choice(["w/data/0", "w/constants.pkl", "../x"]), bytes(1 << 20))
        return buffer.getvalue()
    raw = saved(state, rng)
    return damaged(rng, raw) if rng.random() < 0.9 else raw


def saved(content: Any, rng: random.Random) -> bytes:
    """As torch.save writes it, in either format."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.6)
    return buffer.getvalue()


def model_folder(rng: random.Random, place: Place) -> Any:
    """A folder of a model as the hub has it, by what is read before any network is built."""
    from feats.encoders import huggingface_image, huggingface_text, minilm, openai_clip, saved as saved_encoders

    folder = place.work / "model"
    folder.mkdir()
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    record = {"format_version": 1, "encoder": "clip", "model": "m", "options": {"size": 3}, "text_clean": "tweet"}
    picture = {"size": {"height": 8, "width": 8}, "do_center_crop": True, "crop_size": 8, "resample": 2}
    picture |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    clip = {
        side: {"hidden_act": "quick_gelu", "num_attention_heads": 1, "hidden_size": 64} for side in ("text_config",)
    }
    save_file({"a": torch.zeros(1)}, folder / "model-1.safetensors")
    if rng.random() < 0.5:
        save_file({"b": torch.zeros(1)}, folder / "model-2.safetensors")
    name, content, read = rng.choice(
        [
            (
                "model.safetensors.index.json",
                index,
                lambda: huggingface_text._lacking(folder, huggingface_text.TEXT, True),
            ),
            ("encoder.json", record, lambda: saved_encoders.find_saved(folder, "clip")),
            ("preprocessor_config.json", picture, lambda: huggingface_image.read_preprocessor(folder, None)),
            ("sentence_bert_config.json", {"max_seq_length": 12}, lambda: minilm._max_length(folder)),
            ("config.json", clip, lambda: openai_clip._check_config(folder)),
        ]
    )
    (folder / name).write_text(json.dumps(content))
    change_file(rng, folder / name)
    return read()


def try_json(rng: random.Random, place: Place) -> Any:
    """Other JSON: of a finetuning's folder, a comparison, a sweep, parts, options, a split."""
    from feats.config_file import made_by, read_options
    from feats.extraction.leases import holder_of
    from feats.parts import PartsPlan, open_cache, part_path, parts_folder, plan_path
    from modeling.features.split_files import read_split_file
    from modeling.features.stored_splits import load_split
    from modeling.finetuning.checkpoint import WorkFolder

    ids = [f"p{k}" for k in range(12)]
    tags = ["a", "b"] * 6
    split = {"train": ids[:6], "val": ids[6:], "test": [], "how": {"seed": 1}}
    kind = rng.randrange(6)
    path = place.work / "file.json"
    if kind == 0:
        path.write_bytes(changed_json(rng, json.dumps(rng.choice([split, {"folds": [split, split]}]))))
        return rng.choice([lambda: load_split(path), lambda: read_split_file([path], ids, tags)])()
    if kind == 1:
        return ids_beside(rng, path, split, lambda: (load_split(path), read_split_file([path], ids, tags)))
    if kind == 2:
        config = json.loads((place.given / "runs/run0/config.json").read_text())
        path.write_bytes(changed_json(rng, json.dumps({key: config[key] for key in ("command", "options", "members")})))
        if rng.random() < 0.3:
            path = path.with_suffix(".toml")
            path.write_bytes(
                damaged(rng, b'lr = 1e-3\nhead = "fusion"\nD = [4, 8]\n' + b"x = " + b"[" * rng.choice([0, 2000]))
            )
        made_by(path)
        return read_options(path)
    if kind == 3:
        plan = PartsPlan({"encoder": "x"}, {"block_rows": 4}, {"image_feats": [3]}, "course", "train", [{"rows": 4}])
        folder = parts_folder(place.work / "x_train.h5")
        folder.mkdir()
        plan_path(folder).write_bytes(changed_json(rng, plan.text))
        if rng.random() < 0.5:
            shutil.copy(place.given / "feats/clip_train.h5", part_path(folder, 0))
        with open_cache(place.work / "x_train.h5") as store:
            len(store), store.features, store.complete, store.verify()
        return script("feats.inspect_feats", str(folder))
    if kind == 4:
        lease = {"name": "x", "host": "h", "pid": 1}
        path.write_bytes(changed_json(rng, json.dumps(lease)))
        return holder_of(path)
    what = {"lr": 0.1, "data": "x", "deep": {"a": 1}}
    with WorkFolder(place.out / "tuned", what) as folder:
        folder.save_step(1, {"a": torch.zeros(2)}, {"epoch": 1, "best": [1, 2]})
    for file in (place.out / "tuned").rglob("*.json"):
        if rng.random() < 0.6:
            change_file(rng, file)
    if rng.random() < 0.5:
        change_tensors(rng, place.out / "tuned/step-00000001/tensors.safetensors")
    with WorkFolder(place.out / "tuned", what) as folder:
        return folder.load_step(torch.device("cpu"))


def ids_beside(rng: random.Random, path: Path, split: dict[str, Any], read: Callable[[], Any]) -> Any:
    """A split whose ids lie in a file of their own."""
    parts = {f"0/{part}": np.array([name.encode() for name in split[part]], "S4") for part in ("train", "val", "test")}
    name = rng.choice(list(parts))
    odd = [
        np.arange(3),
        np.zeros((2, 2), "S3"),
        np.array([b"\xff\xfe"]),
        np.array(["p1"]),
        np.array(b"x"),
        np.array([], "S"),
    ]
    if rng.random() < 0.5:
        parts[name] = rng.choice([*odd, parts[name]])
    elif rng.random() < 0.2:
        del parts[name]
    np.savez(path.with_suffix(".npz"), **parts)
    if rng.random() < 0.5:
        path.with_suffix(".npz").write_bytes(damaged(rng, path.with_suffix(".npz").read_bytes()))
    content = json.dumps({"ids": path.with_suffix(".npz").name, "how": {}})
    path.write_bytes(changed_json(rng, content) if rng.random() < 0.3 else content.encode())
    return read()


KINDS: dict[str, Try] = {
    "cache": try_cache,
    "run": try_run,
    "settings": try_settings,
    "weights": try_weights,
    "json": try_json,
}


# What looks for libraries when it is imported.
IMPORTED = (
    "cleanlab.filter",
    "feats.encoders.openai_clip",
    "feats.encoders.huggingface_text",
    "feats.encoders.torchvision_image",
)


# -- trying -----------------------------------------------------------------------------------------------------


class Refused(Exception):
    """A script refused its input as it should."""


@contextlib.contextmanager
def silent() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What is written to stdout and stderr meanwhile; nothing can be read from stdin."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO())
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out, err
    finally:
        sys.stdin = before


def script(module: str, *words: str) -> int:
    """What a script says to a command line. Raises `Refused` for status 2 and one line that says why."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            status = import_module(module).main(list(words))
    except SystemExit as exit_:  # argparse
        status = exit_.code
    if status == 2:
        lines = [line for line in said.getvalue().splitlines() if "error: " in line]
        told = said.getvalue()[-2000:]
        if len(lines) != 1 and "any of these commands helps" not in told and not module.endswith("inspect_feats"):
            raise AssertionError(f"{len(lines)} lines of errors: {told}")
        raise Refused(lines[0] if lines else told)
    if status not in (0, 3):
        raise AssertionError(f"status {status}: {said.getvalue()[-2000:]}")
    return status


watched: list[str] = []  # what the process did that it shouldn't, as Python's own audit hooks tell
own: list[Path] = []  # the place, what in it may be written; what else may: temporary files, the null device
# By which Python finds libraries, and matplotlib fonts; and the program its own scripts.
HARMLESS = {"/sbin/ldconfig", "fc-list", sys.executable}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: notes files opened for writing, made, moved, removed outside of `own`, and processes."""
    if not own:
        return
    if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        if not HARMLESS & {str(args[0])}:
            watched.append(f"{EXECUTED}: {event} {str(args)[:200]}")
        return
    if event == "open":
        paths = [args[0]] if isinstance(args[2], int) and args[2] & WRITES else []
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
        paths = [args[0]]
    elif event in ("os.rename", "os.link"):
        paths = list(args[:2])
    elif event == "os.symlink":
        paths = [args[1]]
    else:
        return
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike) and os.path.isabs(os.fsdecode(path)):
            real = Path(os.path.realpath(os.fsdecode(path)))
            top, work, *others = own
            if not real.is_relative_to(work) and (
                real.is_relative_to(top) or not any(real.is_relative_to(folder) for folder in others)
            ):
                watched.append(f"{OUTSIDE}: {event} {real}")


def attempt(kind: str, number: int, place: Place) -> tuple[str, str]:
    """What became of one input, and what was said."""
    place.empty()
    watched.clear()
    rng = random.Random(f"{kind} {number}")
    signal.signal(signal.SIGALRM, _hang)
    outcome, said = ACCEPTED, ""
    with silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            KINDS[kind](rng, place)
        except (UsageError, Refused) as error:
            outcome, said = REFUSED, str(error)
            if len(said.splitlines()) != 1 and type(error).__name__ != "NoWeightsError":
                outcome = TRACEBACK
        except Hang:
            outcome, said = HANG, traceback.format_exc()
        except Exception:
            outcome, said = TRACEBACK, traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    if (place.work / "executed").exists():
        watched.append(f"{EXECUTED}: a pickle's command")
    before, place.before = place.before, place.state()
    if not watched and place.before != before:
        changed = {*place.before.items()} ^ {*before.items()}
        watched.append(f"{OUTSIDE}: {sorted(name for name, _ in changed)[:3]}")
    if watched:
        return watched[0].partition(":")[0], "\n".join(watched[:5])
    return outcome, said


def _hang(signum: int, frame: Any) -> None:
    raise Hang(f"more than {SECONDS} s")


def begin(folder: Path) -> Place:
    """A process's place, with the watch set up."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "MPLCONFIGDIR": str(folder.parent)}
    for module in IMPORTED:
        import_module(module)
    torch.set_num_threads(1)
    place = Place(folder)
    if not own:
        sys.addaudithook(watch)
    own[:] = [Path(os.path.realpath(path)) for path in (place.top, place.work, gettempdir(), "/dev/null")]
    return place


def _work(folder: Path, inputs: list[tuple[str, int]], pipe: Any) -> None:
    place = begin(folder)
    for kind, number in inputs:
        pipe.send(("begin", kind, number, ""))
        found = attempt(kind, number, place)
        if found[0] == HANG:  # or the machine was busy
            found = attempt(kind, number, place)
        pipe.send((*found, kind, number))
    pipe.send(("end", "", 0, ""))


@dataclass
class Result:
    """Counts by kind and outcome, and the findings."""

    counts: dict[str, Counter[str]]
    findings: list[tuple[str, int, str, str]]


def fuzz(inputs: list[tuple[str, int]], show: Callable[[int], None] = lambda done: None) -> Result:
    """Try all inputs, each in a child process that is started anew where it dies."""
    result = Result({kind: Counter() for kind in KINDS}, [])
    todo, done = list(inputs), 0
    while todo:
        with TemporaryDirectory() as folder:
            ours, theirs = multiprocessing.get_context("fork").Pipe(False)
            child = multiprocessing.get_context("fork").Process(target=_work, args=(Path(folder, "top"), todo, theirs))
            child.start()
            theirs.close()
            current, rest = None, list(todo)
            with contextlib.suppress(EOFError):
                while ours.poll(CRASHED):
                    first, second, *which = ours.recv()
                    if first == "end":
                        rest = []
                        break
                    if first == "begin":
                        current = rest.pop(0)
                        continue
                    result.counts[which[0]][first] += 1
                    if first in BAD:
                        result.findings.append((which[0], which[1], first, second))
                    current, done = None, done + 1
                    show(done)
            child.join(1)
            stuck = child.is_alive()
            if stuck:
                child.kill()
            child.join()
            if current is None and rest == todo:
                raise SystemExit("the process that reads the inputs doesn't come up")
            if current is not None:
                outcome = HANG if stuck else CRASH
                result.counts[current[0]][outcome] += 1
                result.findings.append((*current, outcome, f"exit code {child.exitcode}"))
            todo = rest
    return result


def table(result: Result) -> str:
    """A line for each kind, and one of all."""
    columns = (ACCEPTED, REFUSED, *BAD)
    lines = [f"{'kind':10}{'inputs':>8}" + "".join(f"{name:>11}" for name in columns)]
    total: Counter[str] = sum(result.counts.values(), Counter())
    for kind, counts in [*result.counts.items(), ("all", total)]:
        lines.append(f"{kind:10}{sum(counts.values()):>8}" + "".join(f"{counts[name]:>11}" for name in columns))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--only", type=int, help="this number of the one --kind, with its traceback, in this process")
    parser.add_argument("--shown", type=int, default=10, help="findings of each kind to show in full")
    args = parser.parse_args(argv)
    kinds = args.kind or list(KINDS)
    if args.only is not None:
        with TemporaryDirectory() as folder:
            print(*attempt(kinds[0], args.only, begin(Path(folder, "top"))), sep="\n")
        return 0
    inputs = [(kinds[k % len(kinds)], args.first + k // len(kinds)) for k in range(args.inputs)]
    started = time.perf_counter()
    result = fuzz(inputs)
    seen: Counter[str] = Counter()
    for kind, number, outcome, said in result.findings:
        last = said.strip().splitlines()[-1] if said.strip() else ""
        seen[f"{kind} {outcome} {last[:60]}"] += 1
        if seen[f"{kind} {outcome} {last[:60]}"] == 1 and args.shown:
            print(f"--- {kind} {number}: {outcome}\n{said[-1500:]}")
            args.shown -= 1
    for line, count in seen.most_common():
        print(f"{count:5} {line}")
    print(f"{table(result)}\n{time.perf_counter() - started:.0f} s")
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
