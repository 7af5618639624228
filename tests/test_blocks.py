"""Encoders as stacks of blocks: cut anywhere they compute what they compute whole; below a cut they fill a cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_trainable_encoders
import torch
import transformers
from conftest import make_course
from PIL import Image
from test_hf_text_encoder import models  # noqa: F401 - a fixture
from test_trainable_encoders import CASES, NOTHING_LEARNED, TEXTS, load, pictures
from torchvision.models import VisionTransformer

from feats.encoders import torchvision_image
from feats.encoders.base import Encoder, Features, ImageSide, TextSide, parameter_depths
from feats.encoders.cut import lower_part
from feats.encoders.hidden_layers import find_layers
from feats.encoders.registry import load_encoder
from feats.errors import UsageError
from feats.extraction.local import extract
from feats.extraction.settings import ExtractionSettings
from feats.records import Record, read_dataset
from feats.store import FeatureStore

LEARNED = [case for case in CASES if case[0] not in NOTHING_LEARNED]
Inputs = torch.Tensor | list


@pytest.fixture(autouse=True)
def small_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's smallest ViT takes seconds a pass: one of its kind with 3 blocks of width 32 in its place."""
    real = test_trainable_encoders.get_model

    def get_model(name: str, **options: Any) -> torch.nn.Module:
        if name != "vit_b_16":
            return real(name, **options)
        return VisionTransformer(image_size=224, patch_size=32, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64)

    for module in (test_trainable_encoders, torchvision_image):
        monkeypatch.setattr(module, "get_model", get_model)


def sides(encoder: Encoder) -> Iterator[tuple[str, ImageSide | TextSide, Inputs]]:
    """The encoder's sides with something to run them on."""
    if encoder.image:
        pixels = torch.stack([encoder.image.to_bytes(image) for image in pictures()])
        yield "image", encoder.image, encoder.to_pixels(pixels)
    if encoder.text:
        yield "text", encoder.text, [t.ids for t in encoder.text.tokenize(TEXTS)]


def above(side: ImageSide | TextSide, hidden: torch.Tensor, inputs: Inputs, k: int) -> Features:
    return side.blocks.above(hidden, None if isinstance(side, ImageSide) else inputs, k)


def gradients(side: ImageSide | TextSide, feats: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a loss on `feats` gives each parameter that it reaches."""
    side.network.zero_grad()
    if not feats.requires_grad:
        return {}
    direction = torch.randn(feats.shape, generator=torch.Generator().manual_seed(0))
    (feats * direction).sum().backward()
    return {name: p.grad.clone() for name, p in side.network.named_parameters() if p.grad is not None}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(scale, 1e-3))


# -- cuts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), LEARNED)
@pytest.mark.slow
def test_the_parts_of_a_cut_are_the_whole(name: str, kind: str, tmp_path: Path):
    """Features, tokens and every gradient, across the cut and above it alone."""
    encoder = load(name, CASES[name, kind][0](tmp_path), trainable=True, tokens=True)
    for _, side, inputs in sides(encoder):
        whole = side.forward(inputs)
        wanted = gradients(side, whole["feats"])
        depths = parameter_depths(side)
        count = len(side.blocks.modules)
        for k in sorted({0, count // 2, count}):
            hidden = side.blocks.below(inputs, k)
            assert hidden.ndim == 3 and len(hidden) == len(inputs)
            parts = above(side, hidden, inputs, k)
            assert parts.keys() == whole.keys()
            for key in whole:
                close(parts[key], whole[key])
            found = gradients(side, parts["feats"])
            assert found.keys() == wanted.keys()
            for key in wanted:
                close(found[key], wanted[key])

            trained = gradients(side, above(side, hidden.detach(), inputs, k)["feats"])
            assert trained.keys() == {key for key in wanted if depths[key] > k}
            for key in trained:
                close(trained[key], wanted[key])


@pytest.mark.parametrize(("name", "kind"), [("clip", "vit"), ("roberta", "mean"), ("resnet", "pooled")])
def test_every_cut_is_another_place(name: str, kind: str, tmp_path: Path):
    """What enters block k + 1 is what block k makes of what enters it."""
    encoder = load(name, CASES[name, kind][0](tmp_path))
    for _, side, inputs in sides(encoder):
        entered: list[torch.Tensor] = []
        count = len(side.blocks.modules)
        with torch.inference_mode():
            whole = side.forward(inputs)["feats"]
            for k in range(count + 1):
                entered.append(side.blocks.below(inputs, k))
                feats = above(side, entered[k], inputs, k)["feats"]
                close(feats, whole) if k == count else torch.testing.assert_close(feats, whole, rtol=0, atol=0)
                if k:
                    moved = above(side, entered[k - 1], inputs, k) if entered[k].shape == entered[k - 1].shape else None
                    assert moved is None or not torch.allclose(moved["feats"], whole)


def test_a_map_is_cut_row_by_row(tmp_path: Path):
    encoder = load("resnet", CASES["resnet", "pooled"][0](tmp_path))
    ((_, side, pixels),) = sides(encoder)
    seen: list[torch.Tensor] = []
    side.blocks.modules[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    side.forward(pixels)
    (grid,) = seen  # (B, 128, 28, 28)
    hidden = side.blocks.below(pixels, 3)
    assert hidden.shape == (3, 28 * 28, 128)
    assert torch.equal(hidden[1, 5 * 28 + 9], grid[1, :, 5, 9])


@pytest.mark.parametrize(("name", "kind"), [("clip", "vit"), ("clip", "resnet"), ("resnet", "pooled"), ("vit", "")])
def test_autocast_goes_on_above_a_cut_as_without_one(name: str, kind: str, tmp_path: Path):
    """From a cache of float16, which holds bfloat16 values of a usual size exactly."""
    encoder = load(name, CASES[name, kind][0](tmp_path), trainable=True)
    side, pixels = encoder.image, next(sides(encoder))[2]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = side.forward(pixels)["feats"]
        hidden = side.blocks.below(pixels, 1)
        found = above(side, hidden.half() if hidden.dtype == torch.bfloat16 else hidden, pixels, 1)["feats"]
    assert whole.dtype == found.dtype and (name == "vit") == (hidden.dtype == torch.float32)
    torch.testing.assert_close(found, whole, rtol=0, atol=0)


def test_mixed_precision_is_kept_above_a_cut():
    """EfficientNet's first blocks are float32 under bfloat16."""
    encoder = load_encoder("efficientnet", "lite0", dtype="bf16")
    ((_, side, pixels),) = sides(encoder)
    with torch.inference_mode():
        whole = side.forward(pixels)["feats"]
        for k, dtype in ((0, torch.float32), (4, torch.float32), (5, torch.float32), (6, torch.bfloat16)):
            hidden = side.blocks.below(pixels, k)
            assert hidden.dtype is dtype
            assert torch.equal(above(side, hidden, pixels, k)["feats"], whole)


# -- depths ------------------------------------------------------------------------------------------------------

# Per case and side: how many blocks, and depths of some parameters, counted by hand from the models' own structure.
DEPTHS: dict[tuple[str, str, str], tuple[int, dict[str, int]]] = {
    ("clip", "vit", "image"): (
        2,
        {
            "class_embedding": 0,
            "positional_embedding": 0,
            "conv1.weight": 0,
            "ln_pre.weight": 0,
            "transformer.resblocks.0.attn.in_proj_weight": 1,
            "transformer.resblocks.1.mlp.c_proj.bias": 2,
            "ln_post.bias": 3,
            "proj": 3,
        },
    ),
    ("clip", "vit", "text"): (
        2,
        {
            "token_embedding.weight": 0,
            "positional_embedding": 0,
            "transformer.resblocks.0.ln_1.weight": 1,
            "transformer.resblocks.1.ln_1.weight": 2,
            "ln_final.weight": 3,
            "text_projection": 3,
            "logit_scale": 3,
        },
    ),
    ("clip", "resnet", "image"): (
        4,
        {
            "conv1.weight": 0,
            "bn3.weight": 0,
            "layer1.0.conv1.weight": 1,
            "layer4.0.bn3.weight": 4,
            "attnpool.positional_embedding": 5,
            "attnpool.c_proj.weight": 5,
        },
    ),
    ("roberta", "pooler", "text"): (
        4,
        {
            "embeddings.word_embeddings.weight": 0,
            "embeddings.LayerNorm.weight": 0,
            "encoder.layer.0.attention.self.query.weight": 1,
            "encoder.layer.3.output.dense.weight": 4,
            "pooler.dense.weight": 5,
        },
    ),
    ("resnet", "logits", "image"): (
        8,
        {
            "conv1.weight": 0,
            "bn1.weight": 0,
            "layer1.1.conv2.weight": 2,
            "layer2.0.downsample.0.weight": 3,
            "layer4.1.bn2.bias": 8,
            "fc.weight": 9,
        },
    ),
    ("resnet", "vit", "image"): (
        3,
        {
            "class_token": 0,
            "conv_proj.bias": 0,
            "encoder.pos_embedding": 0,
            "encoder.layers.encoder_layer_0.ln_1.weight": 1,
            "encoder.layers.encoder_layer_2.mlp.3.weight": 3,
            "encoder.ln.weight": 4,
            "heads.head.weight": 4,
        },
    ),
    ("efficientnet", "", "image"): (
        16,
        {
            "_conv_stem.weight": 0,
            "_bn0.weight": 0,
            "_blocks.0._depthwise_conv.weight": 1,
            "_blocks.15._project_conv.weight": 16,
            "_conv_head.weight": 17,
            "_bn1.bias": 17,
            "_fc.weight": 17,
        },
    ),
}


@pytest.mark.parametrize(("name", "kind"), dict.fromkeys((name, kind) for name, kind, _ in DEPTHS))
def test_depths_of_parameters(name: str, kind: str, tmp_path: Path):
    encoder = load(name, CASES[name, kind][0](tmp_path), trainable=True)
    for side_name, side, _ in sides(encoder):
        depths = parameter_depths(side)
        assert depths.keys() == {key for key, _ in side.network.named_parameters()}
        if (name, kind, side_name) in DEPTHS:
            count, some = DEPTHS[name, kind, side_name]
            assert len(side.blocks.modules) == count
            assert set(depths.values()) == set(range(count + 2))
            assert {key: depths[key] for key in some} == some


def test_nothing_learned_has_no_blocks():
    side = load_encoder("vader").text
    assert side.blocks is None and parameter_depths(side) == {}


# -- any network of transformers -----------------------------------------------------------------------------------

SMALL = {"vocab_size": 30, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 4}
BART = {"encoder_layers": 4, "decoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "d_model": 32}
# Per network: its configuration, and what comes after the layers.
NETWORKS: dict[str, tuple[transformers.PretrainedConfig, tuple[str, ...]]] = {
    "bert": (transformers.BertConfig(**SMALL), ("pooler.dense.",)),
    "distilbert": (transformers.DistilBertConfig(vocab_size=30, dim=32, n_heads=4, hidden_dim=64, n_layers=4), ()),
    "mpnet": (transformers.MPNetConfig(**SMALL), ("pooler.dense.",)),
    "deberta": (
        transformers.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], conv_kernel_size=3),
        (),
    ),
    "t5": (transformers.T5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4), ("final_layer_norm.",)),
    "mbart": (transformers.MBartConfig(vocab_size=30, **BART, decoder_attention_heads=4), ("layer_norm.",)),
    "gpt2": (transformers.GPT2Config(vocab_size=30, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0), ("ln_f.",)),
    "llama": (transformers.LlamaConfig(**SMALL, num_key_value_heads=2), ("norm.",)),
}  # fmt: skip


def network_of(config: transformers.PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    network = transformers.AutoModel.from_config(config).eval()
    for parameter in network.parameters():  # biases and norms that start as constants would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.get_encoder() if config.is_encoder_decoder else network


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_of_any_network(name: str):
    config, after = NETWORKS[name]
    network = network_of(config)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])

    def run() -> torch.Tensor:
        return network(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state

    layers = find_layers(network, run)
    assert len(layers.modules) == 4 and layers.after == after
    whole = run()
    calls: list[int] = []
    for i, layer in enumerate(layers.modules):
        inner = next(module for module in layer.modules() if isinstance(module, torch.nn.LayerNorm | torch.nn.Linear))
        inner.register_forward_pre_hook(lambda module, args, i=i: calls.append(i))
    for k in range(5):
        hidden = layers.states_before(k, run)
        calls.clear()
        with layers.entered_with(hidden, k):
            cut = run()
        torch.testing.assert_close(cut[mask == 1], whole[mask == 1])
        assert set(calls) - {0} == set(range(max(k, 1), 4))
        assert (0 in calls) == (k == 0 or name == "t5")  # T5's first layer makes every layer's position bias
        if k:
            with layers.entered_with(hidden.roll(1, 2), k):
                assert not torch.allclose(run(), whole)
    assert not any("forward" in vars(layer) for layer in layers.modules)
    assert torch.equal(run(), whole)


@pytest.mark.parametrize(
    "config",
    [
        transformers.AlbertConfig(**SMALL, embedding_size=16),
        transformers.XLNetConfig(vocab_size=30, d_model=32, n_layer=4, n_head=4, d_inner=64),
        transformers.XLMConfig(vocab_size=30, emb_dim=32, n_layers=4, n_heads=4),
    ],
    ids=["albert", "xlnet", "xlm"],
)
def test_networks_that_are_no_stack(config: transformers.PretrainedConfig):
    """One layer used over and over; states laid out otherwise; a layer's parts in lists of their own."""
    network = network_of(config)
    ids = torch.tensor([[5, 6, 7]])
    assert find_layers(network, lambda: network(input_ids=ids, return_dict=True).last_hidden_state) is None
    with pytest.raises(UsageError, match=f"{type(network).__name__} can't be seen as blocks.*choose another model"):
        parameter_depths(TextSide(lambda texts: [], lambda ids: {}, network))


@pytest.mark.parametrize(("name", "count"), [("bert", 5), ("roberta", 4)])
def test_the_last_four_layers_above_a_cut(models: Path, name: str, count: int):  # noqa: F811
    encoder = load_encoder("roberta", str(models / name), pooling="last4", trainable=True)
    side = encoder.text
    ids = [t.ids for t in side.tokenize(TEXTS)]
    whole = side.forward(ids)["feats"]
    for k in range(count - 2):
        close(side.blocks.above(side.blocks.below(ids, k).detach(), ids, k)["feats"], whole)
    for k in range(count - 2, count + 1):
        hidden = side.blocks.below(ids, k)
        with pytest.raises(UsageError, match=f"last four of {count} blocks.*cut at {count - 3} or below"):
            side.blocks.above(hidden, ids, k)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_encoders_of_other_families(models: Path, name: str):  # noqa: F811
    encoder = load_encoder("roberta", str(models / name), trainable=True)
    ids = [t.ids for t in encoder.text.tokenize([text for text in TEXTS if text])]
    whole = encoder.text.forward(ids)["feats"]
    wanted = gradients(encoder.text, whole)
    for k in range(len(encoder.text.blocks.modules) + 1):
        parts = above(encoder.text, encoder.text.blocks.below(ids, k), ids, k)["feats"]
        close(parts, whole)
        found = gradients(encoder.text, parts)
        assert found.keys() == wanted.keys()
        for key in wanted:
            close(found[key], wanted[key])
    depths = parameter_depths(encoder.text)
    last = len(encoder.text.blocks.modules) + 1
    names = {"t5": ("shared.weight", "final_layer_norm.weight"), "gpt2": ("wte.weight", "ln_f.bias")}[name]
    first_name = next(key for key in depths if key in (names[0], "embed_tokens.weight"))
    assert (depths[first_name], depths[names[1]]) == (0, last)
    assert set(depths.values()) == set(range(last + 1))


# -- the lower part in a cache -------------------------------------------------------------------------------------


def records_in(folder: Path) -> list[Record]:
    """Pairs whose texts differ in length."""
    records = read_dataset(make_course(folder, 6))["train"]
    texts = ["", "a", "a good day", "so very bad, all of it!", "the sun " * 4, "day"]
    return [Record(r.id, r.image_path, text) for r, text in zip(records, texts, strict=True)]


def padded(store: FeatureStore) -> torch.Tensor:
    """The cache's text tokens, (N, longest, width) float16."""
    values, offsets = store.read_tokens()
    rows = [torch.from_numpy(values[low:high]) for low, high in zip(offsets, offsets[1:])]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


CACHED = [
    ("clip", "vit", {"image": 1, "text": 1}),
    ("clip", "resnet", {"image": 3}),
    ("roberta", "mean", {"text": 2}),
    ("minilm", "", {"text": 6}),
    ("efficientnet", "", {"image": 14}),
]


@pytest.mark.parametrize(("name", "kind", "cuts"), CACHED)
def test_what_lies_below_is_cached_once(name: str, kind: str, cuts: dict[str, int], tmp_path: Path):
    encoder = load(name, CASES[name, kind][0](tmp_path), trainable=True)
    records = records_in(tmp_path / "set")
    lower = lower_part(encoder, cuts)
    extract(lower, records, tmp_path / "low.h5", ExtractionSettings(workers=0, batch_size=4, text_clean="none"))

    with FeatureStore.open(tmp_path / "low.h5") as store:
        assert store.fingerprint["cut"] == cuts
        assert set(store.features) == {f"{side}_{what}" for side in cuts for what in ("feats", "tokens")}
        for side_name, k in cuts.items():
            if side_name == "image":
                hidden = torch.from_numpy(store.read("image_tokens"))
                pixels = torch.stack([encoder.image.to_bytes(Image.open(r.image_path)) for r in records])
                side, inputs = encoder.image, encoder.to_pixels(pixels)
                lengths = [hidden.shape[1]] * len(records)
            else:
                hidden = padded(store)
                side, made = encoder.text, encoder.text.tokenize([r.text for r in records])
                inputs, lengths = [t.ids for t in made], [t.length for t in made]
                assert len(set(lengths)) > 2
            means = np.stack([row[:n].float().mean(0) for row, n in zip(hidden, lengths)])
            np.testing.assert_allclose(store.read(f"{side_name}_feats"), means, rtol=2e-3, atol=2e-3)

            feats = above(side, hidden, inputs, k)["feats"]
            whole = side.forward(inputs)["feats"]
            assert feats.dtype is whole.dtype
            torch.testing.assert_close(feats, whole, rtol=5e-3, atol=5e-3 * float(whole.detach().abs().max()))
            state = [*side.network.parameters(), *side.network.buffers()]
            assert not any(tensor.is_inference() for tensor in state)
            if k < len(side.blocks.modules):
                assert gradients(side, feats)
            assert gradients(side, whole)


def test_autocast_below_a_cut_is_in_the_fingerprint(tmp_path: Path):
    encoder = load("roberta", CASES["roberta", "mean"][0](tmp_path), trainable=True)
    records = [Record(str(i), None, text) for i, text in enumerate(TEXTS)]
    found = {}
    for dtype in (None, torch.bfloat16):
        path = tmp_path / f"{dtype}.h5"
        extract(lower_part(encoder, {"text": 3}, autocast=dtype), records, path, ExtractionSettings(workers=0))
        with FeatureStore.open(path) as store:
            found[store.fingerprint["dtype"]] = store.read_tokens()[0].astype(np.float32)
    assert found.keys() == {"fp32", "bf16"}
    differences = np.abs(found["fp32"] - found["bf16"])
    assert 1e-4 < differences.max() < 0.1
    assert {p.dtype for p in encoder.text.network.parameters()} == {torch.float32}


def test_what_a_network_keeps_below_a_cut_can_be_trained_on(tmp_path: Path):
    """Extraction runs in inference mode; a tensor that the network makes there and uses again must be an ordinary one."""
    encoder = load("roberta", CASES["roberta", "mean"][0](tmp_path), trainable=True)
    kept: list[torch.Tensor] = []
    embeddings = encoder.text.network.embeddings.word_embeddings
    embeddings.register_forward_hook(lambda module, args, output: kept.append(torch.ones(32)))
    lower = lower_part(encoder, {"text": 1})
    with torch.inference_mode():
        made = lower.text.forward([t.ids for t in lower.text.tokenize(TEXTS)])
    assert not kept[0].is_inference() and not made["tokens"].requires_grad


@pytest.mark.parametrize(
    ("name", "cuts", "message"),
    [
        ("minilm", {}, "cuts are of the sides .*expected image, text or both"),
        ("minilm", {"sound": 1}, r"cuts are of the sides \['sound'\]"),
        ("minilm", {"image": 1}, "encoder minilm has no image side"),
        ("minilm", {"text": 7}, "text side of encoder minilm has 6 blocks: it is cut at 0 to 6, not 7"),
        ("minilm", {"text": -1}, "0 to 6, not -1"),
        ("vader", {"text": 0}, "text side of encoder vader isn't made of blocks"),
    ],
)
def test_refused_cuts(name: str, cuts: dict[str, int], message: str):
    with pytest.raises(UsageError, match=message):
        lower_part(load_encoder(name), cuts)
