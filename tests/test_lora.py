"""LoRA adapters on every kind of attention that encoders have."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from test_trainable_encoders import CASES, forward, load
from torch import nn
from torchvision.models import VisionTransformer, resnet18
from transformers import AutoConfig, AutoModel

from feats.encoders.registry import load_encoder
from feats.errors import UsageError
from modeling.finetuning.lora import SplitAttention, add_lora, merge_lora, merged_state

RANK = 3
Forward = Callable[[], torch.Tensor]


def encoder_side(name: str, kind: str, side: str) -> Callable[[Path], tuple[nn.Module, Forward]]:
    """A network of stage 1, and its own forward pass."""

    def make(folder: Path) -> tuple[nn.Module, Forward]:
        encoder = load(name, CASES[name, kind][0](folder), trainable=True)
        return getattr(encoder, side).network, lambda: forward(encoder)[side]

    return make


def vision_transformer(folder: Path) -> tuple[nn.Module, Forward]:
    torch.manual_seed(0)
    network = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5).eval()
    nn.init.normal_(network.heads.head.weight)
    pixels = torch.randn(3, 3, 32, 32)
    return network, lambda: network(pixels)


def hugging_face(kind: str, **sizes: int) -> Callable[[Path], tuple[nn.Module, Forward]]:
    def make(folder: Path) -> tuple[nn.Module, Forward]:
        torch.manual_seed(0)
        tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        network = AutoModel.from_config(AutoConfig.for_model(kind, **tokens, **sizes)).eval()
        ids = torch.randint(3, 40, (2, 9))
        mask = torch.ones_like(ids).index_fill_(1, torch.tensor([7, 8]), 0)
        return network, lambda: network(input_ids=ids, attention_mask=mask).last_hidden_state[:, :7]

    return make


BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MODERN = {**BERT, "cls_token_id": 1, "sep_token_id": 2}
SQUARES = [(32, 32)] * 4  # query, key, value, output

# How the network is made, and (n_in, n_out) of each projection, by hand.
NETWORKS: dict[str, tuple[Callable[[Path], tuple[nn.Module, Forward]], list[tuple[int, int]]]] = {
    "clip image": (encoder_side("clip", "vit", "image"), 2 * 4 * [(128, 128)]),
    "clip text": (encoder_side("clip", "vit", "text"), 2 * 4 * [(64, 64)]),
    "bert": (encoder_side("roberta", "mean", "text"), 4 * SQUARES),
    "minilm": (encoder_side("minilm", "", "text"), 6 * 4 * [(384, 384)]),
    "torchvision vit": (vision_transformer, 2 * SQUARES),
    "roberta": (hugging_face("roberta", **BERT), 2 * SQUARES),
    "distilbert": (hugging_face("distilbert", dim=32, n_layers=2, n_heads=4, hidden_dim=48), 2 * SQUARES),
    "mpnet": (hugging_face("mpnet", **BERT), 2 * SQUARES),
    "albert": (hugging_face("albert", embedding_size=16, **BERT), SQUARES),  # one layer, used twice
    "modernbert": (hugging_face("modernbert", **MODERN), 2 * [(32, 96), (32, 32)]),
    "gpt2": (hugging_face("gpt2", n_embd=32, n_layer=2, n_head=4), 2 * [(32, 96), (32, 32)]),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def adapters(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def shake(network: nn.Module) -> None:
    """Adapters as training might leave them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters(network).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def backward(feats: torch.Tensor) -> None:
    (feats * torch.randn(feats.shape, generator=torch.Generator().manual_seed(0))).sum().backward()


@each_network
def test_adapters_start_without_effect_and_alone_are_trained(name: str, tmp_path: Path):
    make, shapes = NETWORKS[name]
    network, run = make(tmp_path)
    before = run().detach()
    names = add_lora(network, RANK)
    torch.testing.assert_close(run().detach(), before, atol=1e-6, rtol=1e-6)
    assert len(names) == len(set(names)) == len(shapes)
    assert all(isinstance(network.get_submodule(name), LoraLayer) for name in names)
    made = adapters(network)
    assert len(made) == 2 * len(names)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == made.keys()
    assert all(p.dtype is torch.float32 for p in made.values())
    assert all(p.any() == (".lora_A." in name) for name, p in made.items())
    expected = sum(RANK * (n_in + n_out) for n_in, n_out in shapes)
    assert sum(p.numel() for p in made.values()) == expected


@each_network
@pytest.mark.parametrize("low", [False, True], ids=["fp32", "autocast"])
def test_a_gradient_reaches_every_adapter(name: str, low: bool, tmp_path: Path):
    network, run = NETWORKS[name][0](tmp_path)
    add_lora(network, RANK)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        backward(run())
    parts = adapters(network)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parts.values())
    assert all(p.grad.any() == (".lora_B." in name) for name, p in parts.items())  # A's waits for B to leave zero
    shake(network)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        backward(run())
    assert all(p.grad.any() for p in parts.values())
    assert not [name for name, p in network.named_parameters() if p.grad is not None and name not in parts]


@each_network
def test_merging_gives_the_plain_network_with_the_adapted_outputs(name: str, tmp_path: Path):
    make = NETWORKS[name][0]
    network, run = make(tmp_path)
    plain = {name: value.clone() for name, value in network.state_dict().items()}
    kinds = [(name, type(module), module.training, vars(module).keys()) for name, module in network.named_modules()]
    before = run().detach()
    names = add_lora(network, RANK, alpha=6.0)
    shake(network)
    adapted = run().detach()
    assert (adapted - before).abs().max() > 1e-3
    updates = update_by_hand(network, names, scale=6.0 / RANK)
    merged = merged_state(network)
    torch.testing.assert_close(run().detach(), adapted, atol=0, rtol=0)  # nothing was changed

    merge_lora(network)
    torch.testing.assert_close(run().detach(), adapted, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    after = [(name, type(module), module.training, vars(module).keys()) for name, module in network.named_modules()]
    assert sorted(after, key=lambda a: a[0]) == sorted(kinds, key=lambda a: a[0])
    state = network.state_dict()
    assert state.keys() == plain.keys()
    assert {name for name in state if not torch.equal(state[name], plain[name])} == merged.keys() == updates.keys()
    for key, value in merged.items():
        assert torch.equal(value, state[key])
        torch.testing.assert_close(value, plain[key] + updates[key])
    fresh, run_fresh = make(tmp_path)
    fresh.load_state_dict(state)
    torch.testing.assert_close(run_fresh().detach(), adapted, atol=1e-5, rtol=1e-5)


def update_by_hand(network: nn.Module, names: list[str], scale: float) -> dict[str, torch.Tensor]:
    """alpha / r * B A of each adapted weight, by its plain name."""
    parts = adapters(network)
    updates: dict[str, torch.Tensor] = {}
    for name in names:
        a, b = (parts[f"{name}.lora_{part}.default.weight"].detach() for part in "AB")
        update = scale * b @ a
        if type(network).__name__ == "GPT2Model":  # holds its weights as (n_in, n_out)
            update = update.T
        attention, _, projection = name.rpartition(".")
        if projection != "out_proj" and isinstance(network.get_submodule(attention), SplitAttention):
            key = f"{attention}.in_proj_weight"
            update = torch.cat([updates[key], update]) if key in updates else update
        else:
            key = f"{name}.weight"
        updates[key] = update
    return updates


@each_network
def test_autocast_computes_the_same_but_for_rounding(name: str, tmp_path: Path):
    network, run = NETWORKS[name][0](tmp_path)
    add_lora(network, RANK)
    shake(network)
    with torch.no_grad():
        exact = run()
        with torch.autocast("cpu", torch.bfloat16):
            low = run()
    assert torch.cosine_similarity(low.float().flatten(), exact.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("name", ["clip image", "bert"])
def test_adapters_are_drawn_from_their_seed_alone(name: str, tmp_path: Path):
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        network, _ = NETWORKS[name][0](tmp_path)
        torch.manual_seed(random.randrange(1000))
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        add_lora(network, RANK, seed=seed)
        found = {key: value.detach().clone() for key, value in adapters(network).items()}
        merge_lora(network)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
        return found

    first, again, other = drawn(7), drawn(7), drawn(8)
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    down = [key for key in first if ".lora_A." in key]
    assert not any(torch.equal(first[key], other[key]) for key in down)
    bounds = {key: first[key].shape[1] ** -0.5 for key in down}  # as nn.Linear draws: uniform within 1 / sqrt(n_in)
    assert all(0.9 < first[key].abs().max() / bounds[key] <= 1 for key in down)
    assert len({tuple(first[key].flatten().tolist()) for key in down}) == len(down)


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_the_scale_is_alpha_by_rank(alpha: float | None, tmp_path: Path):
    network, _ = NETWORKS["bert"][0](tmp_path)
    (name, *_) = add_lora(network, RANK, alpha)
    x = torch.randn(5, 32)
    layer = network.get_submodule(name)
    shake(network)
    parts = adapters(network)
    a, b = (parts[f"{name}.lora_{part}.default.weight"] for part in "AB")
    update = (12 / 3 if alpha else 1) * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + update)


@pytest.mark.parametrize("bias", [True, False])
def test_split_attention_is_the_attention_it_was_made_of(bias: bool):
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(24, 3, 0.25, bias, batch_first=True).eval()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.2)
    query, key, value = torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    split = SplitAttention(whole)
    expected, _ = whole(query, key, value, need_weights=False)
    torch.testing.assert_close(split(query, key, value)[0], expected)
    split.train()
    dropped = [split(query, key, value)[0] for _ in range(2)]
    assert not torch.equal(*dropped)
    joined = split.joined()
    assert joined.training and vars(joined).keys() == vars(whole).keys()
    assert (joined.dropout, joined.num_heads, joined.batch_first) == (0.25, 3, True)
    torch.testing.assert_close(joined.eval()(query, key, value, need_weights=False)[0], expected)
    assert joined.state_dict().keys() == whole.state_dict().keys()


def without_attention(name: str, folder: Path) -> nn.Module:
    if name == "ResNet":
        return resnet18()
    if name == "EfficientNet":
        return load_encoder("efficientnet", "lite0", trainable=True).image.network
    return load("clip", CASES["clip", "resnet"][0](folder), trainable=True).image.network


@pytest.mark.parametrize("name", ["ResNet", "EfficientNet", "ModifiedResNet"])
def test_networks_without_attention_are_refused(name: str, tmp_path: Path):
    network = without_attention(name, tmp_path)
    before = {key: p.requires_grad for key, p in network.named_parameters()}
    with pytest.raises(UsageError, match=f"attention made of Linear layers and {name} has none .*take a ViT"):
        add_lora(network, 4)
    assert {key: p.requires_grad for key, p in network.named_parameters()} == before


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        (0, None, "`rank` 0 is out of range; expected 1 to 32, the width of VisionTransformer's attention"),
        (33, None, "`rank` 33 is out of range"),
        (4, 0.0, "`alpha` 0.0 .* a finite number above 0, as 4"),
        (4, float("nan"), "`alpha` nan .* a finite number"),
    ],
)
def test_settings_out_of_range_change_nothing(rank: int, alpha: float | None, message: str, tmp_path: Path):
    network, _ = vision_transformer(tmp_path)
    with pytest.raises(UsageError, match=message):
        add_lora(network, rank, alpha)
    assert sum(isinstance(module, nn.MultiheadAttention) for module in network.modules()) == 2
    assert len(add_lora(network, 32)) == 8
    with pytest.raises(UsageError, match="VisionTransformer has LoRA adapters already.*merge"):
        add_lora(network, 4)
