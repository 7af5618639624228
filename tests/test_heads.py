"""Every head of the registry: shapes, gradients, learning, saving, ablation, and what the studies say of single ones."""

import re
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from tensors import normal
from torch import Tensor, nn

from feats.errors import UsageError
from modeling.features.inputs import Inputs
from modeling.features.joined import Ragged
from modeling.heads.base import Batch, Head, n_parameters
from modeling.heads.config import ATTENTION_NORMS, HeadConfig
from modeling.heads.registry import HEADS, build_head
from modeling.training.config import TrainConfig
from modeling.training.fit import fit
from modeling.training.problem import Problem

WIDTHS = {
    "equal": {"image": 6, "text": 6, "image_tokens": 6, "image_positions": 4, "text_tokens": 6, "support": 4},
    "odd": {"image": 5, "text": 13, "image_tokens": 7, "image_positions": 4, "text_tokens": 3, "support": 4},
}


def make_batch(widths: dict[str, int], n_models: int = 1, rows: int = 9) -> Batch:
    """Texts of 1 to 5 tokens, the longest of all is not the first."""
    lengths = (torch.arange(n_models * rows).view(n_models, rows) * 2 + 1) % 5 + 1
    mask = torch.arange(5) < lengths[..., None]
    return Batch(
        image=normal(n_models, rows, widths["image"], seed=1),
        text=normal(n_models, rows, widths["text"], seed=2),
        image_tokens=normal(n_models, rows, widths["image_positions"], widths["image_tokens"], seed=3),
        text_tokens=normal(n_models, rows, 5, widths["text_tokens"], seed=4) * mask[..., None],
        text_mask=mask,
    )


def vectors_only(widths: dict[str, int]) -> dict[str, int]:
    return {side: widths[side] for side in ("image", "text")}


@torch.no_grad()
def shake(head: Head) -> Head:
    """Random parameters everywhere: fresh ones hide what zeros and ones of norms, gates and positions do."""
    for i, parameter in enumerate(head.parameters()):
        parameter.add_(normal(*parameter.shape, seed=100 + i) * 0.2)
    if head.config.head == "kernel":
        head.support.copy_(normal(*head.support.shape))
        head.gamma.fill_(0.1)
    return head


def constant(config: HeadConfig, name: str, widths: dict[str, int]) -> bool:
    """Whether a parameter's gradient is 0 by mathematics: softmax doesn't see what all its arguments share, so a key's
    bias has no effect, and of a single key nothing but its value has."""
    lone = {"attention", "attention_linear", "gated_transformer", "vilbert"} if len(config.sides) == 1 else set()
    if "image_tokens" not in widths or config.sides == ("text",):
        lone.add("query_attention")
    if config.head in lone and re.search(r"\b(query|key)\.", name):
        return True
    return name.endswith("key.bias") or (name == "mix" and len(config.sides) == 1)


def check_gradients(head: Head, batch: Batch, widths: dict[str, int]) -> None:
    """Every parameter of every model has one, and not 0."""
    n_classes = head(batch).shape[-1]
    labels = torch.arange(batch.text.shape[1]) % n_classes
    head.zero_grad()
    sum(F.cross_entropy(logits, labels) for logits in head.train()(batch)).backward()
    for name, parameter in head.named_parameters():
        for model in parameter.grad.flatten(1).abs().amax(1):
            if constant(head.config, name, widths):
                assert model < 1e-6, name
            else:
                assert model > 1e-6, name


@pytest.mark.parametrize("n_classes", [2, 3, 17])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", HEADS)
def test_shape_gradients_and_saving(name: str, width: str, n_classes: int):
    config, widths = HeadConfig(name, D=9, dropout=0.0), WIDTHS[width]
    head, batch = shake(build_head(config, widths, n_classes, [4, 1])), make_batch(widths, 2)
    assert head(batch).shape == (2, 9, n_classes)
    check_gradients(head, batch, widths)
    logits = head.eval()(batch)  # a training step has moved the running statistics from where they start
    other = build_head(config, widths, n_classes, [7, 8]).eval()
    assert not torch.allclose(other(batch), logits)
    other.load_state_dict(load(save(head.state_dict())))
    assert torch.equal(other(batch), logits)


@pytest.mark.parametrize("side, absent", [("text", "image"), ("image", "text")])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", HEADS)
def test_ablation_ignores_the_absent_side(name: str, width: str, side: str, absent: str):
    widths = WIDTHS[width]
    batch = make_batch(widths)
    of_side = [f.name for f in fields(Batch) if f.name.startswith(absent) and f.name != "text_mask"]
    nans = Batch(**vars(batch) | {n: torch.full_like(getattr(batch, n), torch.nan) for n in of_side})
    none = Batch(**vars(batch) | dict.fromkeys([*of_side, *(["text_mask"] if absent == "text" else [])]))
    without = {n: w for n, w in widths.items() if not n.startswith(absent)}
    config = HeadConfig(name, D=9, dropout=0.0, sides=(side,))
    head = shake(build_head(config, widths, 3)).eval()
    logits = head(batch)
    assert logits.shape == (1, 9, 3) and torch.equal(head(nans), logits) and torch.equal(head(none), logits)
    alone = build_head(config, without, 3).eval()  # the same shape where the side was never there
    alone.load_state_dict(head.state_dict())
    assert torch.equal(alone(none), logits)
    check_gradients(head, batch, widths)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "kernel"])  # which isn't drawn from a seed
def test_a_stack_holds_what_its_models_are_alone(name: str):
    config, widths = HeadConfig(name, D=8), WIDTHS["odd"]
    stack, batch = build_head(config, widths, 3, [5, 3, 8]).eval(), make_batch(widths, 3)
    for m, seed in enumerate((5, 3, 8)):
        alone = build_head(config, widths, 3, [seed]).eval()
        own = Batch(**{f.name: getattr(batch, f.name)[m : m + 1] for f in fields(Batch)})
        torch.testing.assert_close(stack(batch)[m], alone(own)[0], rtol=1e-5, atol=1e-6)
        assert n_parameters(alone) == n_parameters(stack)
    same_rows = stack(make_batch(widths).expand(3))
    assert not torch.allclose(same_rows[0], same_rows[1]) and not torch.allclose(same_rows[1], same_rows[2])


# -- learning ---------------------------------------------------------------------------------------------------


def toy(image_shows: list[int], text_shows: list[int], tokens: bool = True) -> Problem:
    """Three classes; of each side's features, those named raise a column of their own. Tokens show the same."""
    n, labels = 300, torch.arange(300) % 3
    shown = {"image": image_shows, "text": text_shows}
    vectors, sequences = {}, {}
    for i, (side, width) in enumerate((("image", 5), ("text", 13))):
        signal = torch.zeros(n, width)
        signal[:, -1] = 1.0  # so that a vector's direction tells what its length does
        for c in shown[side]:
            signal[labels == c, c] = 2.0
        vectors[side] = signal + normal(n, width, seed=i) * 0.3
        sequences[side] = signal[:, None] + normal(n, 4, width, seed=2 + i) * 0.3
    offsets = torch.arange(n + 1) * 4
    extra = {"image_tokens": sequences["image"], "text_tokens": Ragged(sequences["text"].flatten(0, 1), offsets)}
    inputs = Inputs(**vectors, **extra) if tokens else Inputs(**vectors)
    train, val = torch.arange(100), torch.arange(100, n)
    return Problem(inputs, labels, train, val, ["a", "b", "c"], folds=train // 50)


def learnt(name: str, problem: Problem, sides: tuple[str, ...] = ("image", "text")) -> float:
    config = TrainConfig(HeadConfig(name, D=32, sides=sides), lr=1e-2, ep=12, bs=25, monitor="loss", seed=0)
    (trained,) = fit([config], problem)
    return (trained.val_logits.argmax(1) == problem.labels[problem.val].numpy()).mean()


@pytest.mark.parametrize("name", [name for name in HEADS if name != "query_attention"])  # see its own test below
def test_learns_from_both_sides(name: str):
    """Neither side knows two of the classes apart, so a head that reads one only can't do it."""
    problem = toy([0], [2], tokens=bool(HEADS[name].tokens))
    assert learnt(name, problem) >= 0.9
    assert learnt(name, problem, sides=("text",)) < 0.85 and learnt(name, problem, sides=("image",)) < 0.85


@pytest.mark.parametrize("side", ["text", "image"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "early_plane" else name for name in HEADS]
)
def test_learns_from_one_side(name: str, side: str):
    assert learnt(name, toy([0, 1, 2], [0, 1, 2]), (side,)) >= 0.95


# -- single heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 17])
@pytest.mark.parametrize("v, t, D", [(5, 13, 8), (6, 6, 4)])
def test_parameter_counts(v: int, t: int, D: int, n_classes: int):
    C, width, common = n_classes, v if v == t else D, 0 if v == t else (v + 1) * D + (t + 1) * D
    attention, classifier = 4 * (width + 1) * width, lambda n: (n + 1) * D + 2 * D + (D + 1) * C
    expected = {
        "fusion": (v + t) * D + 2 * 2 * D + (2 * D + 1) * C,  # BatchNorm's shift is the projection's bias
        "cross_attention": (v + t) * D + 2 * 2 * D + (2 * 3 + 4) * (D + 1) * D + (2 * D + 1) * C,
        "concat": classifier(v + t),
        "weighted_sum": common + 2 + classifier(width),
        "attention": common + attention + classifier(width),
        "attention_linear": common + attention + (width + 1) * C,
        "early": (v + t + 1) * D + (D + 1) * C,
        "mlp": (v + t + 1) * D + (D + 1) * C,
        "late": (v + 1 + t + 1) * C,
        "clip_match": common + (4 * width + 2) * D + (D + 1) * C,
        "late_512": (v + 1 + t + 1) * 512 + 1025 * 512 + 513 * C,
        "query_attention": (v + 1) * t + 4 * (t + 1) * t + (t + 1) * C,
        "linear": (v + t + 1) * C,
        "vilbert": (v + 1) * t + 2 * (12 * t + 13) * t + (t + 1) * D + (D + 1) * C,
        "gated_transformer": common
        + 3 * (12 * width + 13) * width
        + (2 * width + 1) * width
        + 2 * width
        + (width + 1) * D
        + (D + 1) * (D // 2)
        + (D // 2 + 1) * C,
    }
    for name, count in expected.items():
        assert n_parameters(build_head(HeadConfig(name, D), {"image": v, "text": t}, C, [0, 1])) == count, name


@torch.no_grad()
def attend(layer: nn.Module, query: Tensor, key: Tensor, present: Tensor | None = None) -> Tensor:
    """Model 0's attention by torch's module."""
    reference = nn.MultiheadAttention(query.shape[-1], layer.n_heads, batch_first=True)
    parts = layer.query, layer.key, layer.value
    reference.in_proj_weight.copy_(torch.cat([part.weight[0] for part in parts]))
    reference.in_proj_bias.copy_(torch.cat([part.bias[0] for part in parts]))
    reference.out_proj.weight.copy_(layer.out.weight[0])
    reference.out_proj.bias.copy_(layer.out.bias[0])
    return reference(query, key, key, None if present is None else ~present)[0]


@pytest.mark.parametrize("norm", ATTENTION_NORMS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_coattention_does_not_see_how_long_other_texts_are(norm: str, training: bool):
    widths, batch = WIDTHS["odd"], make_batch(WIDTHS["odd"])
    head = shake(build_head(HeadConfig("coattention", D=8, dropout=0.0, attention_norm=norm), widths, 3))
    head.train(training)
    longer = Batch(
        **vars(batch)
        | {"text_tokens": F.pad(batch.text_tokens, (0, 0, 0, 3)), "text_mask": F.pad(batch.text_mask, (0, 3))}
    )
    torch.testing.assert_close(head(longer), head(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions, differ", [("none", False), ("learnable", True), ("absolute", True)])
def test_only_with_positions_the_order_of_image_tokens_counts(positions: str, differ: bool):
    widths, batch = WIDTHS["odd"], make_batch(WIDTHS["odd"])
    head = shake(build_head(HeadConfig("coattention", D=9, image_positions=positions), widths, 3)).eval()
    turned = Batch(**vars(batch) | {"image_tokens": batch.image_tokens.flip(2)})
    assert torch.allclose(head(turned), head(batch), atol=1e-5) != differ


@pytest.mark.parametrize(
    "other", [{"attention_norm": "batch", "image_positions": "absolute"}, {"image_pooling": "last"}]
)
def test_coattention_s_options_train_alike_alone_and_in_a_stack(other: dict[str, str]):
    problem = toy([0, 1, 2], [0, 1, 2])
    config = TrainConfig(HeadConfig("coattention", D=8, **other), lr=1e-2, ep=2, bs=33)
    configs = [replace(config, seed=seed) for seed in (5, 3)]
    found = fit(configs, problem)
    for config, together in zip(configs, found, strict=True):
        (alone,) = fit([config], problem)
        torch.testing.assert_close(
            torch.from_numpy(together.val_logits), torch.from_numpy(alone.val_logits), rtol=1e-4, atol=1e-4
        )
    assert abs(found[0].val_logits - found[1].val_logits).max() > 1e-2


def test_coattention_of_texts_without_a_token():
    """The same whether other texts of the batch have tokens or not."""
    inputs = Inputs(image_tokens=normal(3, 4, 7), text_tokens=Ragged(normal(2, 3, seed=1), torch.tensor([0, 0, 2, 2])))
    head = shake(build_head(HeadConfig("coattention", D=8), inputs.widths, 3)).eval()
    every = head(inputs.batch(torch.tensor([[0, 1, 2]])))
    assert every.isfinite().all()
    torch.testing.assert_close(head(inputs.batch(torch.tensor([[0, 2]]))), every[:, [0, 2]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["attention", "attention_linear"])
def test_attention_s_fused_vector_and_weights(name: str, width: str):
    widths, batch = WIDTHS[width], make_batch(WIDTHS[width])
    head = shake(build_head(HeadConfig(name, D=8), widths, 3)).eval()
    fused, weights = head.fused(batch)
    sides = torch.stack([x[0] for x in head.common(batch)], 1)
    torch.testing.assert_close(fused[0], attend(head.attention, sides, sides).mean(1), rtol=1e-4, atol=1e-5)
    n = head.attention.n_heads
    assert weights.shape == (1, 9, n, 2, 2) and n == {"equal": 6, "odd": 8}[width]
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 9, n, 2))
    assert torch.equal(head.classifier(fused), head(batch))


def test_weighted_sum_starts_equal_and_tells_its_weights():
    widths, batch = vectors_only(WIDTHS["equal"]), make_batch(WIDTHS["equal"])
    head = build_head(HeadConfig("weighted_sum", D=8), widths, 3, [0, 1]).eval()
    assert {name: x.tolist() for name, x in head.scalars().items()} == {
        "weight_image": [0.5, 0.5],
        "weight_text": [0.5, 0.5],
    }
    with torch.no_grad():
        head.mix[1] = torch.tensor([0.0, 3.0])
    share = torch.tensor([0.0, 3.0]).softmax(0)
    assert head.scalars()["weight_text"].tolist() == pytest.approx([0.5, share[1].item()])
    mixed = share[0] * batch.image + share[1] * batch.text
    expected = head.classifier(mixed.expand(2, -1, -1))[1]
    torch.testing.assert_close(head(batch.expand(2))[1], expected)


def test_query_attention_reads_the_text_only_through_image_tokens():
    """Study E's with one key: softmax over a single score is 1, so the text has no say."""
    widths, batch = WIDTHS["odd"], make_batch(WIDTHS["odd"])
    other = Batch(**vars(batch) | {"text": batch.text.flip(1)})
    with_vectors = shake(build_head(HeadConfig("query_attention"), vectors_only(widths), 3)).eval()
    assert torch.equal(with_vectors(other), with_vectors(batch))
    with_tokens = shake(build_head(HeadConfig("query_attention"), widths, 3)).eval()
    assert (with_tokens(other) - with_tokens(batch)).abs().max() > 1e-3


def test_cross_modal_of_a_text_without_a_token():
    inputs = Inputs(image_tokens=normal(3, 4, 7), text_tokens=Ragged(normal(2, 3, seed=1), torch.tensor([0, 0, 2, 2])))
    head = shake(build_head(HeadConfig("cross_modal", D=8), inputs.widths, 3)).eval()
    every = head(inputs.batch(torch.tensor([[0, 1, 2]])))
    assert every.isfinite().all()


def test_early_plane_of_the_text_alone_has_the_picture_s_usual_size():
    head = build_head(HeadConfig("early_plane", D=4, sides=("text",)), {"text": 13}, 3)
    assert head.to_plane.weight.shape == (1, 224 * 224, 13) and head.stages[0].weight.shape == (1, 1, 1, 3, 3)
    assert head.out.weight.shape == (1, 3, 4 * 4 * 4)  # 224 to 56, 14 and 4


# -- configuration ----------------------------------------------------------------------------------------------


def test_a_head_s_own_dropout():
    assert HeadConfig("concat").resolved().dropout == 0.5 and HeadConfig("fusion").resolved().dropout == 0.3
    assert HeadConfig("concat", dropout=0.0).resolved().dropout == 0.0
    assert HeadConfig("late", dropout=0.2).resolved() == HeadConfig("late", dropout=0.2)


def test_a_head_s_own_layers():
    assert HeadConfig("gated_transformer").resolved().layers == 3
    assert HeadConfig("gated_transformer", layers=1).resolved().layers == 1
    assert HeadConfig("early").resolved().layers is None


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"head": "fusoin"}, "unknown head 'fusoin'; did you mean fusion. .there are fusion, "),
        ({"head": "xyz"}, r"unknown head 'xyz' \(there are"),
        ({"D": 0}, "D=0: the width of a head must be 1 or more"),
        ({"dropout": 1.0}, "dropout 1: expected 0 <= dropout < 1"),
        ({"dropout": -0.5}, "dropout -0.5"),
        ({"sides": ("image", "sound")}, "sides image, sound: expected image, text or both"),
        ({"sides": ()}, "sides .none.: expected image, text or both"),
        ({"layers": 0}, "`layers` 0: expected 1 or more"),
        ({"attention_norm": "group"}, "`attention_norm` group: expected one of layer, batch, none"),
        ({"image_positions": "yes"}, "`image_positions` yes: expected one of none, learnable, absolute"),
        ({"image_pooling": "first"}, "`image_pooling` first: expected one of mean, last"),
    ],
)
def test_configurations_that_make_no_head(wrong: dict, match: str):
    with pytest.raises(UsageError, match=match):
        HeadConfig(**wrong)


@pytest.mark.parametrize(
    "config, widths, match",
    [
        (HeadConfig("fusion"), {"text": 5}, "head fusion needs image features, and there are text"),
        (HeadConfig("concat", sides=("text",)), {"image": 5}, "head concat needs text features, and there are image"),
        (HeadConfig("coattention"), {"image": 5, "text": 5}, "head coattention needs image tokens features"),
        (HeadConfig("coattention", sides=("text",)), {"text": 5}, "head coattention needs text tokens features"),
        (HeadConfig("early_plane"), {"image": 5, "text": 5}, "head early_plane needs image tokens features"),
        (HeadConfig("early_plane"), {"image_tokens": 3, "image_positions": 4}, "head early_plane needs text features"),
        (
            HeadConfig("early_plane"),
            {"image_tokens": 3, "image_positions": 49 * 2, "text": 5},
            "head early_plane needs square pictures, and there are 98 image tokens; use the encoder pixels",
        ),
        (HeadConfig("linear"), {}, "needs image features, and there are none"),
    ],
)
def test_features_that_lack_what_a_head_needs(config: HeadConfig, widths: dict[str, int], match: str):
    with pytest.raises(UsageError, match=match):
        build_head(config, widths, 3)
