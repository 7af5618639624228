"""Every head of the registry: shapes, gradients, learning, saving, ablation, and what the studies say of single ones."""

import re
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from stacked import give
from tensors import normal
from torch import Tensor, nn

from feats.errors import UsageError
from modeling.features.inputs import Inputs
from modeling.features.joined import Ragged
from modeling.heads.base import Batch, Head, HeadConfig, n_parameters
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
@pytest.mark.parametrize("name", HEADS)
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
        "cross_attention": (v + t) * D + 2 * 2 * D + 2 * (D + 1) * 3 * D + (2 * D + 1) * C,
        "concat": classifier(v + t),
        "weighted_sum": common + 2 + classifier(width),
        "attention": common + attention + classifier(width),
        "attention_linear": common + attention + (width + 1) * C,
        "early": (v + t + 1) * D + (D + 1) * C,
        "mlp": (v + t + 1) * D + (D + 1) * C,
        "late": (v + 1 + t + 1) * D + 2 * (D + 1) * C,
        "clip_match": common + (4 * width + 2) * D + (D + 1) * C,
        "late_512": (v + 1 + t + 1) * 512 + 1025 * C,
        "query_attention": (v + 1) * t + 4 * (t + 1) * t + (t + 1) * C,
        "linear": (v + t + 1) * C,
        "vilbert": common + 2 * (12 * width + 13) * width + (2 * width + 1) * 2 * D + (2 * D + 1) * C,
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


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return x @ layer.weight[0].T + layer.bias[0]


@pytest.mark.parametrize("positions", [False, True])
def test_coattention_is_four_routes_added(positions: bool):
    widths, batch = WIDTHS["odd"], make_batch(WIDTHS["odd"])
    head = shake(build_head(HeadConfig("coattention", D=8, image_positions=positions), widths, 3)).eval()
    image, text = (linear(head.project[s], getattr(batch, f"{s}_tokens")[0]) for s in ("image", "text"))
    image = image + head.positions[0] if positions else image
    mask = batch.text_mask[0]
    last = (torch.arange(len(mask)), mask.sum(1) - 1)
    read = attend(head.text_to_image, text, image)
    seen = attend(head.image_to_text, image, text, mask)
    routes = [
        text[last],
        attend(head.self_image, image, image).mean(1),
        attend(head.self_text_to_image, read, read, mask)[last],
        attend(head.self_image_to_text, seen, seen).mean(1),
    ]
    torch.testing.assert_close(head(batch)[0], linear(head.out, sum(routes)), rtol=1e-4, atol=1e-5)
    turned = Batch(**vars(batch) | {"image_tokens": batch.image_tokens.flip(2)})
    assert torch.allclose(head(turned), head(batch), atol=1e-5) != positions  # without them, a set of tokens


def test_coattention_does_not_see_how_long_other_texts_are():
    widths, batch = WIDTHS["odd"], make_batch(WIDTHS["odd"])
    head = shake(build_head(HeadConfig("coattention", D=8), widths, 3)).eval()
    longer = Batch(
        **vars(batch)
        | {"text_tokens": F.pad(batch.text_tokens, (0, 0, 0, 3)), "text_mask": F.pad(batch.text_mask, (0, 3))}
    )
    torch.testing.assert_close(head(longer), head(batch), rtol=1e-5, atol=1e-6)


def test_coattention_of_texts_without_a_token():
    """The same whether other texts of the batch have tokens or not."""
    inputs = Inputs(image_tokens=normal(3, 4, 7), text_tokens=Ragged(normal(2, 3, seed=1), torch.tensor([0, 0, 2, 2])))
    head = shake(build_head(HeadConfig("coattention", D=8), inputs.widths, 3)).eval()
    every = head(inputs.batch(torch.tensor([[0, 1, 2]])))
    assert every.isfinite().all()
    torch.testing.assert_close(head(inputs.batch(torch.tensor([[0, 2]]))), every[:, [0, 2]], rtol=1e-5, atol=1e-6)


def test_cross_attention_is_attention_over_two_positions():
    widths = vectors_only(WIDTHS["odd"])
    head, batch = shake(build_head(HeadConfig("cross_attention", D=16), widths, 3)).eval(), make_batch(WIDTHS["odd"])
    sides = {side: head.project[side](batch.of(side)) for side in ("image", "text")}
    q, k, v = (
        torch.stack(
            [x[0] @ head.qkv[s].weight[0, cut].T + head.qkv[s].bias[0, cut] for s, x in sides.items()], 1
        ).unflatten(-1, (8, 2))
        for cut in (slice(0, 16), slice(16, 32), slice(32, 48))
    )
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    expected = linear(head.out, mixed.transpose(1, 2).flatten(1))
    torch.testing.assert_close(head(batch)[0], expected, rtol=1e-4, atol=1e-5)


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


def test_clip_match_compares_directions():
    widths, batch = vectors_only(WIDTHS["equal"]), make_batch(WIDTHS["equal"])
    head = build_head(HeadConfig("clip_match", D=8), widths, 3).eval()
    image, text = F.normalize(batch.image, dim=-1), F.normalize(batch.text, dim=-1)
    cosine = F.cosine_similarity(batch.image, batch.text, dim=-1)[..., None]
    expected = head.mlp(torch.cat([text, image, text - image, image * text, cosine], -1))
    torch.testing.assert_close(head(batch), expected)


def test_late_is_the_mean_of_two_classifiers():
    widths, batch = vectors_only(WIDTHS["odd"]), make_batch(WIDTHS["odd"])
    head = build_head(HeadConfig("late", D=8), widths, 3).eval()
    both = head(batch)
    parts = [head.classifiers[side](batch.of(side)) for side in ("image", "text")]
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2)


def test_query_attention_reads_the_text_only_through_image_tokens():
    """Study E's with one key: softmax over a single score is 1, so the text has no say."""
    widths, batch = WIDTHS["odd"], make_batch(WIDTHS["odd"])
    other = Batch(**vars(batch) | {"text": batch.text.flip(1)})
    with_vectors = shake(build_head(HeadConfig("query_attention"), vectors_only(widths), 3)).eval()
    assert torch.equal(with_vectors(other), with_vectors(batch))
    with_tokens = shake(build_head(HeadConfig("query_attention"), widths, 3)).eval()
    assert (with_tokens(other) - with_tokens(batch)).abs().max() > 1e-3


class PlainVilbert(nn.Module):
    """Study B's two-token encoder, of vectors of one width."""

    def __init__(self, width: int, D: int):
        super().__init__()
        layer = {"dim_feedforward": 4 * width, "activation": "gelu", "batch_first": True}
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(width, 6, **layer) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(2 * width, 2 * D), nn.ReLU(), nn.Dropout(), nn.Linear(2 * D, 3))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = torch.stack([image, text], 1)
        for layer in self.encoder:
            x = layer(x)
        return self.mlp(torch.cat([x[:, 0], x[:, 1]], 1))


@pytest.mark.parametrize("m", [0, 1])
def test_vilbert_equals_torch_s_transformer(m: int):
    batch = make_batch(WIDTHS["equal"], 2)
    head = shake(build_head(HeadConfig("vilbert", D=5), vectors_only(WIDTHS["equal"]), 3, [0, 1])).eval()
    plain = PlainVilbert(6, 5).eval()
    for ours, theirs in [*zip(head.layers, plain.encoder), (head.mlp[0], plain.mlp[0]), (head.mlp[3], plain.mlp[3])]:
        give(ours, m, theirs)
    assert n_parameters(head) == sum(p.numel() for p in plain.parameters())
    torch.testing.assert_close(head(batch)[m], plain(batch.image[m], batch.text[m]), rtol=1e-4, atol=1e-5)


class PlainCrossModal(nn.Module):
    """Study B's cross-modal attention, one pair at a time: nothing to mask."""

    def __init__(self, image: int, text: int, D: int):
        super().__init__()
        self.project = nn.ModuleDict({"image": nn.Linear(image, D), "text": nn.Linear(text, D)})
        self.attention = nn.ModuleDict({side: nn.MultiheadAttention(D, 8) for side in self.project})
        self.norm = nn.ModuleDict({side: nn.LayerNorm(D) for side in self.project})
        self.mlp = nn.Sequential(nn.Linear(2 * D, D), nn.ReLU(), nn.Dropout(), nn.Linear(D, 3))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image, text = self.project["image"](image), self.project["text"](text)
        seen = self.norm["image"](image + self.attention["image"](image, text, text)[0])
        read = self.norm["text"](text + self.attention["text"](text, image, image)[0])
        return self.mlp(torch.cat([seen.mean(0), read.mean(0)]))


@pytest.mark.parametrize("m", [0, 1])
def test_cross_modal_equals_torch_s_attention(m: int):
    widths, batch = WIDTHS["odd"], make_batch(WIDTHS["odd"], 2)
    head = shake(build_head(HeadConfig("cross_modal", D=16), widths, 3, [0, 1])).eval()
    plain = PlainCrossModal(7, 3, 16).eval()
    pairs = [(head.mlp[0], plain.mlp[0]), (head.mlp[3], plain.mlp[3])]
    for part in ("project", "attention", "norm"):
        pairs += [(getattr(head, part)[side], getattr(plain, part)[side]) for side in ("image", "text")]
    for ours, theirs in pairs:
        give(ours, m, theirs)
    assert n_parameters(head) == sum(p.numel() for p in plain.parameters())
    rows = zip(batch.image_tokens[m], batch.text_tokens[m], batch.text_mask[m])
    expected = torch.stack([plain(image, text[mask]) for image, text, mask in rows])
    torch.testing.assert_close(head(batch)[m], expected, rtol=1e-4, atol=1e-5)


def test_cross_modal_on_one_side_attends_to_itself():
    widths, batch = WIDTHS["odd"], make_batch(WIDTHS["odd"])
    for side in ("image", "text"):
        head = shake(build_head(HeadConfig("cross_modal", D=16, sides=(side,)), widths, 3)).eval()
        rows = []
        for row, mask in zip(batch.of(f"{side}_tokens")[0], batch.text_mask[0]):
            x = linear(head.project[side], row[mask] if side == "text" else row)[None]
            mixed = F.layer_norm(x + attend(head.attention[side], x, x), (16,))
            rows.append((mixed[0] * head.norm[side].weight[0] + head.norm[side].bias[0]).mean(0))
        expected = linear(head.mlp[3], linear(head.mlp[0], torch.stack(rows)).relu())
        torch.testing.assert_close(head(batch)[0], expected, rtol=1e-4, atol=1e-5)


def test_cross_modal_of_a_text_without_a_token():
    inputs = Inputs(image_tokens=normal(3, 4, 7), text_tokens=Ragged(normal(2, 3, seed=1), torch.tensor([0, 0, 2, 2])))
    head = shake(build_head(HeadConfig("cross_modal", D=8), inputs.widths, 3)).eval()
    every = head(inputs.batch(torch.tensor([[0, 1, 2]])))
    assert every.isfinite().all()


class PlainEarlyPlane(nn.Module):
    """Study E's early fusion of pictures (B, 3, 20, 20); without `text`, of the pictures alone."""

    def __init__(self, text: int, D: int):
        super().__init__()
        self.to_plane = nn.Linear(text, 400) if text else None
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(4 if text else 3, D // 4, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2)),  # 20 to 10 and 5
            *(nn.Conv2d(D // 4, D // 2, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),  # to 3 and 2
            *(nn.Conv2d(D // 2, D, 3, 2, 1), nn.ReLU()),  # to 1
        )
        self.out = nn.Linear(D, 3)

    def forward(self, pictures: Tensor, text: Tensor) -> Tensor:
        planes = [pictures] + ([self.to_plane(text).view(-1, 1, 20, 20)] if self.to_plane else [])
        return self.out(self.convolutions(torch.cat(planes, 1)).flatten(1))


@pytest.mark.parametrize("sides", [("image", "text"), ("image",)])
@pytest.mark.parametrize("m", [0, 1])
def test_early_plane_equals_a_plain_net(m: int, sides: tuple[str, ...]):
    pictures, text = normal(2, 21, 3, 20, 20), normal(2, 21, 13, seed=1)
    widths = {"image": 3, "text": 13, "image_tokens": 3, "image_positions": 400}
    head = shake(build_head(HeadConfig("early_plane", D=8, dropout=0.0, sides=sides), widths, 3, [0, 1]))
    plain = PlainEarlyPlane(13 if "text" in sides else 0, 8)
    pairs = [(head.stages[i], plain.convolutions[i]) for i in (0, 3, 6)] + [(head.out, plain.out)]
    for ours, theirs in [*pairs, *([(head.to_plane, plain.to_plane)] if "text" in sides else [])]:
        give(ours, m, theirs)
    assert n_parameters(head) == sum(p.numel() for p in plain.parameters())
    batch = Batch(text=text, image_tokens=pictures.flatten(3).transpose(2, 3))  # pixels row by row
    expected = plain(pictures[m], text[m])
    for mode in (True, False):
        torch.testing.assert_close(head.train(mode)(batch)[m], expected, rtol=1e-4, atol=1e-5)


def test_early_plane_of_the_text_alone_has_the_picture_s_usual_size():
    head = build_head(HeadConfig("early_plane", D=4, sides=("text",)), {"text": 13}, 3)
    assert head.to_plane.weight.shape == (1, 224 * 224, 13) and head.stages[0].weight.shape == (1, 1, 1, 3, 3)
    assert head.out.weight.shape == (1, 3, 4 * 4 * 4)  # 224 to 56, 14 and 4


# -- configuration ----------------------------------------------------------------------------------------------


def test_a_head_s_own_dropout():
    assert HeadConfig("concat").resolved().dropout == 0.5 and HeadConfig("fusion").resolved().dropout == 0.3
    assert HeadConfig("concat", dropout=0.0).resolved().dropout == 0.0
    assert HeadConfig("late", dropout=0.2).resolved() == HeadConfig("late", dropout=0.2)


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
