"""Synthetic caches: what encoders would leave of a data set whose pairs tell their labels, but not surely."""

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from conftest import make_course

from feats.cache_reader import DONE, QUARANTINED
from feats.store import FeatureStore

CLASSES = ["negative", "neutral", "positive"]
WIDTHS = {"clip": (8, 8), "resnet": (12, None), "roberta": (None, 10), "vader": (None, 4)}  # image, text
TOKENS, TOKEN_WIDTH = 4, 6  # a square of tokens


def make_tags(rows: int) -> list[str]:
    """Half the rows positive, a third negative, the rest neutral."""
    return [("positive", "negative", "positive", "neutral", "positive", "negative")[i % 6] for i in range(rows)]


def make_cache(
    folder: Path,
    name: str,
    rows: int = 90,
    *,
    split: str = "train",
    tags: Sequence[str] | None = None,
    seed: int = 0,
    first_id: int = 0,
    tokens: bool = False,
    views: int = 0,
    quarantined: Collection[int] = (),
    facts: Mapping[str, np.ndarray] = {},
    changed: Mapping[str, np.ndarray] = {},
    fingerprint: Mapping[str, Any] = {},
    parameters: Mapping[str, int] | None = None,
) -> Path:
    """<folder>/<name>_<split>.h5 of `rows` pairs. `changed` replaces whole datasets, `facts` the row hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{split}.h5"
    tags = make_tags(rows) if tags is None else list(tags)
    rows = len(tags)
    ids = [f"p{first_id + i}" for i in range(rows)]
    rng = np.random.default_rng([seed, *name.encode(), *split.encode()])
    widths = dict(zip(("image", "text"), WIDTHS[name], strict=True))
    place = np.array([CLASSES.index(tag) if tag in CLASSES else len(tag) % 3 for tag in tags])
    shapes, arrays, counts = {}, {}, None
    for side, width in widths.items():
        if width is None:
            continue
        centres = np.random.default_rng([*name.encode(), *{"image": b"img", "text": b"txt"}[side]]).normal(
            size=(3, width)
        ) * (2 / width**0.5)
        shapes[f"{side}_feats"] = (width,)
        arrays[f"{side}_feats"] = x = centres[place] * 1.2 + rng.normal(size=(rows, width))
        for fact in {"image": ("image_hash",), "text": ("text_hash", "text_key")}[side]:
            arrays[fact] = np.asarray(facts.get(fact, np.arange(rows) + first_id + 1000), np.uint64)
        if side == "image" and views:
            shapes["image_views"] = (views, width)
            arrays["image_views"] = x[:, None] + 0.2 * rng.normal(size=(rows, views, width))
        if tokens:
            centres = rng.normal(size=(3, TOKEN_WIDTH))
            shapes[f"{side}_tokens"] = (TOKENS, TOKEN_WIDTH) if side == "image" else (TOKEN_WIDTH,)
            if side == "image":
                arrays["image_tokens"] = centres[place][:, None] + rng.normal(size=(rows, TOKENS, TOKEN_WIDTH))
            else:
                counts = np.arange(rows) % 4 + 1
                arrays["text_tokens"] = np.repeat(centres[place], counts, 0) + rng.normal(
                    size=(counts.sum(), TOKEN_WIDTH)
                )
    arrays = {k: v.astype(np.float16) if v.dtype == np.float64 else v for k, v in arrays.items()} | dict(changed)
    made_by = {"encoder": name, "model": "tiny", "weights_sha256": "0" * 64, "data": {"rows": rows}, "dtype": "fp32"}
    status = np.array([QUARANTINED if i in quarantined else DONE for i in range(rows)])
    how = {"token_counts": counts, "parameters": parameters}
    with FeatureStore.create(path, ids, tags, {**made_by, **fingerprint}, shapes, **how) as store:
        store.write(np.arange(rows), status, arrays, {ids[i]: "picture is truncated" for i in quarantined})
        store.finish()
    return path


def read(folder: Path, name: str, dataset: str, ids: Sequence[str], split: str = "train") -> np.ndarray:
    """Features of `ids` in double precision, straight from the cache."""
    with FeatureStore.open(folder / f"{name}_{split}.h5") as store:
        return store.read(dataset, list(ids)).astype(np.float64)


def datasets(path: Path) -> dict[str, np.ndarray]:
    """All that a cache holds, read without this program."""
    with h5py.File(path) as file:
        return {name: dataset[:] for name, dataset in file.items()}


def assert_same(a: Path, b: Path) -> None:
    """Two caches hold the same datasets, byte for byte."""
    left, right = datasets(a), datasets(b)
    assert left.keys() == right.keys()
    for name in left:
        assert (left[name].dtype, left[name].shape) == (right[name].dtype, right[name].shape), name
        assert left[name].tobytes() == right[name].tobytes(), name


def encoded_course(root: Path, device: str = "cpu", dtype: str = "fp32") -> Path:
    """`root` with a course set of 24 labelled and 6 other pairs in set/, its caches by the offline encoders in feats/, and
    one run in runs/."""
    from feats import efficientnet_extract_feats, minilm_extract_feats, vader_extract_feats
    from modeling import train_head

    make_course(root / "set", 24, 6)
    common = ["--data", str(root / "set"), "--out", str(root / "feats"), "--device", device, "--workers", "0"]
    assert vader_extract_feats.main(common) == 0
    assert minilm_extract_feats.main([*common, "--dtype", dtype]) == 0
    assert efficientnet_extract_feats.main([*common, "--dtype", dtype, "--model", "lite0"]) == 0
    sides = ["--vtype", "efficientnet", "--ttype", "minilm", "vader", "--norm", "standard"]
    folders = ["--feats", str(root / "feats"), "--runs", str(root / "runs")]
    assert train_head.main([*folders, *sides, "--val-ratio", "0.25", "--D", "8", "--ep", "2", "--device", device]) == 0
    return root


def light_course(root: Path) -> Path:
    """As `encoded_course`, by the two encoders that are quickest to load: pixels and vader."""
    from feats import pixels_extract_feats, vader_extract_feats
    from modeling import train_head

    make_course(root / "set", 24, 6)
    common = ["--data", str(root / "set"), "--out", str(root / "feats"), "--device", "cpu", "--workers", "0"]
    assert vader_extract_feats.main(common) == 0
    assert pixels_extract_feats.main([*common, "--size", "32"]) == 0
    folders = ["--feats", str(root / "feats"), "--runs", str(root / "runs")]
    settings = ["--norm", "standard", "--val-ratio", "0.25", "--D", "8", "--ep", "2", "--device", "cpu"]
    assert train_head.main([*folders, "--vtype", "pixels", "--ttype", "vader", *settings]) == 0
    return root


def pair_options(root: Path, number: int) -> list[str]:
    """Options of inference_head.py for a raw pair of an `encoded_course`."""
    text = (root / "set" / "data" / f"{number}.txt").read_text(encoding="utf-8")
    return ["--image", str(root / "set" / "data" / f"{number}.jpg"), "--text", text]


def submission(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a prediction file."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows
