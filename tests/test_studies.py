"""The table of the studies' own models: each can be built, has the size the study tells, and trains on both sides."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pairs import make_pairs, tiny_clip
from tiny_models import (
    BERT_SHAPE,
    BERT_VOCABULARY,
    bert_tokenizer,
    make_clip,
    make_pictures,
    make_torchvision,
    save_clip,
    save_transformer,
)
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from feats.encoders.base import Encoder
from feats.encoders.registry import ENCODERS, load_encoder
from modeling import finetune
from modeling.choices import SplitSettings
from modeling.command_line.tuning import tuning_settings
from modeling.finetuning.scratch import untrained_text, untrained_vit
from modeling.finetuning.settings import TuneSettings, lr_factor
from modeling.finetuning.starts import start_from_encoders
from modeling.finetuning.studies import MODELS, TUNING_RECIPES, EncoderChoice
from modeling.heads.base import Batch, n_parameters
from modeling.heads.config import HeadConfig
from modeling.heads.registry import HEADS, build_head
from modeling.runs.pairs import DataPlace
from modeling.training.config import TrainConfig

TEXTS = ["a good day", "very bad", "the sun is"]


@pytest.mark.parametrize("name", MODELS)
def test_encoders_and_heads_are_those_of_the_registries(name: str):
    model = MODELS[name]
    for choice in (model.image, model.text):
        options = ENCODERS[choice.name].options
        assert all(value in options[key].choices for key, value in choice.options.items())
    assert HEADS[model.head].study == model.study and model.tokens == bool(HEADS[model.head].tokens)
    assert model.summary and model.study in TUNING_RECIPES


@pytest.mark.parametrize("study", TUNING_RECIPES)
def test_recipes_are_settings(study: str):
    recipe = dict(TUNING_RECIPES[study])
    assert study in {model.study for model in MODELS.values()}
    split = {key: recipe.pop(key) for key in ("val_ratio", "split_seed") if key in recipe}
    tuning = {key: recipe.pop(key) for key in ("warmup", "train_batch_norm", "clip_grad") if key in recipe}
    assert TuneSettings(**tuning).tune == "all"
    assert 0 < split["val_ratio"] < 0.5
    gain = recipe.pop("min_gain", None)
    head = {f.name: recipe.pop(f.name) for f in fields(HeadConfig) if f.name in recipe}
    for model in MODELS.values():
        if model.study == study:
            assert TrainConfig(HeadConfig(model.head, **head), **recipe).lr <= 2e-5
    assert (gain is not None) == (study == "E")


@pytest.mark.parametrize("study", TUNING_RECIPES)
def test_a_study_had_one_rate_for_encoders_and_head(study: str):
    def settings(*typed: str) -> TuneSettings:
        return tuning_settings(finetune.build_parser().parse_args(["--recipe", study, *typed]))

    assert settings().rate_of_head == settings().lr == TUNING_RECIPES[study]["lr"]
    assert settings("--lr", "3e-4").rate_of_head == 3e-4 and settings("--head-lr", "0.5").rate_of_head == 0.5


def test_study_d_tunes_as_its_module_does():
    """Adam(lr) of torch, whose decay is none, at a constant rate, its whole network in training mode."""
    args = finetune.build_parser().parse_args("--model resnet_roberta --recipe D --lr 2e-5 --ep 3".split())
    settings = tuning_settings(args)
    network = torch.nn.Linear(2, 2)
    theirs = torch.optim.Adam(network.parameters(), lr=2e-5).param_groups[0]
    assert (settings.optimizer, settings.lr, settings.weight_decay) == ("adam", theirs["lr"], theirs["weight_decay"])
    assert {lr_factor(settings, step, 20) for step in range(20)} == {1.0} and settings.train_batch_norm


def small(choice: EncoderChoice, folder: Path) -> Encoder:
    """A small encoder of the chosen one's kind, ready to train."""
    folder.mkdir()
    torch.manual_seed(0)
    weights, options = None, dict(choice.options)
    if choice.untrained:
        make = untrained_vit if choice.name == "vit" else untrained_text
        model = str(make(folder / "new", layers=1, width=32, heads=4))
    elif choice.name == "clip":
        model, weights = None, str(save_clip(make_clip("vit"), folder / "clip.pt"))
    elif choice.name == "resnet":
        model, weights = "resnet18", str(folder / "resnet18.pth")
        torch.save(make_torchvision(model).state_dict(), weights)
    elif choice.name == "vit":
        model = str(folder / "vit")
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
        ViTModel(ViTConfig(image_size=64, **sizes)).save_pretrained(model)
    elif choice.name == "roberta":
        config = BertConfig(vocab_size=len(BERT_VOCABULARY), num_hidden_layers=1, **BERT_SHAPE)
        model = str(save_transformer(folder / "bert", BertModel(config), bert_tokenizer(folder)))
    else:
        model, options = None, {"size": 32}
    return load_encoder(choice.name, model, weights, tokens=True, trainable=True, **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_gradient_reaches_both_encoders(name: str, tmp_path: Path):
    model = MODELS[name]
    image, text = small(model.image, tmp_path / "image"), small(model.text, tmp_path / "text")
    pixels = torch.stack([image.image.to_bytes(picture) for picture in make_pictures([(80, 60)] * len(TEXTS))])
    tokens = text.text.tokenize(TEXTS)
    of_image, of_text = image.image.forward(image.to_pixels(pixels)), text.text.forward([t.ids for t in tokens])
    lengths = torch.tensor([t.length for t in tokens])
    batch = Batch(image=of_image["feats"][None], text=of_text["feats"][None])
    widths = {"image": batch.image.shape[2], "text": batch.text.shape[2]}
    if model.tokens:
        mask = (torch.arange(of_text["tokens"].shape[1]) < lengths[:, None])[None]
        batch = Batch(batch.image, batch.text, of_image["tokens"][None], of_text["tokens"][None], mask)
        widths |= {"image_tokens": batch.image_tokens.shape[3], "image_positions": batch.image_tokens.shape[2]}
        widths["text_tokens"] = batch.text_tokens.shape[3]
    head = build_head(HeadConfig(model.head, D=16, dropout=0.0), widths, 3)
    logits = head(batch)
    assert logits.shape == (1, 3, 3)
    F.cross_entropy(logits[0], torch.tensor([0, 1, 2])).backward()
    networks = [text.text.network, *([image.image.network] if model.image.name != "pixels" else [])]
    if model.head == "query_attention":  # over a single key: the text has no say
        networks.remove(text.text.network)
    for network in networks:
        assert sum(p.grad.abs().sum() for p in network.parameters() if p.grad is not None) > 0


def test_vilbert_style_has_the_study_s_size():
    """211.033 M, with BERT-base and ViT-B/16, whose own configurations these are. Counted without memory."""
    with torch.device("meta"):
        encoders = [BertModel(BertConfig()), ViTModel(ViTConfig())]  # both with their poolers
    sizes = [sum(p.numel() for p in encoder.parameters()) for encoder in encoders]
    assert sizes == [109_482_240, 86_389_248]
    head = HeadConfig(MODELS["vilbert_style"].head, D=TUNING_RECIPES["B"]["D"])
    count = n_parameters(build_head(head, {"image": 768, "text": 768}, 3))
    assert sum(sizes) + count == 211_033_091


def test_clip_match_has_the_study_s_size():
    """152.328 M, of which CLIP ViT-B/32 has 151.277 M."""
    count = n_parameters(
        build_head(HeadConfig("clip_match", D=TUNING_RECIPES["B"]["D"]), {"image": 512, "text": 512}, 3)
    )
    assert count == 1_051_139 and 151_277_313 + count == pytest.approx(152.328e6, abs=1e3)


def test_the_study_s_clip_has_the_size_of_its_weights(tmp_path: Path):
    """Its name in the study is the default, no condition on weights that are given."""
    make_pairs(tmp_path / "set")
    clip = MODELS["clip"]
    start = start_from_encoders(
        clip.image,
        clip.text,
        HeadConfig(clip.head, D=8),
        TuneSettings(),
        SplitSettings(val_ratio=0.25),
        device=torch.device("cpu"),
        place=DataPlace(tmp_path / "set"),
        weights={"clip": tiny_clip(tmp_path)["weights"]},
    )
    assert start.model.encoders["clip"].identity["model"].startswith("custom 64 16 128 2 32")
    assert start.model.parts.keys() == {"image/clip", "text/clip", "head"}
