"""From caches to what heads read: statistics of training rows only, caches side by side in order, gathered batches."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler, normalize
from torch import Tensor

from feats.errors import UsageError
from modeling.choices import NORMS
from modeling.features.inputs import Inputs, Preprocessing
from modeling.features.joined import FeatureSet, FeatureSource, Ragged, Rows
from modeling.heads.config import ABLATIONS, HeadConfig
from modeling.heads.registry import HEADS

N = 12
TRAIN = torch.tensor([7, 0, 3, 11, 4, 9])
LENGTHS = [2, 0, 3, 1, 0, 4, 1, 2, 2, 0, 3, 1]  # tokens of each text


def normal(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 + 3).half()


def ragged(width: int = 4) -> Ragged:
    return Ragged(normal(sum(LENGTHS), width, seed=9), torch.tensor([0, *np.cumsum(LENGTHS)]))


def features(**parts: Any) -> FeatureSet:
    """Two image caches, two text caches; clip is in both."""
    nothing = np.zeros(N, np.uint64)
    rows = Rows.of([str(i) for i in range(N)], [""] * N, nothing, nothing)
    image = {"resnet": normal(N, 5), "clip": normal(N, 3, seed=1)}
    text = {"clip": normal(N, 3, seed=2), "vader": normal(N, 2, seed=3)}
    tables = {"image": image, "text": text, "views": {}, "image_tokens": {}, "text_tokens": {}} | parts
    return FeatureSet("train", rows, **tables, source=FeatureSource(), left_out={}, dataset=rows)


def standard(x: Tensor, train: Tensor) -> np.ndarray:
    return StandardScaler().fit(train.numpy().astype(np.float64)).transform(x.numpy().astype(np.float64))


def close(found: Tensor, expected: Any) -> None:
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), np.asarray(expected), rtol=1e-5, atol=1e-6)


def same(found: Inputs, expected: Inputs) -> None:
    for name in ("image", "text", "image_views", "image_tokens"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    if expected.text_tokens is not None:
        assert torch.equal(found.text_tokens.values, expected.text_tokens.values)
        assert torch.equal(found.text_tokens.offsets, expected.text_tokens.offsets)


# -- preprocessing ----------------------------------------------------------------------------------------------


def test_as_cached_and_side_by_side_in_the_order_of_the_caches():
    fs = features()
    inputs = Preprocessing.fit(fs, TRAIN).apply(fs)
    assert torch.equal(inputs.image, torch.cat([fs.image["resnet"], fs.image["clip"]], 1).float())
    assert torch.equal(inputs.text, torch.cat([fs.text["clip"], fs.text["vader"]], 1).float())
    assert inputs.image_views is inputs.image_tokens is inputs.text_tokens is None
    assert inputs.widths == {"image": 8, "text": 5} and inputs.device.type == "cpu"


def test_the_order_is_that_of_fitting_whatever_a_later_set_s_is():
    fs = features()
    turned = features(image=dict(reversed(fs.image.items())), text=dict(reversed(fs.text.items())))
    same(Preprocessing.fit(fs, TRAIN).apply(turned), Preprocessing.fit(fs, TRAIN).apply(fs))


def test_standard_takes_statistics_of_training_rows_only():
    fs = features()
    fitted = Preprocessing.fit(fs, TRAIN, "standard", {"clip": 0.5})
    inputs = fitted.apply(fs)
    parts = [standard(fs.image[n], fs.image[n][TRAIN]) * scale for n, scale in (("resnet", 1), ("clip", 0.5))]
    close(inputs.image, np.concatenate(parts, 1))
    parts = [standard(fs.text[n], fs.text[n][TRAIN]) * scale for n, scale in (("clip", 0.5), ("vader", 1))]
    close(inputs.text, np.concatenate(parts, 1))
    others = [i for i in range(N) if i not in TRAIN.tolist()]
    for side in (fs.image, fs.text):
        for x in side.values():
            x[others] = torch.nan
    again = Preprocessing.fit(fs, TRAIN, "standard", {"clip": 0.5}).apply(fs)
    assert torch.equal(again.image[TRAIN], inputs.image[TRAIN])
    assert torch.equal(again.text[TRAIN], inputs.text[TRAIN])


def test_l2_makes_each_cache_s_rows_one_long_before_scaling():
    fs = features()
    inputs = Preprocessing.fit(fs, TRAIN, "l2", {"vader": 3.0}).apply(fs)
    close(inputs.image, np.concatenate([normalize(fs.image[n].float()) for n in ("resnet", "clip")], 1))
    close(inputs.text, np.concatenate([normalize(fs.text["clip"].float()), 3 * normalize(fs.text["vader"].float())], 1))


def test_each_cache_has_its_own_normalisation():
    fs = features()
    inputs = Preprocessing.fit(fs, TRAIN, {"resnet": "standard", "vader": "l2"}).apply(fs)
    close(inputs.image, np.concatenate([standard(fs.image["resnet"], fs.image["resnet"][TRAIN]), fs.image["clip"]], 1))
    close(inputs.text, np.concatenate([fs.text["clip"], normalize(fs.text["vader"].float())], 1))


@pytest.mark.parametrize("norm", NORMS)
def test_tokens(norm: str):
    fs = features(image_tokens={"clip": normal(N, 4, 6, seed=5)}, text_tokens={"clip": ragged()})
    inputs = Preprocessing.fit(fs, TRAIN, norm, {"clip": 2.0}).apply(fs)
    image, text = fs.image_tokens["clip"], fs.text_tokens["clip"]
    of_text = text.values.split(LENGTHS)
    train_image, train_text = image[TRAIN].flatten(0, 1), torch.cat([of_text[i] for i in TRAIN])
    expected = {
        "none": lambda x, train: x.float(),
        "l2": lambda x, train: normalize(x.float()),
        "standard": standard,
    }[norm]
    close(inputs.image_tokens.flatten(0, 1), 2 * expected(image.flatten(0, 1), train_image))
    close(inputs.text_tokens.values, 2 * expected(text.values, train_text))
    assert torch.equal(inputs.text_tokens.offsets, text.offsets)
    assert inputs.image_tokens.shape == (N, 4, 6)
    assert inputs.widths | {"image_tokens": 6, "image_positions": 4, "text_tokens": 4} == inputs.widths


def test_views_of_several_caches():
    """A cache without views gives the picture itself, one with fewer than the others repeats its own."""
    image = {name: normal(N, width, seed=width) for name, width in (("a", 2), ("b", 3), ("c", 4))}
    views = {"c": normal(N, 3, 4, seed=10), "a": normal(N, 2, 2, seed=11)}
    fs = features(image=image, views=views)
    inputs = Preprocessing.fit(fs, TRAIN, "standard", {"c": 2.0}).apply(fs)
    assert inputs.image_views.shape == (N, 3, 9)
    a, b, c = (image[name] for name in "abc")
    for k, repeated in enumerate((0, 1, 0)):
        parts = [standard(views["a"][:, repeated], a[TRAIN]), standard(b, b[TRAIN])]
        parts.append(2 * standard(views["c"][:, k], c[TRAIN]))
        close(inputs.image_views[:, k], np.concatenate(parts, 1))


@pytest.mark.parametrize("norm", NORMS)
def test_state_round_trip(norm: str):
    fs = features(
        views={"clip": normal(N, 2, 3, seed=4)},
        image_tokens={"clip": normal(N, 4, 6, seed=5)},
        text_tokens={"clip": ragged()},
    )
    fitted = Preprocessing.fit(fs, TRAIN, norm, {"clip": 0.25})
    state = fitted.state()
    assert len(set(state)) == len(state) == (12 if norm == "standard" else 0)
    assert set(fitted.kinds.values()) == {norm}
    kept = json.loads(json.dumps([fitted.caches, fitted.scales, fitted.kinds]))
    back = Preprocessing.from_state(*kept, {name: t.clone() for name, t in state.items()})
    same(back.apply(fs), fitted.apply(fs))
    same(fitted.to("cpu").apply(fs), fitted.apply(fs))
    if norm == "standard":
        state.pop("text/vader/std")
        with pytest.raises(UsageError, match="the run is damaged"):
            Preprocessing.from_state(*kept, state)


def test_one_side_only():
    fs = features(text={})
    inputs = Preprocessing.fit(fs, TRAIN, "l2").apply(fs)
    assert inputs.text is None and inputs.widths == {"image": 8}


@pytest.mark.parametrize("side, other", [("image", "text"), ("text", "image")])
def test_what_one_side_needs_of_a_preparation_for_two(side: str, other: str):
    parts = {"image_tokens": {"clip": normal(N, 4, 6)}, "text_tokens": {"clip": ragged()}}
    parts["views"] = {"clip": normal(N, 2, 3)}
    fs = features(**parts)
    both = Preprocessing.fit(fs, TRAIN, "standard", {"clip": 2.0, "vader": 3.0, "resnet": 4.0})
    fewer = features(**parts | {other: {}, f"{other}_tokens": {}} | ({"views": {}} if other == "image" else {}))
    found, expected = both.only([side]).apply(fewer), both.apply(fs)
    assert getattr(found, other) is None and getattr(found, f"{other}_tokens") is None
    assert torch.equal(getattr(found, side), getattr(expected, side))
    assert (found.image_views is None) == (side == "text")
    assert set(both.only([side]).state()) < set(both.state())
    own = set(fs.widths[side])
    assert set(both.only([side]).scales) == own
    same(both.only([side]).apply(fs), found)


def test_what_can_not_be_prepared():
    with pytest.raises(UsageError, match="`scale` names roberta; the caches in use are clip, resnet, vader"):
        Preprocessing.fit(features(), TRAIN, scales={"roberta": 0.5, "clip": 1.0})
    with pytest.raises(UsageError, match="`norm` names bert; the caches in use are clip"):
        Preprocessing.fit(features(), TRAIN, {"bert": "l2"})
    tokens = {"clip": normal(N, 4, 6), "resnet": normal(N, 9, 2)}
    with pytest.raises(UsageError, match="clip, resnet all hold image tokens; name one cache"):
        Preprocessing.fit(features(image_tokens=tokens), TRAIN)
    with pytest.raises(UsageError, match="unknown normalisation 'zscore'"):
        Preprocessing.fit(features(), TRAIN, "zscore")


# -- batches ----------------------------------------------------------------------------------------------------


def everything() -> Inputs:
    text = ragged()
    return Inputs(
        image=normal(N, 5).float(),
        text=normal(N, 3, seed=1).float(),
        image_views=normal(N, 2, 5, seed=2).float(),
        image_tokens=normal(N, 4, 6, seed=3).float(),
        text_tokens=Ragged(text.values.float(), text.offsets),
    )


ROWS = torch.tensor([[3, 0, 5], [5, 11, 1]])


def test_a_batch_has_each_model_s_rows():
    inputs = everything()
    batch = inputs.batch(ROWS)
    of_text = inputs.text_tokens.values.split(LENGTHS)
    assert batch.text_tokens.shape == (2, 3, 4, 4) and batch.text_mask.shape == (2, 3, 4)
    for m, b in np.ndindex(2, 3):
        row = int(ROWS[m, b])
        assert torch.equal(batch.image[m, b], inputs.image[row]) and torch.equal(batch.text[m, b], inputs.text[row])
        assert torch.equal(batch.image_tokens[m, b], inputs.image_tokens[row])
        assert batch.text_mask[m, b].tolist() == [True] * LENGTHS[row] + [False] * (4 - LENGTHS[row])
        assert torch.equal(batch.text_tokens[m, b, : LENGTHS[row]], of_text[row])
        assert not batch.text_tokens[m, b, LENGTHS[row] :].any()


@pytest.mark.parametrize("sides", [("image", "text", "image_tokens", "text_tokens"), ("image",), ("text_tokens",)])
def test_a_batch_of_all_rows(sides: tuple[str, ...]):
    values = {"image": normal(N, 3), "text": normal(N, 2, seed=1), "image_tokens": normal(N, 2, 3, seed=2)}
    inputs = Inputs(**{side: (values | {"text_tokens": ragged()})[side] for side in sides})
    assert len(inputs) == N
    every, named = inputs.batch(), inputs.batch(torch.arange(N)[None])
    for name in ("image", "text", "image_tokens", "text_tokens", "text_mask"):
        one, other = getattr(every, name), getattr(named, name)
        assert (one is None and other is None) or torch.equal(one, other), name


def test_a_batch_takes_the_chosen_view():
    inputs = everything()
    chosen = torch.arange(2 * N).view(2, N) % 3
    every = torch.cat([inputs.image[:, None], inputs.image_views], 1)  # 0 is the picture itself
    image = inputs.batch(ROWS, chosen).image
    for m, b in np.ndindex(2, 3):
        assert torch.equal(image[m, b], every[ROWS[m, b], chosen[m, ROWS[m, b]]])
    shared = inputs.batch(ROWS, chosen[0]).image
    assert torch.equal(shared, every[ROWS, chosen[0][ROWS]])
    assert chosen[0][ROWS].unique().tolist() == chosen.gather(1, ROWS).unique().tolist() == [0, 1, 2]


def test_one_batch_for_all_models():
    batch = everything().batch(ROWS[:1]).expand(3)
    assert {x.shape[0] for x in (batch.image, batch.text, batch.image_tokens, batch.text_tokens, batch.text_mask)} == {
        3
    }
    assert all(torch.equal(batch.text_tokens[m], batch.text_tokens[0]) for m in range(3))
    assert Inputs(text=torch.ones(4, 2)).batch(ROWS[:1, :1]).expand(3).image is None


@pytest.mark.parametrize("sides", ABLATIONS)
@pytest.mark.parametrize("head", HEADS)
def test_a_head_gets_no_more_than_it_reads(head: str, sides: tuple[str, ...]):
    config = HeadConfig(head, sides=sides)
    inputs = everything().for_head(config)
    tokens = {"image_tokens", "text_tokens"}
    read = {
        "coattention": tokens,
        "cross_modal": tokens,
        "early_plane": {"image_tokens", "text"},
        "query_attention": {"image", "text", "image_tokens"},
    }.get(head, {"image", "text"})
    read |= {"image_views"} if "image" in read else set()
    read = {name for name in read if name.startswith(sides)}
    there = {
        n for n in ("image", "text", "image_views", "image_tokens", "text_tokens") if getattr(inputs, n) is not None
    }
    assert there == read


def test_a_head_that_needs_what_is_not_there():
    inputs = everything()
    vectors = Inputs(image=inputs.image, text=inputs.text)
    assert vectors.for_head(HeadConfig("query_attention")).widths == {"image": 5, "text": 3}  # tokens are optional
    with pytest.raises(UsageError, match="head coattention needs image tokens features, and there are image, text"):
        vectors.for_head(HeadConfig("coattention"))
    with pytest.raises(UsageError, match="head linear needs text features, and there are image"):
        Inputs(image=inputs.image).for_head(HeadConfig("linear"))
