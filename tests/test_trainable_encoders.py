"""Every encoder of the registry as something to train, and as something to call on Python objects."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from clip.model import CLIP
from conftest import make_course
from PIL import Image
from torchvision.models import get_model
from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTModel

from feats.encoders.base import Encoder
from feats.encoders.registry import ENCODERS, load_encoder
from feats.errors import UsageError
from feats.extraction.local import extract
from feats.extraction.settings import ExtractionSettings
from feats.records import Record, read_dataset
from feats.store import FeatureStore

TEXTS = ["a good day", "so very bad, all of it!", "", "the sun"]
Where = dict[str, str | int]  # arguments of `load_encoder`


def clip_vit(folder: Path) -> Where:
    torch.manual_seed(0)
    torch.save(CLIP(32, 64, 2, 128, 16, 77, 49408, 64, 1, 2).half().float().state_dict(), folder / "clip.pt")
    return {"weights": str(folder / "clip.pt")}


def clip_resnet(folder: Path) -> Where:
    torch.manual_seed(0)
    model = CLIP(32, 64, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 2)
    for name, parameter in model.named_parameters():  # this family starts with zeros where a gradient must pass
        if name.endswith("bn3.weight"):
            torch.nn.init.ones_(parameter)
    torch.save(model.half().float().state_dict(), folder / "clip.pt")
    return {"weights": str(folder / "clip.pt")}


def bert(folder: Path) -> Where:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a good day so very bad all of it the sun".split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder / "bert")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 4}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(folder / "bert")
    return {"model": str(folder / "bert")}


def bert_pooler(folder: Path) -> Where:
    return {**bert(folder), "pooling": "pooler"}


def huggingface_vit(folder: Path) -> Where:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=64, patch_size=16, **sizes)).save_pretrained(folder / "vit")
    return {"model": str(folder / "vit")}


def torchvision_model(name: str, layer: str) -> Callable[[Path], Where]:
    def make(folder: Path) -> Where:
        torch.manual_seed(0)
        network = get_model(name, weights=None)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        if name == "vit_b_16":  # torchvision starts it at zero
            torch.nn.init.normal_(network.heads.head.weight, std=0.02)
        torch.save(network.state_dict(), folder / "weights.pth")
        return {"model": name, "weights": str(folder / "weights.pth"), "layer": layer}

    return make


# Per case: how its weights are made, and the beginnings of what a forward pass has no use for.
CASES: dict[tuple[str, str], tuple[Callable[[Path], Where], tuple[str, ...]]] = {
    ("clip", "vit"): (clip_vit, ("logit_scale",)),
    ("clip", "resnet"): (clip_resnet, ("logit_scale",)),
    ("roberta", "mean"): (bert, ("pooler.",)),
    ("roberta", "pooler"): (bert_pooler, ()),
    ("resnet", "pooled"): (torchvision_model("resnet18", "pooled"), ("fc.",)),
    ("resnet", "logits"): (torchvision_model("resnet18", "logits"), ()),
    ("resnet", "vit"): (torchvision_model("vit_b_16", "pooled"), ("heads.",)),
    ("vit", ""): (huggingface_vit, ()),
    ("minilm", ""): (lambda folder: {}, ("pooler.",)),
    ("efficientnet", ""): (lambda folder: {"model": "lite0"}, ("_fc.",)),
    ("vader", ""): (lambda folder: {}, ()),
    ("ngrams", ""): (lambda folder: {"columns": 64}, ()),
    ("pixels", ""): (lambda folder: {"size": 8}, ()),
}
NOTHING_LEARNED = ("vader", "ngrams", "pixels")


def load(name: str, where: Where, **more: object) -> Encoder:
    return load_encoder(name, **{**where, **more})  # type: ignore[arg-type]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 255, (7, 9, 3), np.uint8)) for _ in range(3)]
    return [image.resize((90, 70), Image.Resampling.BICUBIC) for image in small]


def forward(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Each side's features, with whatever gradients there are."""
    found = {}
    if encoder.image:
        pixels = torch.stack([encoder.image.to_bytes(image) for image in pictures()])
        found["image"] = encoder.image.forward(encoder.to_pixels(pixels))["feats"]
    if encoder.text:
        found["text"] = encoder.text.forward([t.ids for t in encoder.text.tokenize(TEXTS)])["feats"]
    return found


def test_every_encoder_is_tried():
    assert {name for name, _ in CASES} == set(ENCODERS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*case, marks=pytest.mark.slow) if case == ("resnet", "vit") else case for case in CASES],
)
def test_a_gradient_reaches_every_parameter_in_use(name: str, kind: str, tmp_path: Path):
    make, unused = CASES[name, kind]
    where = make(tmp_path)
    encoder, frozen = load(name, where, trainable=True), load(name, where)
    assert encoder.identity == frozen.identity
    counted = {
        side: 0 if network is None else sum(p.numel() for p in network.parameters())
        for side in ("image", "text")
        if (of := getattr(encoder, side)) is not None
        for network in [of.network]
    }
    assert encoder.parameters == frozen.parameters == counted  # whatever is folded for speed
    assert bool(sum(counted.values())) == (name not in NOTHING_LEARNED)
    with torch.no_grad():
        expected = forward(frozen)
    for side, feats in forward(encoder).items():
        torch.testing.assert_close(feats.detach(), expected[side], atol=2e-5, rtol=2e-4)
        network, still = (getattr(getattr(e, side), "network") for e in (encoder, frozen))
        if name in NOTHING_LEARNED:
            assert (network is None or not network.state_dict()) and not feats.requires_grad
            continue
        assert not any(parameter.requires_grad for parameter in still.parameters())
        direction = torch.randn(feats.shape, generator=torch.Generator().manual_seed(0))
        (feats * direction).sum().backward()
        parameters = dict(network.named_parameters())
        assert all(p.requires_grad and p.dtype is torch.float32 for p in parameters.values())
        reached = {key for key, p in parameters.items() if p.grad is not None and p.grad.isfinite().all()}
        assert {key for key in parameters if key not in reached} == {k for k in parameters if k.startswith(unused)}
        assert all(parameters[key].grad.any() for key in reached if not key.endswith("bias"))


def test_nothing_is_folded_away_when_training(tmp_path: Path):
    """State dicts of trainable networks are those of the checkpoints, so that they can be handed back."""
    where = torchvision_model("resnet18", "pooled")(tmp_path)
    saved = torch.load(where["weights"], weights_only=True)
    assert load("resnet", where, trainable=True).image.network.state_dict().keys() == saved.keys()
    encoder = load("efficientnet", {"model": "lite0"}, trainable=True)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in encoder.image.network.modules()) > 40
    where = clip_vit(tmp_path)
    encoder = load("clip", where, trainable=True)
    state = {f"visual.{k}": v for k, v in encoder.image.network.state_dict().items()}
    state |= encoder.text.network.state_dict()
    saved = torch.load(where["weights"], weights_only=True)
    assert state.keys() == saved.keys() and all(torch.equal(state[key], saved[key]) for key in saved)


def test_a_step_of_training_changes_the_features(tmp_path: Path):
    encoder = load("clip", clip_vit(tmp_path), trainable=True)
    optimizer = torch.optim.SGD(encoder.text.network.parameters(), lr=0.1)
    before = forward(encoder)["text"]
    before.square().mean().backward()
    optimizer.step()
    assert forward(encoder)["text"].square().mean() < before.square().mean()


def test_trainable_weights_stay_float32():
    with pytest.raises(UsageError, match="stay float32, so `dtype` must be fp32.*autocast"):
        load_encoder("minilm", trainable=True, dtype="bf16")
    encoder = load_encoder("minilm", trainable=True)
    with torch.autocast("cpu", torch.bfloat16):
        low = forward(encoder)["text"]
    assert torch.cosine_similarity(low, forward(encoder)["text"]).min() > 0.999
    assert low.requires_grad


# -- on Python objects -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "minilm", "efficientnet", "vader"])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_encode_gives_what_a_cache_holds(name: str, batch_size: int, tmp_path: Path):
    kind = {"clip": "vit"}.get(name, "")
    encoder = load(name, CASES[name, kind][0](tmp_path))
    records = read_dataset(make_course(tmp_path / "set", 5))["train"]
    Image.open(records[1].image_path).rotate(90, expand=True).save(records[1].image_path, exif=_turned())
    texts = [f"{record.text} @you http://t.co/x" for record in records]
    records = [Record(r.id, r.image_path, text) for r, text in zip(records, texts, strict=True)]
    extract(encoder, records, tmp_path / "x.h5", ExtractionSettings(workers=0))
    made = encoder.encode(
        [Image.open(r.image_path) for r in records] if encoder.image else None,
        texts if encoder.text else None,
        batch_size=batch_size,
    )
    with FeatureStore.open(tmp_path / "x.h5") as store:
        assert {f"{side}_feats" for side in made} == set(store.features)
        assert store.parameters == encoder.parameters and store.parameters.keys() == made.keys()
        for side, values in made.items():
            assert values.dtype == np.float32
            cached = store.read(f"{side}_feats").astype(np.float32)
            np.testing.assert_allclose(values, cached, rtol=2**-10, atol=2e-4)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def test_encode_cleans_as_asked_and_takes_nothing_else():
    encoder = load_encoder("ngrams", columns=64)
    dirty, clean = "so happy @you http://t.co/x", "so happy"
    made = encoder.encode(texts=[dirty, clean])["text"]
    np.testing.assert_array_equal(made[0], made[1])
    raw = encoder.encode(texts=[dirty, clean], text_clean="none")["text"]
    assert not np.array_equal(raw[0], raw[1]) and np.array_equal(raw[1], made[1])
    with pytest.raises(UsageError, match="encoder ngrams has no image side"):
        encoder.encode(images=pictures())
    with pytest.raises(UsageError, match="unknown cleaning level 'dry'"):
        encoder.encode(texts=["a"], text_clean="dry")
    assert encoder.encode(texts=[])["text"].shape == (0, 64)
    assert load_encoder("efficientnet", "lite0").encode(images=[])["image"].shape == (0, 1280)
    assert encoder.encode() == {}


# -- one dtype ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "asked", "written"), [("minilm", "bf16", "bf16"), ("vader", "bf16", "fp32")])
def test_the_fingerprint_names_what_was_computed_in(name: str, asked: str, written: str, tmp_path: Path):
    encoder = load_encoder(name, dtype=asked)
    extract(encoder, [Record("a", None, "a good day")], tmp_path / "x.h5", ExtractionSettings(workers=0))
    with FeatureStore.open(tmp_path / "x.h5") as store:
        assert store.fingerprint["dtype"] == written
    if encoder.text.network is not None:
        assert {p.dtype for p in encoder.text.network.parameters()} == {torch.bfloat16}


def test_names_of_devices_and_dtypes():
    assert load_encoder("efficientnet", "lite0", dtype="auto").dtype is torch.float32  # its own "auto"
    assert load_encoder("vader", device="cpu").device == torch.device("cpu")
    for arguments, message in (
        ({"device": "abacus"}, "device 'abacus' can't be used.*`device` auto"),
        ({"dtype": "fp8"}, "unknown `dtype` 'fp8'; there are auto, fp16, bf16, fp32"),
        ({"dtype": "fp16"}, "`dtype` fp16 needs a GPU"),
    ):
        with pytest.raises(UsageError, match=message):
            load_encoder("minilm", **arguments)


# -- another encoder ---------------------------------------------------------------------------------------------

ONE_FILE = '''
"""Counts a text's vowels, scaled."""

import torch

from feats.encoders.base import Encoder, Loading, TextSide, Tokens


def load(model, weights, how: Loading, *, scale: int) -> Encoder:
    def tokenize(texts):
        return [Tokens(text, max(len(text), 1)) for text in texts]

    def forward(ids):
        return {"feats": torch.tensor([[float(scale * text.count(vowel)) for vowel in "aeiou"] for text in ids])}

    return Encoder({"model": model, "scale": scale}, how, text=TextSide(tokenize, forward))
'''


def test_another_encoder_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    from feats.cli import extraction_parser, run
    from feats.encoders.registry import EncoderSpec, Option

    (tmp_path / "vowel_counts.py").write_text(ONE_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    line = EncoderSpec("vowel_counts", "vowels", "english", "none", {"scale": Option(1, "what a vowel counts")})
    monkeypatch.setitem(ENCODERS, "vowels", line)
    make_course(tmp_path / "set", 4)
    (tmp_path / "set" / "data" / "0.txt").write_text("aAa @eel, oi")
    command = ["--data", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert run("vowels", extraction_parser("vowels", "Vowels."), [*command, "--scale", "2"]) == 0
    assert "vowels_train: 4 rows done" in capsys.readouterr().out
    with FeatureStore.open(tmp_path / "out" / "vowels_train.h5") as store:
        np.testing.assert_array_equal(store.read("text_feats", ["0"]), [[4, 4, 2, 2, 0]])
        assert (store.fingerprint["encoder"], store.fingerprint["scale"]) == ("vowels", 2)
    assert run("vowels", extraction_parser("vowels", "Vowels."), command) == 2
    assert "scale: the cache has 2, this run 1" in capsys.readouterr().err
    assert "--scale" in extraction_parser("vowels", "Vowels.").format_help()
