"""Explanations against plain writings of the same formulas, and against what was planted."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import CLASSES, cache, cached_pairs, make_pairs, tiny_bert, tiny_clip, tiny_vit
from PIL import Image
from scipy.stats import beta
from tiny_models import make_pictures
from torchvision.models import VisionTransformer
from transformers import ViTModel

from feats.encoders import torchvision_image
from feats.encoders.base import ImageSide, Loading
from feats.encoders.registry import load_encoder
from feats.errors import UsageError
from modeling import train_head
from modeling.explanations import token_gradients
from modeling.explanations.attention import recorded_attention
from modeling.explanations.curves import Score, random_orders, score_order
from modeling.explanations.drawing import AGAINST, FOR, draw, most_important, overlay
from modeling.explanations.evidence import TrainingRows
from modeling.explanations.explained import ExplainedModel, load_explained
from modeling.explanations.explanation import (
    MethodCheck,
    check_methods,
    choose_methods,
    explain_pair,
    explain_part,
    methods_of,
)
from modeling.explanations.maps import grad_cam, grad_cam_layer, gradient_attention, has_attention, is_convolutional
from modeling.explanations.methods import ATTENTION, GRAD_CAM, INTEGRATED_GRADIENTS, OCCLUSION
from modeling.explanations.perturbing import PerturbedPicture, PerturbedText, word_spans
from modeling.explanations.token_gradients import integrated_gradients, word_tokens
from modeling.features.loading import load_features
from modeling.runs.folder import load_run
from modeling.runs.listing import newest_run
from modeling.runs.run import Run, Stacking

CPU = torch.device("cpu")
PICTURE = make_pictures([(80, 60)])[0]


def train(root: Path, *options: str) -> Run:
    folders = ["--feats", str(root / "feats"), "--runs", str(root / "runs"), "--device", "cpu"]
    assert train_head.main([*folders, "--val-ratio", "0.25", *options]) == 0
    return load_run(newest_run(root / "runs"))


def explained(root: Path, weights: Mapping[str, str], *options: str) -> ExplainedModel:
    return load_explained(train(root, *options), CPU, weights)


SMALL = "--D 8 --ep 3 --bs 8 --norm standard".split()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Pairs, and caches of a tiny ViT and a tiny BERT."""
    root = tmp_path_factory.mktemp("toy")
    return root, cached_pairs(root)


@pytest.fixture(scope="module")
def model(toy: tuple[Path, dict[str, str]]) -> ExplainedModel:
    return explained(*toy, "--vtype", "vit", "--ttype", "roberta", "--head", "concat", *SMALL)


def picture_of(model: ExplainedModel, part: str, target: int = 1, grid: int = 4) -> PerturbedPicture:
    pair = model.read(PICTURE, "a good day")
    return PerturbedPicture(model, model.features(pair), part, target, pair, grid)


def text_of(model: ExplainedModel, part: str, text: str, target: int = 1) -> PerturbedText:
    pair = model.read(PICTURE, text)
    return PerturbedText(model, model.features(pair), part, target, pair)


# -- the model is the run ----------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_run(toy: tuple[Path, dict[str, str]], model: ExplainedModel):
    root, run = toy[0], model.run
    data = load_features(root / "feats", "train", ["vit"], ["roberta"])
    expected = run.predict_proba(data)
    for row, name in enumerate(data.ids[:6]):
        with Image.open(root / "set" / "data" / f"{name}.jpg") as picture:
            pair = model.read(picture, (root / "set" / "data" / f"{name}.txt").read_text())
        found = model.logits(model.features(pair)).softmax(-1)[0]
        assert found.numpy() == pytest.approx(expected[row], abs=2e-3)  # caches are float16


@pytest.mark.parametrize("stacked", [False, True])
def test_ensembles_speak_as_the_run_does(toy: tuple[Path, dict[str, str]], stacked: bool):
    model = explained(*toy, "--vtype", "vit", "--ttype", "roberta", "--head", "early", *SMALL, "--seeds", "2")
    if stacked:
        rng = torch.Generator().manual_seed(0)
        weight, bias = torch.randn(6, 3, generator=rng).double(), torch.randn(3, generator=rng).double()
        members = [replace(member, group=k) for k, member in enumerate(model.run.members)]
        run = replace(model.run, members=members, stacking=Stacking(weight, bias))
        model = ExplainedModel(run, model.encoders, CPU)
    features = model.features(model.read(PICTURE, "a good day"))
    expected = model.run.probabilities(model.inputs_of(model.members[0], features))
    assert model.logits(features).softmax(-1).numpy() == pytest.approx(expected, abs=1e-6)
    log_odds = np.log(expected[0] / (1 - expected[0]))
    assert [float(model.log_odds(features, k)) for k in range(3)] == pytest.approx(log_odds, abs=1e-5)


def test_heads_that_read_tokens(tmp_path: Path):
    weights = cached_pairs(tmp_path, tokens=True)
    model = explained(tmp_path, weights, "--vtype", "vit", "--ttype", "roberta", "--head", "cross_modal", *SMALL)
    data = load_features(tmp_path / "feats", "train", ["vit"], ["roberta"], tokens=True)
    with Image.open(tmp_path / "set" / "data" / "0.jpg") as picture:
        text = (tmp_path / "set" / "data" / "0.txt").read_text()
        found = explain_pair(model, picture, text, rows=TrainingRows.of(model.run))
    assert found.probabilities == pytest.approx(model.run.predict_proba(data, ["0"])[0], abs=5e-3)
    image, words = found.parts
    assert image.method == ATTENTION and image.map.shape == (4, 4) and image.map.max() > 0
    assert words.completeness is not None and words.completeness.complete
    assert {row.id for row in found.neighbours} <= set(model.run.split.train) and len(found.sides) == 2


# -- attention with gradients ------------------------------------------------------------------------------------


def clip_vit(folder: Path) -> tuple[str, dict]:
    return "clip", tiny_clip(folder)


def huggingface_vit(folder: Path) -> tuple[str, dict]:
    return "vit", tiny_vit(folder)


@pytest.mark.parametrize("make", [clip_vit, huggingface_vit])
def test_recording_attention_changes_no_features(tmp_path: Path, make):
    name, where = make(tmp_path / "weights")
    encoder = load_encoder(name, **where, trainable=True)
    side = encoder.image_side()
    pixels = encoder.to_pixels(side.to_bytes(PICTURE)[None])
    before = side.forward(pixels)["feats"]
    with recorded_attention() as recorded:
        inside = side.forward(pixels)["feats"]
    assert torch.allclose(inside, before, atol=1e-5)
    assert torch.equal(side.forward(pixels)["feats"], before)
    assert len(recorded) == len(side.blocks.modules)
    for weights in recorded:
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5) and weights.requires_grad


def test_torchvision_s_attention_is_recorded():
    torch.manual_seed(0)
    network = VisionTransformer(32, 8, 3, 4, 32, 64).eval().requires_grad_(False)
    forward, blocks = torchvision_image._vit(network, "pooled", Loading(CPU, torch.float32, trainable=True))
    side = ImageSide(lambda image: image, [0.5] * 3, [0.5] * 3, forward, network, blocks=blocks)
    pixels = torch.rand(1, 3, 32, 32)
    before = forward(pixels)["feats"]
    assert has_attention(side, torch.rand(1, 3, 32, 32)) and not is_convolutional(side)
    with recorded_attention() as recorded:
        inside = forward(pixels.requires_grad_())["feats"]
    assert torch.allclose(inside, before, atol=1e-5) and [x.shape for x in recorded] == [(1, 4, 17, 17)] * 3
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(inside.square().sum(), recorded))


def test_recorded_attention_obeys_masks():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    seen = torch.rand(5, 5) < 0.7
    seen.fill_diagonal_(True)
    for options in ({"is_causal": True}, {"attn_mask": seen}, {"attn_mask": torch.randn(5, 5)}, {"scale": 0.3}, {}):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        with recorded_attention():
            found = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        assert torch.allclose(found, expected, atol=1e-6)
    grouped = {"enable_gqa": True}
    expected = torch.nn.functional.scaled_dot_product_attention(q, k[:, :2], v[:, :2], **grouped)
    with recorded_attention():
        found = torch.nn.functional.scaled_dot_product_attention(q, k[:, :2], v[:, :2], **grouped)
    assert torch.allclose(found, expected, atol=1e-6)


def test_gradient_attention_equals_a_plain_writing(toy: tuple[Path, dict[str, str]], model: ExplainedModel):
    """Chefer's propagation, head by head, on transformers' own attentions."""
    picture = picture_of(model, "image/vit")
    network = ViTModel.from_pretrained(toy[1]["vit"], add_pooling_layer=False, attn_implementation="eager").eval()
    pixels = model.to_pixels("image/vit", picture.pixels[None])
    out = network(pixel_values=pixels, output_attentions=True)
    log_odds = picture.log_odds_of({"feats": out.last_hidden_state[:, 0]})
    gradients = torch.autograd.grad(log_odds.sum(), out.attentions)
    relevance = np.eye(17)
    for weights, gradient in zip(out.attentions, gradients, strict=True):
        heads = [np.maximum(g * a, 0) for g, a in zip(gradient[0].numpy(), weights[0].detach().numpy(), strict=True)]
        relevance = relevance + np.mean(heads, 0) @ relevance
    found = gradient_attention(picture)
    assert found == pytest.approx(relevance[0, 1:].reshape(4, 4), rel=1e-3, abs=1e-9)
    assert found.max() > 1.5 * np.median(found)  # not all alike: the comparison says something


def test_means_of_patches_are_read_at_every_patch(tmp_path: Path):
    make_pairs(tmp_path / "set")
    encoder = load_encoder("vit", **tiny_vit(tmp_path / "vit"), pooling="mean")
    cache(encoder, tmp_path / "set", tmp_path / "feats", "vit")
    model = explained(tmp_path, {"vit": str(tmp_path / "vit")}, "--vtype", "vit", "--ablation", "2", *SMALL)
    picture = picture_of(model, "image/vit")
    assert gradient_attention(picture).min() > 1e-3  # the identity of R: each patch is read itself


# -- Grad-CAM ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory: pytest.TempPathFactory) -> ExplainedModel:
    """A tiny CLIP ResNet on both sides."""
    root = tmp_path_factory.mktemp("clip")
    make_pairs(root / "set")
    where = tiny_clip(root / "weights", "resnet")
    cache(load_encoder("clip", **where), root / "set", root / "feats", "clip")
    return explained(root, {"clip": where["weights"]}, "--vtype", "clip", "--head", "concat", *SMALL)


def test_fp32_is_not_rounded_to_tf32_as_in_extraction(convolutional: ExplainedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen: list[bool] = []
    block = convolutional.image_side("image/clip").blocks.modules[-1]
    with block.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32)):
        explain_pair(convolutional, PICTURE, "a good day", orders=2)
    assert len(seen) > 2 and not any(seen) and torch.backends.cudnn.allow_tf32


def test_grad_cam_equals_a_plain_writing(convolutional: ExplainedModel):
    picture = picture_of(convolutional, "image/clip")
    side = convolutional.image_side("image/clip")
    last = len(side.blocks.modules)
    pixels = convolutional.to_pixels("image/clip", picture.pixels[None])
    grid = side.blocks.below(pixels, last).detach().requires_grad_()  # (1, H * W, C)
    [gradient] = torch.autograd.grad(picture.log_odds_of(side.blocks.above(grid, None, last)).sum(), grid)
    expected = (grid[0].detach() @ gradient[0].mean(0)).view(2, 2)
    found = grad_cam(picture)
    assert found == pytest.approx(expected.numpy(), rel=1e-4)
    assert np.abs(found).max() > 1e-4 and methods_of(convolutional, "image/clip") == [GRAD_CAM, OCCLUSION]


def test_grad_cam_on_a_patch_embedding(model: ExplainedModel):
    picture = picture_of(model, "image/vit")
    side = model.image_side("image/vit")
    pixels = model.to_pixels("image/vit", picture.pixels[None]).requires_grad_()
    kept = {}
    layer = dict(side.network.named_modules())["embeddings.patch_embeddings.projection"]
    assert grad_cam_layer(side) is layer
    handle = layer.register_forward_hook(lambda module, args, out: kept.update(out=out))
    [gradient] = torch.autograd.grad(picture.log_odds_of(side.forward(pixels)).sum(), kept["out"])
    handle.remove()
    expected = torch.einsum("c,chw->hw", gradient[0].mean((1, 2)), kept["out"][0])
    assert grad_cam(picture) == pytest.approx(expected.detach().numpy(), rel=1e-4, abs=1e-8)
    assert methods_of(model, "image/vit") == [ATTENTION, GRAD_CAM, OCCLUSION]


# -- integrated gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a good very bad movie", "rain", "day day day", ""])
def test_integrated_gradients_are_complete(model: ExplainedModel, text: str):
    perturbed = text_of(model, "text/roberta", text)
    importance, completeness = integrated_gradients(perturbed)
    ids = model.text_side("text/roberta").tokenize([text])[0].ids
    pad = [ids[0], *[0] * (len(ids) - 2), ids[-1]]
    with torch.no_grad():
        at_text, at_pad = (float(perturbed.log_odds_of(model.of_ids("text/roberta", [row]))) for row in (ids, pad))
    assert importance.sum() == pytest.approx(at_text - at_pad, abs=1e-3)
    assert completeness.complete and completeness.difference == pytest.approx(at_text - at_pad, abs=1e-4)
    assert len(importance) == len(text.split())


def test_clip_texts_are_complete_too(convolutional: ExplainedModel):
    importance, completeness = integrated_gradients(text_of(convolutional, "text/clip", "such a good, sunny day!"))
    assert completeness.complete and importance.shape == (5,) and abs(completeness.difference) > 1e-2
    assert importance.sum() == pytest.approx(completeness.difference, abs=1e-3)


def test_steps_are_doubled_to_a_bound(model: ExplainedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_gradients, "TOLERANCE", -1.0)
    monkeypatch.setattr(token_gradients, "MOST_STEPS", 64)
    completeness = integrated_gradients(text_of(model, "text/roberta", "a good day"))[1]
    assert completeness.steps == 64 and not completeness.complete


def test_words_and_their_tokens(tmp_path: Path):
    side = load_encoder("minilm").text_side()
    text = "Unbelievably happy :) #sunshine天気 day"
    spans = word_spans(text)
    words = [text[low:high] for low, high in spans]
    assert words == ["Unbelievably", "happy", ":)", "#sunshine", "天", "気", "day"]
    ids = side.tokenize([text])[0].ids
    tokens = word_tokens(side, text, spans, ids)
    for word, (low, high) in zip(words, tokens, strict=True):
        assert ids[low:high] == side.tokenize([word])[0].ids[1:-1]
    assert tokens[0][0] == 1 and tokens[-1][1] == len(ids) - 1
    long = " ".join(["day"] * 400)
    cut = word_tokens(side, long, word_spans(long), side.tokenize([long])[0].ids)
    assert [high - low for low, high in cut] == [1] * 254 + [0] * 146


# -- occlusion, curves -------------------------------------------------------------------------------------------


def test_occlusion_is_what_a_word_less_changes(model: ExplainedModel):
    text = text_of(model, "text/roberta", "a good day")
    whole, less = (float(model.log_odds(model.features(model.read(PICTURE, t)), 1)) for t in ("a good day", "a day"))
    assert text.occlusion()[1] == pytest.approx(whole - less, abs=1e-5)
    assert text.probability(np.array([[True, False, True]]))[0] == pytest.approx(1 / (1 + np.exp(-less)), abs=1e-6)


def test_missing_cells_are_blurred_and_others_as_they_were(model: ExplainedModel, monkeypatch: pytest.MonkeyPatch):
    picture = picture_of(model, "image/vit")
    seen = []
    monkeypatch.setattr(model, "to_pixels", lambda part, pixels: seen.append(pixels) or torch.zeros(1, 3, 32, 32))
    kept = np.ones((1, 16), bool)
    kept[0, 6] = False  # row 1, column 2
    picture.features(kept)
    changed = (seen[0][0] != picture.pixels).any(-1)
    assert changed[8:16, 16:24].float().mean() > 0.9
    changed[8:16, 16:24] = False
    assert not changed.any()


def test_curves_of_a_known_function():
    """A probability that is the kept units' share of the weight: areas in closed form."""
    weight = np.array([0.4, 0.3, 0.2, 0.1])

    def probability(kept: np.ndarray) -> np.ndarray:
        return kept @ weight

    score = score_order(probability, np.array([4.0, 3, 2, 1]))
    assert score.deletion_curve == pytest.approx([1, 0.6, 0.3, 0.1, 0])
    assert score.insertion_curve == pytest.approx([0, 0.4, 0.7, 0.9, 1])
    assert (score.deletion, score.insertion) == pytest.approx(((0.5 + 0.6 + 0.3 + 0.1) / 4, 0.625))
    assert score.margin == pytest.approx(0.25) and score.better and score.below >= 0.95
    assert score.random_margins.mean() == pytest.approx(0) and len(score.random_margins) == 10
    worst = score_order(probability, np.array([1.0, 2, 3, 4]))
    assert worst.margin == pytest.approx(-0.25) and not worst.better and worst.below <= 0.05


def test_orders_that_say_nothing_are_no_better_than_random():
    flat = score_order(lambda kept: np.full(len(kept), 0.7), np.arange(9.0))
    assert not flat.better and flat.below == 0.5
    assert score_order(lambda kept: kept[:, 0] * 1.0, np.array([3.0])) is None
    rng = np.random.default_rng(0)
    better = []
    for seed in range(400):
        weight = rng.random(30)
        better.append(score_order(lambda kept, w=weight: kept @ w / w.sum(), rng.random(30), seed=seed).better)
    assert 0.4 < np.mean(better) < 0.6


def test_random_orders_come_with_their_reverse_and_few_units_with_all():
    rng = np.random.default_rng(0)
    drawn = random_orders(20, 5, rng)
    assert len(drawn) == 6 and (drawn[1] == drawn[0][::-1]).all()
    assert len({tuple(order) for order in random_orders(3, 10, rng)}) == 6


def test_probability_is_asked_once_for_each_choice():
    asked = []

    def probability(kept: np.ndarray) -> np.ndarray:
        asked.extend(map(tuple, kept))
        return kept.mean(1)

    score_order(probability, np.arange(49.0))
    assert len(set(asked)) == len(asked) == 2 + 2 * 12 * 6


# -- evidence ----------------------------------------------------------------------------------------------------


def test_sides_and_neighbours_of_a_pair(toy: tuple[Path, dict[str, str]], model: ExplainedModel):
    rows = TrainingRows.of(model.run)
    features = model.features(model.read(PICTURE, "a good day"))
    data = load_features(toy[0] / "feats", "train", ["vit"], ["roberta"])
    train = model.run.split.train
    at = data.positions(train)
    image, text = (x[at].double().numpy() for x in (data.image["vit"], data.text["roberta"]))
    mean = torch.from_numpy(image.mean(0, keepdims=True)).float()
    without = model.logits({**features, "image/vit": {"feats": mean}}).softmax(-1)[0, 1]
    whole = model.logits(features).softmax(-1)[0, 1]
    [of_image, of_text] = rows.side_importance(model, features, 1)
    assert of_image.side == "image" and of_image.probability == pytest.approx(float(whole - without), abs=1e-5)
    assert of_text.side == "text" and of_text.probability != of_image.probability

    table = np.concatenate([(x - x.mean(0)) / x.std(0) for x in (image, text)], 1)
    own = [features[f"{side}/{name}"]["feats"][0].numpy() for side, name in (("image", "vit"), ("text", "roberta"))]
    own = np.concatenate([(x - f.mean(0)) / f.std(0) for x, f in zip(own, (image, text), strict=True)])
    cosine = table @ own / np.linalg.norm(table, axis=1) / np.linalg.norm(own)
    found = rows.nearest(model, features, 3)
    order = np.argsort(-cosine)[:3]
    assert [row.id for row in found] == [train[k] for k in order]
    assert [row.similarity for row in found] == pytest.approx(cosine[order], abs=1e-3)
    assert [row.label for row in found] == data.tags_of([row.id for row in found])


# -- methods and checks ------------------------------------------------------------------------------------------


def test_methods_are_chosen_by_part(model: ExplainedModel):
    assert choose_methods(model) == {"image/vit": ATTENTION, "text/roberta": INTEGRATED_GRADIENTS}
    assert choose_methods(model, [GRAD_CAM]) == {"image/vit": GRAD_CAM, "text/roberta": INTEGRATED_GRADIENTS}
    assert set(choose_methods(model, [OCCLUSION]).values()) == {OCCLUSION}
    with pytest.raises(UsageError, match="unknown `method` magic; there are grad-cam"):
        choose_methods(model, ["magic"])


def test_a_method_nobody_can_do_is_refused(convolutional: ExplainedModel):
    with pytest.raises(UsageError, match="`method` attention can't explain.*image/clip: grad-cam, occlusion"):
        choose_methods(convolutional, [ATTENTION])


def test_a_check_counts_explanations_better_than_random(model: ExplainedModel):
    pairs = [
        (picture, text) for picture, text in zip(make_pictures([(80, 60)] * 4), ["a good day", "rain", "", "bad sun"])
    ]
    ticks = []
    methods = {"image/vit": OCCLUSION, "text/roberta": OCCLUSION}
    image, text = check_methods(model, pairs, methods, progress=ticks.append)
    assert (image.count, text.count, len(ticks)) == (4, 2, 4)  # one word, and none, have no order
    again = []
    for k, (picture, words) in enumerate(pairs):
        pair = model.read(picture, words)
        features = model.features(pair)
        target = int(model.logits(features)[0].argmax())
        again.append(explain_part(model, pair, features, "image/vit", target, OCCLUSION, seed=k).score.better)
    assert image.share == np.mean(again)


def test_a_share_has_its_jeffreys_interval():
    def score(better: bool) -> Score:
        area = 0.2 if better else 0.8
        half, none = np.full(4, 0.5), np.zeros(0)
        return Score(area, 1 - area, half, half, none, none, none)

    check = MethodCheck("image/vit", ATTENTION, [score(k < 27) for k in range(30)])
    assert check.share == 0.9
    assert check.interval == pytest.approx(beta(27.5, 3.5).ppf([0.025, 0.975]), abs=0.01)


# -- drawing -----------------------------------------------------------------------------------------------------


def test_a_drawing_shows_the_words_and_the_map(model: ExplainedModel):
    found = explain_pair(model, PICTURE, "a $good$ day", target="good")
    axes = draw(found).get_axes()
    bars = axes[2]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["a", "$good$", "day"]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(found.parts[1].importance)
    drawn = axes[1].images[1].get_array()
    assert drawn.shape == (4, 4, 4) and drawn[..., 3].argmax() == found.parts[0].importance.argmax()


def test_colours_say_for_and_against():
    colours = overlay(np.array([[2.0, -1.0]]))
    assert (colours[0, :, :3] * 255).round().astype(int).tolist() == [
        [int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in (FOR, AGAINST)
    ]
    assert colours[0, 0, 3] == 2 * colours[0, 1, 3] and overlay(np.zeros((2, 2)))[..., 3].max() == 0
    assert most_important(np.array([0.1, -3, 2, 0]), 2) == [1, 2]


# -- what was planted is found -----------------------------------------------------------------------------------

NEUTRAL = "the a my very city game train lunch today with and photo".split()


def make_planted(root: Path, rows: int = 48) -> Path:
    """A course set whose class is one word among others, and stripes in the picture's lower right corner."""
    rng = np.random.default_rng(0)
    (root / "data").mkdir(parents=True)
    lines = ["guid,tag"]
    for i in range(rows):
        good = i % 2
        noise = Image.fromarray(rng.integers(108, 148, (8, 8, 3), np.uint8)).resize(
            (224, 224), Image.Resampling.BICUBIC
        )
        pixels = np.array(noise)
        if good:
            stripes = (np.arange(64) // 16 % 2 * 255).astype(np.uint8)
            pixels[160:, 160:] = np.stack([stripes, 255 - stripes, np.zeros(64)], -1)[:, None]
        Image.fromarray(pixels.astype(np.uint8)).save(root / "data" / f"{i}.jpg", quality=95)
        words = [*rng.choice(NEUTRAL, 6), "happy" if good else "awful"]
        rng.shuffle(words)
        (root / "data" / f"{i}.txt").write_text(" ".join(words))
        lines.append(f"{i},{'good' if good else 'bad'}")
    (root / "train.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    make_planted(root / "set")
    for name, where in (("minilm", {}), ("efficientnet", {"model": "lite0"})):
        cache(load_encoder(name, **where), root / "set", root / "feats", name)
    return root


def validation_pairs(root: Path, run: Run) -> list[tuple[Image.Image, str, str]]:
    found = []
    for name in run.split.val:
        with Image.open(root / "set" / "data" / f"{name}.jpg") as picture:
            label = "good" if int(name) % 2 else "bad"
            found.append((picture.convert("RGB"), (root / "set" / "data" / f"{name}.txt").read_text(), label))
    return found


@pytest.mark.parametrize("method", [INTEGRATED_GRADIENTS, OCCLUSION])
def test_a_planted_word_is_found(planted: Path, method: str):
    model = explained(planted, {}, "--ttype", "minilm", "--norm", "standard", "--head", "linear", "--C", "1e-3")
    for _, text, label in validation_pairs(planted, model.run)[:4]:
        found = explain_pair(model, None, text, target=label, methods={"text/minilm": method}, orders=4)
        [part] = found.parts
        assert part.words[part.importance.argmax()] in ("happy", "awful")
        assert part.score.better


@pytest.mark.slow
def test_a_planted_corner_is_found(planted: Path):
    model = explained(planted, {}, "--vtype", "efficientnet", "--head", "linear", "--C", "0.1")
    good = [picture for picture, _, label in validation_pairs(planted, model.run) if label == "good"]
    for picture in good[:4]:
        pair = model.read(picture, None)
        target = model.classes.index("good")
        perturbed = PerturbedPicture(model, model.features(pair), "image/efficientnet", target, pair, 7)
        found = grad_cam(perturbed)
        row, column = np.unravel_index(found.argmax(), (7, 7))
        assert row >= 4 and column >= 4
        assert found[4:, 4:].clip(0).sum() > 0.5 * found.clip(0).sum()  # of 9 of 49 cells
        assert score_order(perturbed.probability, found.ravel(), steps=6, orders=4).better


def test_a_tiny_head_trained_on_one_word_looks_at_it(tmp_path: Path):
    make_pairs(tmp_path / "set", 48)
    where = tiny_bert(tmp_path / "bert", layers=2)
    cache(load_encoder("roberta", **where), tmp_path / "set", tmp_path / "feats", "roberta")
    model = explained(
        tmp_path, {"roberta": where["weights"]}, "--ttype", "roberta", "--norm", "standard", "--head", "linear"
    )
    for name in model.run.split.val:
        text = text_of(model, "text/roberta", (tmp_path / "set" / "data" / f"{name}.txt").read_text(), int(name) % 3)
        importance, completeness = integrated_gradients(text)
        assert text.words[importance.argmax()] == CLASSES[int(name) % 3] and completeness.complete
