"""Caches joined by id: the right values on the right rows, and one clear line when they don't belong together."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_line
from sklearn.preprocessing import StandardScaler, normalize

from feats.cache_reader import DONE, QUARANTINED
from feats.errors import UsageError
from feats.store import FeatureStore
from modeling.features.dealing import deal_split
from modeling.features.joined import FeatureSet, FeatureSource, Ragged
from modeling.features.loading import iter_features, load_features
from modeling.features.normalizer import Normalizer

IDS = [f"{i}é" for i in range(40)]
TAGS = [("happy", "sad", "")[i % 3] for i in range(40)]
SHAPES = {
    "image_feats": (5,),
    "text_feats": (3,),
    "image_views": (2, 5),
    "image_tokens": (4, 6),
    "text_tokens": (7,),
}
BOTH = ("image_feats", "text_feats")
HASHES = {"image_hash": "image_feats", "text_hash": "text_feats", "text_key": "text_feats"}


@cache
def values(name: str, dataset: str, row_id: str) -> np.ndarray:
    """A row's features: a function of cache, dataset and id, so that a row out of place shows."""
    seed = [ord(c) for c in f"{name}/{dataset}/{row_id}"]
    shape = SHAPES[dataset]
    if dataset == "text_tokens":
        shape = (length(row_id), *shape)
    return np.random.default_rng(seed).normal(2, 1, shape).astype(np.float16)


def length(row_id: str) -> int:
    return int(row_id[:-1]) % 4  # one text in four has no token


def make(
    folder: Path,
    name: str,
    datasets: Sequence[str] = BOTH,
    ids: Sequence[str] = IDS,
    tags: Sequence[str] = TAGS,
    quarantined: Mapping[str, str] = {},
    rows: int | None = None,
    changed: Mapping[str, np.ndarray] = {},
    facts: Mapping[str, np.ndarray] = {},
) -> Path:
    """A cache whose first `rows` rows are written (default: all)."""
    path = folder / f"{name}_train.h5"
    counts = np.array([length(i) for i in ids])
    shapes = {dataset: SHAPES[dataset] for dataset in datasets}
    at = np.arange(len(ids) if rows is None else rows)
    arrays = {d: [values(name, d, ids[i]) for i in at] for d in datasets}
    arrays = {d: np.concatenate(v) if d == "text_tokens" else np.stack(v) for d, v in arrays.items()} | dict(changed)
    for fact, dataset in HASHES.items():
        if dataset in datasets:
            arrays[fact] = facts.get(fact, np.array([1000 + int(ids[i][:-1]) for i in at], np.uint64))
    status = np.array([QUARANTINED if ids[i] in quarantined else DONE for i in at])
    with FeatureStore.create(path, ids, tags, {"encoder": name}, shapes, token_counts=counts, block_rows=16) as store:
        for low in range(0, len(at), 16):
            some = at[low : low + 16]
            offsets = np.concatenate([[0], np.cumsum(counts)])
            part = {
                d: v[offsets[low] : offsets[some[-1] + 1]] if d == "text_tokens" else v[some] for d, v in arrays.items()
            }
            store.write(some, status[some], part, {ids[i]: quarantined[ids[i]] for i in some if ids[i] in quarantined})
        store.finish()
    return path


def check(features: torch.Tensor, name: str, dataset: str, ids: Sequence[str]) -> None:
    assert features.dtype == torch.float16
    np.testing.assert_array_equal(features.numpy(), np.stack([values(name, dataset, i) for i in ids]))


# -- joining ----------------------------------------------------------------------------------------------------


def test_joins_by_id_whatever_the_order(tmp_path: Path):
    order = np.random.default_rng(0).permutation(len(IDS))
    make(tmp_path, "clip", [*BOTH, "image_views"])
    make(tmp_path, "resnet", ["image_feats"], [IDS[i] for i in order], [TAGS[i] for i in order])
    make(tmp_path, "roberta", ["text_feats"], IDS[::-1], TAGS[::-1])
    joined = load_features(tmp_path, "train", ["clip", "resnet"], ["roberta", "clip"])
    assert (joined.ids, joined.tags, joined.left_out, len(joined)) == (IDS, TAGS, {}, 40)
    assert list(joined.image) == ["clip", "resnet"] and list(joined.text) == ["roberta", "clip"]
    for name, features in joined.image.items():
        check(features, name, "image_feats", IDS)
    for name, features in joined.text.items():
        check(features, name, "text_feats", IDS)
    check(joined.views["clip"], "clip", "image_views", IDS)
    assert list(joined.views) == ["clip"] and not joined.image_tokens and not joined.text_tokens
    assert joined.widths == {"image": {"clip": 5, "resnet": 5}, "text": {"roberta": 3, "clip": 3}}
    assert joined.source.fingerprints == {name: {"encoder": name} for name in ("clip", "resnet", "roberta")}
    assert joined.image_hash.tolist() == joined.text_key.tolist() == list(range(1000, 1040))
    assert joined.summary().startswith("train: 40 rows (image clip 5, image resnet 5, text roberta 3, text clip 3)")
    # The first cache named gives the order.
    assert load_features(tmp_path, "train", ["resnet"], ["clip"]).ids == [IDS[i] for i in order]
    assert not load_features(tmp_path, "train", ["clip"], [], views=False).views


def test_quarantined_rows_are_left_out_by_name(tmp_path: Path):
    make(tmp_path, "resnet", ["image_feats"], quarantined={"3é": "picture is truncated", "9é": "no picture file"})
    make(tmp_path, "roberta", ["text_feats"], quarantined={"9é": "no text"})
    joined = load_features(tmp_path, "train", ["resnet"], ["roberta"])
    kept = [i for i in IDS if i not in ("3é", "9é")]
    assert joined.ids == kept and len(joined) == len(joined.tags) == len(joined.image_hash) == 38
    assert joined.left_out == {
        "3é": "resnet: picture is truncated",
        "9é": "resnet: no picture file; roberta: no text",
    }
    check(joined.image["resnet"], "resnet", "image_feats", kept)
    check(joined.text["roberta"], "roberta", "text_feats", kept)
    assert joined.dataset.ids == IDS and joined.dataset.tags == TAGS
    assert "left out 2: 3é (resnet: picture is truncated)" in joined.summary()
    with pytest.raises(UsageError, match="1 row: 3é not among .*left out .resnet: picture is truncated"):
        joined.positions(["1é", "3é"])
    assert joined.positions(["4é", "0é"]).tolist() == [3, 0]


def test_the_split_does_not_depend_on_which_rows_a_cache_lacks(tmp_path: Path):
    tags = ["happy" if i % 2 else "sad" for i in range(40)]
    make(tmp_path, "resnet", ["image_feats"], tags=tags)
    make(tmp_path, "clip", tags=tags, quarantined={"3é": "values that overflow half precision"})
    make(tmp_path, "roberta", ["text_feats"], tags=tags)
    sets = [load_features(tmp_path, "train", [name], ["roberta"]) for name in ("resnet", "clip")]
    splits = [deal_split(each.dataset.ids, each.dataset.tags, 0.2) for each in sets]
    assert splits[0] == splits[1] and len(sets[1]) == 39
    assert sets[1].positions(splits[1].without(sets[1].left_out).train) is not None


def test_labels_are_the_known_ones(tmp_path: Path):
    make(tmp_path, "resnet", ["image_feats"], tags=["" if i < 10 else tag for i, tag in enumerate(TAGS)])
    make(tmp_path, "roberta", ["text_feats"])
    joined = load_features(tmp_path, "train", ["resnet"], ["roberta"])
    assert joined.tags == TAGS


def test_hashes_come_from_whichever_cache_knows(tmp_path: Path):
    make(tmp_path, "clip")
    make(tmp_path, "resnet", ["image_feats"])
    make(tmp_path, "roberta", ["text_feats"])
    text_only = load_features(tmp_path, "train", [], ["roberta"])
    assert not text_only.image_hash.any() and text_only.text_key.all() and not text_only.image
    image_only = load_features(tmp_path, "train", ["resnet"], [])
    assert image_only.image_hash.all() and not image_only.text_key.any() and image_only.image_hash.dtype == np.uint64
    assert load_features(tmp_path, "train", [], ["clip"]).image_hash.all()


def test_blocks_are_the_whole(tmp_path: Path):
    order = np.random.default_rng(0).permutation(len(IDS))
    make(tmp_path, "clip", SHAPES, quarantined={"3é": "bad", "30é": "bad"})
    make(tmp_path, "roberta", ["text_feats"], IDS[::-1], TAGS[::-1])
    make(tmp_path, "bert", SHAPES, [IDS[i] for i in order], [TAGS[i] for i in order])
    asked = (tmp_path, "train", ["clip"], ["roberta", "bert"])
    whole = load_features(*asked, tokens=True)
    blocks = list(iter_features(whole.source, "train", block_rows=7))
    assert [len(block) for block in blocks] == [7, 7, 7, 7, 7, 3] and not blocks[0].views
    kept = [i for i in IDS if i not in ("3é", "30é")]
    assert [i for block in blocks for i in block.ids] == whole.ids == kept
    assert [tag for block in blocks for tag in block.tags] == whole.tags == [TAGS[IDS.index(i)] for i in kept]
    assert np.concatenate([block.image_hash for block in blocks]).tolist() == [1000 + int(i[:-1]) for i in kept]
    check(torch.cat([block.image["clip"] for block in blocks]), "clip", "image_feats", kept)
    for name in ("roberta", "bert"):
        check(torch.cat([block.text[name] for block in blocks]), name, "text_feats", kept)
    tokens = torch.cat([block.text_tokens["bert"].values for block in blocks])
    np.testing.assert_array_equal(tokens, np.concatenate([values("bert", "text_tokens", i) for i in kept]))
    assert torch.equal(tokens, whole.text_tokens["bert"].values)
    assert all(block.left_out == whole.left_out and block.dataset.ids == IDS for block in blocks)


def test_a_bad_value_is_named_in_its_block(tmp_path: Path):
    rows = np.stack([values("clip", "image_feats", i) for i in IDS])
    rows[20, 1] = np.inf
    make(tmp_path, "clip", ["image_feats"], changed={"image_feats": rows}, quarantined={"3é": "bad"})
    blocks = iter_features(FeatureSource(tmp_path, ("clip",)), "train", block_rows=10)
    assert next(blocks).ids[-1] == "10é"
    with pytest.raises(UsageError, match="image_feats holds NaN or infinite values .1 row: 20é"):
        next(blocks)


def test_tokens_on_request(tmp_path: Path):
    make(tmp_path, "clip", SHAPES, quarantined={"5é": "bad"})
    make(tmp_path, "roberta", ["text_feats"], IDS[::-1], TAGS[::-1])
    joined = load_features(tmp_path, "train", ["clip"], ["clip", "roberta"], tokens=True)
    check(joined.image_tokens["clip"], "clip", "image_tokens", joined.ids)
    rows = torch.tensor([6, 0, 2, 30])
    tokens, mask = joined.text_tokens["clip"].padded(rows)
    expected = [values("clip", "text_tokens", joined.ids[row]) for row in rows]
    assert tokens.shape == (4, max(map(len, expected)), 7) and mask.sum(1).tolist() == list(map(len, expected))
    for row, real, text in zip(tokens, mask, expected, strict=True):
        np.testing.assert_array_equal(row[real], text)
        assert not row[~real].any() and not real[len(text) :].any()
    assert joined.text_tokens["clip"].padded(rows[:0])[0].shape == (0, 0, 7)
    assert joined.text_tokens["clip"].padded(torch.tensor([0]))[0].shape == (1, 0, 7)
    joined.require_tokens("image"), joined.require_tokens("text")
    with pytest.raises(UsageError, match="needs text tokens, and none were loaded; load the features with `tokens`"):
        load_features(tmp_path, "train", ["clip"], ["clip"]).require_tokens("text")
    plain = load_features(tmp_path, "train", ["clip"], ["roberta"], tokens=True)
    with pytest.raises(UsageError, match=r"needs text tokens, and no text cache has them \(there: roberta\).*`tokens`"):
        plain.require_tokens("text")


def test_to_converts_every_tensor(tmp_path: Path):
    make(tmp_path, "clip", SHAPES)
    joined = load_features(tmp_path, "train", ["clip"], ["clip"], tokens=True)
    moved: FeatureSet = joined.to("cpu", torch.float32)
    assert isinstance(moved.text_tokens["clip"], Ragged) and moved.text_tokens["clip"].values.dtype == torch.float32
    assert moved.text_tokens["clip"].offsets.dtype == torch.int64
    for part in ("image", "text", "views", "image_tokens"):
        assert getattr(moved, part)["clip"].dtype == torch.float32
        assert torch.equal(getattr(moved, part)["clip"], getattr(joined, part)["clip"].float())
    assert joined.image["clip"].dtype == torch.float16 and moved.ids == joined.ids


# -- refusals ---------------------------------------------------------------------------------------------------


def test_missing_cache_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("saved/feats")
    make(folder, "minilm", ["text_feats"])
    with pytest.raises(UsageError) as error:
        load_features(folder, "train", ["clip"], ["minilm"])
    line = one_line(error)
    assert line.startswith(f"no cache {folder / 'clip_train.h5'}; make it with: python feats/clip_extract_feats.py (")
    assert "caches there: minilm_train" in line
    with pytest.raises(UsageError, match="Did you mean minilm"):
        load_features(folder, "train", [], ["minlm"])
    with pytest.raises(UsageError, match="<encoder>_extract_feats.py `name` mine `out` elsewhere .caches there: none"):
        load_features("elsewhere", "train", [], ["mine"])
    with pytest.raises(UsageError, match="minilm_test.h5; make it with: python feats/minilm_extract_feats.py") as error:
        load_features(folder, "test", [], ["minilm"])
    assert "Where the data have no test, only train: `split` train takes what is there." in one_line(error)


def test_data_without_a_training_split_are_told_how_to_call_it(tmp_path: Path):
    make(tmp_path, "minilm", ["text_feats"]).rename(tmp_path / "minilm_tweets.h5")
    with pytest.raises(UsageError) as error:
        load_features(tmp_path, "train", [], ["minilm"])
    assert "Where the data have no train, only tweets: call the rows to train on so: shards train-" in one_line(error)


def test_a_cache_without_the_asked_side(tmp_path: Path):
    make(tmp_path, "vader", ["text_feats"])
    make(tmp_path, "clip")
    (tmp_path / "junk_train.h5").write_bytes(b"no cache")
    with pytest.raises(UsageError) as error:
        load_features(tmp_path, "train", ["vader"], ["clip"])
    expected = "vader_train.h5 has no image side; vader can be `text` only. For `image` there are: clip"
    assert one_line(error).endswith(expected)


@pytest.mark.parametrize("image, text, match", [([], [], "no cache was named"), (["a", "a"], [], "a twice")])
def test_names_that_make_no_sense(tmp_path: Path, image: list[str], text: list[str], match: str):
    with pytest.raises(UsageError, match=match):
        load_features(tmp_path, "train", image, text)


def test_caches_of_different_data_sets(tmp_path: Path):
    make(tmp_path, "resnet", ["image_feats"])
    make(tmp_path, "roberta", ["text_feats"], [*IDS[:33], "77é"], [*TAGS[:33], ""])
    with pytest.raises(UsageError) as error:
        load_features(tmp_path, "train", ["resnet"], ["roberta"])
    line = one_line(error)
    assert "of different data: 40 and 34 rows, 33 in common" in line
    assert "only in resnet: 7 rows: 33é, 34é, 35é, 36é, 37é, ...; only in roberta: 1 row: 77é" in line


@pytest.mark.parametrize("fact, what", [("image_hash", "pictures"), ("text_hash", "texts")])
def test_the_same_id_with_other_content(tmp_path: Path, fact: str, what: str):
    other = np.arange(1000, 1040, dtype=np.uint64)
    other[[4, 8]] += np.uint64(500)
    make(tmp_path, "clip")
    make(tmp_path, "mine", facts={fact: other})
    with pytest.raises(UsageError, match=f"different {what}: 2 rows: 4é, 8é differ"):
        load_features(tmp_path, "train", ["clip"], ["mine"])


def test_what_changed_in_a_quarantined_row_is_no_conflict(tmp_path: Path):
    other = np.arange(1000, 1040, dtype=np.uint64)
    other[4] = 0
    other[5] = 7
    make(tmp_path, "clip")
    make(tmp_path, "mine", facts={"image_hash": other}, quarantined={"4é": "unreadable", "5é": "was unreadable"})
    joined = load_features(tmp_path, "train", ["mine"], ["clip"])
    assert len(joined) == 38 and joined.dataset.image_hash[4] == 1004


def test_conflicting_labels(tmp_path: Path):
    make(tmp_path, "resnet", ["image_feats"])
    make(tmp_path, "roberta", ["text_feats"], tags=["sad", *TAGS[1:]])
    with pytest.raises(UsageError, match="disagree on the labels of 1 rows, e.g. 0é: happy and sad.*again"):
        load_features(tmp_path, "train", ["resnet"], ["roberta"])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dataset", SHAPES)
def test_values_that_are_not_finite(tmp_path: Path, dataset: str, bad: float):
    rows = [values("clip", dataset, i).copy() for i in IDS]
    rows[6].reshape(-1)[-1] = bad
    joined = np.concatenate(rows) if dataset == "text_tokens" else np.stack(rows)
    make(tmp_path, "clip", SHAPES, changed={dataset: joined})
    with pytest.raises(UsageError) as error:
        load_features(tmp_path, "train", ["clip"], ["clip"], tokens=True)
    assert f"{dataset} holds NaN or infinite values (1 row: 6é)" in one_line(error)


def test_an_incomplete_cache(tmp_path: Path):
    make(tmp_path, "resnet", ["image_feats"], rows=32)
    make(tmp_path, "roberta", ["text_feats"])
    with pytest.raises(
        UsageError, match=r"resnet_train.h5 is incomplete: 8 of 40 rows .* python feats/resnet_extract_"
    ):
        load_features(tmp_path, "train", ["resnet"], ["roberta"])


def test_nothing_in_common(tmp_path: Path):
    make(tmp_path, "resnet", ["image_feats"], quarantined=dict.fromkeys(IDS, "no picture file"))
    with pytest.raises(UsageError, match="no row of the train data is in all of resnet: 0é .resnet: no picture file"):
        load_features(tmp_path, "train", ["resnet"], [])


# -- normalisation ----------------------------------------------------------------------------------------------


def matrix() -> torch.Tensor:
    """Half precision as cached; a constant column, one of large mean and small spread, a row of zeros."""
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 5, 0.01, 1, 1, 3])
    x[:, 3] = 0.3
    x[:, 4] += 500
    x[7] = 0
    x[7, 3] = 0.3
    return x.half()


def test_standard_is_scikit_learn_s_on_the_training_rows():
    x = matrix()
    rows = torch.arange(0, 300, 3)
    fitted = Normalizer.fit("standard", x, rows)
    reference = StandardScaler().fit(x[rows].double().numpy())
    np.testing.assert_allclose(fitted.apply(x), reference.transform(x.double().numpy()), rtol=2e-5, atol=2e-5)
    assert fitted.std[3] == 1 and not fitted.apply(x)[:, 3].any()
    assert fitted.mean.dtype == fitted.std.dtype == torch.float32
    x[1] = 1e4  # not a training row: it must not show
    assert torch.equal(Normalizer.fit("standard", x, rows).mean, fitted.mean)
    everything = Normalizer.fit("standard", x)
    np.testing.assert_allclose(everything.mean, x.double().mean(0), rtol=1e-6)


def test_l2_is_scikit_learn_s_and_keeps_zero_rows():
    x = matrix()
    x[7] = 0
    fitted = Normalizer.fit("l2", x, torch.arange(3))
    np.testing.assert_allclose(fitted.apply(x), normalize(x.double().numpy()), rtol=1e-5, atol=1e-7)
    assert not fitted.apply(x)[7].any() and fitted.state() == {}


@pytest.mark.parametrize("kind", ["none", "l2", "standard"])
def test_normalising_views_and_storing(kind: str):
    x = matrix()
    before = x.clone()
    fitted = Normalizer.fit(kind, x)
    out = fitted.apply(x)
    assert out.dtype == torch.float32 and torch.equal(x, before)
    views = torch.stack([x, x.flip(0)], 1)
    assert torch.equal(fitted.apply(views), torch.stack([out, out.flip(0)], 1))
    again = Normalizer.from_state(kind, fitted.state())
    assert torch.equal(again.apply(x), out) and torch.equal(fitted.to("cpu").apply(x), out)
    assert fitted.apply(x.double()).dtype == torch.float64


def test_normalisation_refusals():
    with pytest.raises(UsageError, match="unknown normalisation 'zscore'; there are none, l2, standard"):
        Normalizer.fit("zscore", matrix())
    with pytest.raises(UsageError, match="no training rows"):
        Normalizer.fit("standard", matrix(), torch.tensor([], dtype=torch.int64))
    with pytest.raises(UsageError, match="'standard' with tensors mean: the run is damaged"):
        Normalizer.from_state("standard", {"mean": torch.zeros(2)})
