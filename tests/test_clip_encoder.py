"""CLIP against the clip package itself, on small random models of both families."""

import copy
import hashlib
import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import transformers
from caches import make_cache
from clip import clip as package
from clip.model import CLIP, build_model
from conftest import make_course
from encoding import image_features, text_features
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import CLIP_SHAPES, make_clip, make_pictures, save_clip

from feats import clip_extract_feats
from feats.encoders import openai_clip as clip_encoder
from feats.encoders.base import Encoder
from feats.encoders.openai_clip import HUB_FILE, HUB_REPOSITORIES, architecture_of, find_weights
from feats.encoders.registry import load_encoder
from feats.encoders.weights import hub_reachable
from feats.errors import UsageError
from modeling import inference_head, train_head

FORMATS = {
    "vit": ("archive", "plain", "safetensors", "open_clip", "hugging_face"),
    "resnet": ("archive", "plain", "safetensors", "open_clip"),
}
CASES = [(family, form) for family, forms in FORMATS.items() for form in forms]
LONG = "so many words about one very long day in the city " * 12
TEXTS = [
    "a happy dog",
    "",
    LONG,
    "sun &amp; rain 🎉 #Music!",
    "train",
    "ĐÀ NẴNG 中文 text",
    "one two three four five six",
    "x",
]
SIZES = [(80, 60), (60, 80), (64, 64), (200, 70), (30, 20), (65, 64), (90, 301), (128, 128)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by waiting for other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def published(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small archives count as OpenAI's: addresses hold their digests, as those of the nine do."""
    if "checkpoints" in request.fixturenames:
        paths = request.getfixturevalue("checkpoints")
        for family, model in (("vit", "ViT-L/14"), ("resnet", "RN50x64")):
            digest = hashlib.sha256(paths[family, "archive"].read_bytes()).hexdigest()
            monkeypatch.setitem(clip_encoder._MODELS, model, f"https://example.org/{digest}/{family}.pt")


@pytest.fixture(scope="module")
def models() -> dict[str, CLIP]:
    """A model of each family in fp32."""
    return {family: make_clip(family) for family in CLIP_SHAPES}


@pytest.fixture(scope="module")
def checkpoints(models: dict[str, CLIP], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(family, format) -> file or folder with that model's weights."""
    root = tmp_path_factory.mktemp("clip")
    paths = {}
    for family, model in models.items():
        paths |= {(family, form): root / f"{family}_{form}.pt" for form in ("archive", "plain", "open_clip")}
        paths[family, "safetensors"] = root / f"{family}.safetensors"
        state = model.state_dict()
        save_archive(model, paths[family, "archive"])
        save_clip(model, paths[family, "plain"])
        save_file(state, paths[family, "safetensors"])
        torch.save(
            {"epoch": 1, "name": "run", "state_dict": {f"module.{key}": value for key, value in state.items()}},
            paths[family, "open_clip"],
        )
    paths["vit", "hugging_face"] = root / "vit_hugging_face"
    as_hugging_face(models["vit"]).save_pretrained(paths["vit", "hugging_face"])
    return paths


def save_archive(model: CLIP, path: Path) -> None:
    """TorchScript as OpenAI publishes it: with three numbers among the weights."""
    model = copy.deepcopy(model)
    numbers = {"input_resolution": 64, "context_length": model.context_length, "vocab_size": model.vocab_size}
    for name, value in numbers.items():
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = torch.zeros(1, 3, 64, 64), package.tokenize(["a"])
        torch.jit.trace(model, example, check_trace=False).save(str(path))


def as_hugging_face(model: CLIP) -> transformers.CLIPModel:
    """The same ViT as transformers has it."""
    embed, resolution, layers, width, patch, _, _, text_width, heads, text_layers = CLIP_SHAPES["vit"]
    common = {"projection_dim": embed, "hidden_act": "quick_gelu"}
    text = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_layers}
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config = transformers.CLIPConfig(
        text_config={**common, **text, "num_attention_heads": heads},
        vision_config={
            **common, **vision, "num_attention_heads": width // 64, "image_size": resolution, "patch_size": patch,
        },
        projection_dim=embed,
    )  # fmt: skip
    network = transformers.CLIPModel(config).eval()
    ours, theirs = model.state_dict(), {}
    for name in network.state_dict():
        if name.endswith("position_ids"):
            continue
        vision_side = name.startswith(("vision_model", "visual_projection"))
        prefix = "visual." if vision_side else ""
        tail = name.split(".", 1)[-1]
        part = name.rsplit(".", 1)[-1]
        if ".layers." in name:
            _, _, _, i, inner = name.split(".", 4)
            block = f"{prefix}transformer.resblocks.{i}"
            module = inner.removesuffix(f".{part}")
            if module.endswith(("q_proj", "k_proj", "v_proj")):
                third = "qkv".index(module.removeprefix("self_attn.")[0])
                theirs[name] = ours[f"{block}.attn.in_proj_{part}"].chunk(3)[third]
                continue
            plain = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
            plain |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
            theirs[name] = ours[f"{block}.{plain[module]}.{part}"]
        elif name in ("text_projection.weight", "visual_projection.weight"):
            theirs[name] = ours["visual.proj" if vision_side else "text_projection"].T.contiguous()
        else:
            theirs[name] = ours[
                {
                    "logit_scale": "logit_scale",
                    "embeddings.token_embedding.weight": "token_embedding.weight",
                    "embeddings.class_embedding": "visual.class_embedding",
                    "embeddings.patch_embedding.weight": "visual.conv1.weight",
                    "embeddings.position_embedding.weight": f"{prefix}positional_embedding",
                    f"final_layer_norm.{part}": f"ln_final.{part}",
                    f"pre_layrnorm.{part}": f"visual.ln_pre.{part}",
                    f"post_layernorm.{part}": f"visual.ln_post.{part}",
                }[tail]
            ]
    network.load_state_dict(theirs, strict=False)
    return network


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return make_pictures(SIZES)


def load(path: Path, **options: Any) -> Encoder:
    return load_encoder("clip", weights=str(path), **options)


def reference_images(model: CLIP, pictures: Sequence[Image.Image]) -> torch.Tensor:
    transform = package._transform(model.visual.input_resolution)
    with torch.inference_mode():
        return model.encode_image(torch.stack([transform(picture) for picture in pictures]))


def reference_texts(model: CLIP, texts: Sequence[str]) -> torch.Tensor:
    with torch.inference_mode():
        return model.encode_text(package.tokenize(list(texts), truncate=True))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# -- the same features ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "form"), CASES)
def test_every_format_gives_the_package_s_features(models, checkpoints, pictures, family: str, form: str):
    path = checkpoints[family, form]
    reference = build_model(dict(models[family].state_dict())).float().eval()
    encoder = load(path)
    close(image_features(encoder, pictures)["feats"], reference_images(reference, pictures))
    close(text_features(encoder, TEXTS)["feats"], reference_texts(reference, TEXTS))
    file = path / "model.safetensors" if path.is_dir() else path
    embed, resolution, layers, width, patch = CLIP_SHAPES[family][:5]
    assert encoder.identity == {
        "encoder": "clip",
        "model": f"custom {resolution} {patch or 0} {width} {layers} {embed}",
        "weights_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "preprocess": {
            "resize": 64,
            "crop": 64,
            "interpolation": "bicubic",
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        },
        "image_dtype": "float32",
    }
    json.dumps(encoder.identity)


@pytest.mark.filterwarnings("ignore:.*torch.jit.load:FutureWarning")
@pytest.mark.parametrize("family", CLIP_SHAPES)
def test_features_of_clip_load(checkpoints, pictures, family: str):
    path = checkpoints[family, "archive"]
    reference, transform = package.load(str(path), device="cpu", jit=False)
    assert transform.transforms[0].size == 64
    encoder = load(path)
    close(image_features(encoder, pictures)["feats"], reference_images(reference.eval(), pictures))
    close(text_features(encoder, TEXTS)["feats"], reference_texts(reference, TEXTS))


def test_features_of_transformers(checkpoints, pictures):
    folder = checkpoints["vit", "hugging_face"]
    network, info = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = package.tokenize(TEXTS, truncate=True)
    transform = package._transform(64)
    with torch.inference_mode():
        pixels = torch.stack([transform(picture) for picture in pictures])
        out = network.eval()(input_ids=ids, pixel_values=pixels)
    encoder = load(folder)
    normalize = torch.nn.functional.normalize
    close(normalize(image_features(encoder, pictures)["feats"]), out.image_embeds)
    close(normalize(text_features(encoder, TEXTS)["feats"]), out.text_embeds)


@pytest.mark.parametrize("family", CLIP_SHAPES)
def test_cached_features(models, checkpoints, pictures, tmp_path: Path, family: str, capsys):
    """The whole pipeline: what is in the cache is the package's features, rounded to fp16."""
    data = make_course(tmp_path / "set", len(TEXTS))
    for i, (picture, text) in enumerate(zip(pictures, TEXTS)):
        picture.save(data / "data" / f"{i}.jpg", quality=95)
        (data / "data" / f"{i}.txt").write_text(text, encoding="utf-8")
    decoded = [Image.open(data / "data" / f"{i}.jpg") for i in range(len(TEXTS))]
    weights = checkpoints[family, "plain"]
    assert extract(data, tmp_path / "out", weights, "--batch-size", "3") == 0
    assert "8 rows done; 0 quarantined; 1 text truncated" in capsys.readouterr().out
    with h5py.File(tmp_path / "out" / "clip_train.h5") as file:
        found = {name: dataset[:] for name, dataset in file.items()}
        fingerprint = json.loads(file.attrs["fingerprint"])
    assert fingerprint["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert [i.decode() for i in found["id"]] == [str(i) for i in range(len(TEXTS))]
    expected = {
        "image_feats": reference_images(models[family], decoded),
        "text_feats": reference_texts(models[family], TEXTS),
    }
    for name, values in expected.items():
        assert found[name].dtype == np.float16
        # one unit in the last place: sums in another order may round to the neighbour
        np.testing.assert_allclose(found[name].astype(np.float32), values.numpy(), rtol=2**-10, atol=1e-6)
        assert (found[name] == values.half().numpy()).mean() > 0.95


def extract(data: Path, out: Path, weights: Path, *more: str) -> int:
    command = ["--data", str(data), "--out", str(out), "--weights", str(weights), "--dtype", "fp32"]
    return clip_extract_feats.main([*command, "--device", "cpu", "--workers", "0", "--text-clean", "none", *more])


# -- text -------------------------------------------------------------------------------------------------------


def test_cutting_to_the_longest_text_changes_nothing(models, checkpoints):
    encoder = load(checkpoints["vit", "plain"])
    widths = []
    token_embedding = torch.nn.Embedding.forward

    def watched(module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        widths.append(ids.shape[1])
        return token_embedding(module, ids)

    batches = [["", "a"], ["one two three", "a", "", "sun rain"], [LONG, "", "a b c"], [LONG], TEXTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Embedding, "forward", watched)
        found = [text_features(encoder, texts)["feats"] for texts in batches]
    assert widths == [3, 5, 77, 77, 77]
    for texts, feats in zip(batches, found):
        close(feats, reference_texts(models["vit"], texts))


def test_tokens_are_the_package_s(checkpoints):
    # 75 words fit, 76 don't; the tokenizer must agree with the package on both sides of the limit
    texts = [*TEXTS, "dog " * 74, "dog " * 75, "dog " * 76, "<|endoftext|> in the middle"]
    made = load(checkpoints["vit", "plain"]).text.tokenize(texts)
    expected = package.tokenize(texts, truncate=True)
    for tokens, row in zip(made, expected):
        np.testing.assert_array_equal(np.pad(tokens.ids, (0, 77 - tokens.length)), row.numpy())
    cut = {LONG, "dog " * 76}
    assert [tokens.truncated for tokens in made] == [text in cut for text in texts]
    assert [made[i].length for i in (0, 1, 2)] == [5, 2, 77]
    assert [tokens.length for tokens in made[8:11]] == [76, 77, 77]


# -- token features, dtypes, views ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLIP_SHAPES)
def test_token_features(models, checkpoints, pictures, family: str):
    path, reference = checkpoints[family, "plain"], copy.deepcopy(models[family])
    plain, encoder = load(path), load(path, tokens=True)
    seen = {}
    visual = reference.visual
    watched = {"image": visual.transformer if family == "vit" else visual.layer4, "text": reference.ln_final}
    for name, module in watched.items():
        module.register_forward_hook(lambda _, args, output, name=name: seen.update({name: output.clone()}))
    reference_images(reference, pictures)
    reference_texts(reference, TEXTS)

    images, texts = image_features(encoder, pictures), text_features(encoder, TEXTS)
    torch.testing.assert_close(images["feats"], image_features(plain, pictures)["feats"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(texts["feats"], text_features(plain, TEXTS)["feats"], atol=1e-6, rtol=1e-6)
    if family == "vit":
        expected = visual.ln_post(seen["image"].permute(1, 0, 2))[:, 1:]
        assert images["tokens"].shape == (8, 16, 128)
    else:
        expected = seen["image"].permute(0, 2, 3, 1).reshape(8, 4, 256)
        assert images["tokens"].shape == (8, 4, 256)
    close(images["tokens"], expected)
    assert texts["tokens"].shape == (8, 77, 64)
    for row, tokens in enumerate(encoder.text.tokenize(TEXTS)):
        close(texts["tokens"][row, : tokens.length], seen["text"][row, : tokens.length])


@pytest.mark.parametrize("family", CLIP_SHAPES)
def test_bf16_stays_close(checkpoints, pictures, family: str):
    path = checkpoints[family, "plain"]
    full, half = load(path), load(path, dtype=torch.bfloat16)
    cosine = torch.nn.functional.cosine_similarity
    images = image_features(half, pictures)["feats"]
    texts = text_features(half, TEXTS)["feats"]
    assert (images.dtype, texts.dtype) == (torch.bfloat16 if family == "vit" else torch.float32, torch.bfloat16)
    assert cosine(images.float(), image_features(full, pictures)["feats"]).min() >= 0.999
    assert cosine(texts.float(), text_features(full, TEXTS)["feats"]).min() >= 0.999


def test_views(checkpoints, tmp_path: Path, capsys):
    data = make_course(tmp_path / "set", 5)
    weights = checkpoints["vit", "plain"]
    found = []
    for out in ("one", "two"):
        assert extract(data, tmp_path / out, weights, "--views", "3") == 0
        with h5py.File(tmp_path / out / "clip_train.h5") as file:
            found.append({name: file[name][:] for name in ("image_feats", "image_views")})
    views = found[0]["image_views"]
    assert views.shape == (5, 3, 32) and np.isfinite(views).all()
    np.testing.assert_array_equal(views, found[1]["image_views"])
    everything = np.concatenate([found[0]["image_feats"][:, None], views], 1)
    for row in everything:
        assert len(np.unique(row, axis=0)) == 4  # the picture and its views all differ
    capsys.readouterr()
    assert extract(data, tmp_path / "one", weights, "--views", "3", "--views-seed", "1") == 2
    error = capsys.readouterr().err
    assert "made by something else (views:" in error and "--overwrite" in error
    assert extract(data, tmp_path / "seeded", weights, "--views", "3", "--views-seed", "1") == 0
    with h5py.File(tmp_path / "seeded" / "clip_train.h5") as file:
        np.testing.assert_array_equal(file["image_feats"][:], found[0]["image_feats"])
        assert (file["image_views"][:] != views).any(2).all()


# -- the nine models --------------------------------------------------------------------------------------------

NINE = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 77, 49408, 640, 10, 12),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 77, 49408, 768, 12, 12),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 77, 49408, 1024, 16, 12),
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "ViT-L/14": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 77, 49408, 768, 12, 12),
}


@pytest.mark.parametrize("model", package.available_models())
def test_the_nine_are_known_by_their_shapes(model: str):
    with torch.device("meta"):
        state = CLIP(*NINE[model]).state_dict()
    assert architecture_of(state) == model
    assert model in HUB_REPOSITORIES


# -- errors -----------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_refused_with_the_nine_named():
    with pytest.raises(UsageError, match="unknown CLIP model 'ViT-Z/9'") as raised:
        load_encoder("clip", "ViT-Z/9")
    assert all(f"{name}," in f"{raised.value}," for name in NINE)


def test_files_that_are_no_weights(checkpoints, tmp_path: Path):
    def refused(path: Path, match: str) -> None:
        with pytest.raises(UsageError, match=match) as raised:
            load(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)

    refused(tmp_path / "nowhere.pt", "no weights at .*`weights` wants a file or a folder")
    for name in ("notes.pt", "notes.safetensors"):
        (tmp_path / name).write_text("these are not the weights you are looking for\n" * 5)
        refused(tmp_path / name, "can't be read as .*CLIP weights")
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, "can't be read as .*CLIP weights")
    for form in ("archive", "plain", "safetensors"):
        whole = checkpoints["vit", form]
        path = tmp_path / f"cut_{whole.name}"
        path.write_bytes(whole.read_bytes()[:1_000_000])
        refused(path, "can't be read as .*CLIP weights")

    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "other.pt")
    refused(tmp_path / "other.pt", "holds no CLIP model")
    torch.save({}, tmp_path / "nothing.pt")
    refused(tmp_path / "nothing.pt", "holds no CLIP model")
    for what in ([torch.zeros(2)], torch.zeros(2), {0: torch.zeros(2)}):
        torch.save(what, tmp_path / "odd.pt")
        refused(tmp_path / "odd.pt", "can't be read as .*CLIP weights")
    state = torch.load(checkpoints["vit", "plain"])
    del state["visual.ln_post.weight"]
    torch.save(state, tmp_path / "part.pt")
    refused(tmp_path / "part.pt", "holds no CLIP model")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no weights")


def test_hugging_face_folders_of_other_models(checkpoints, tmp_path: Path):
    source = checkpoints["vit", "hugging_face"]
    config = json.loads((source / "config.json").read_text())
    os.link(source / "model.safetensors", tmp_path / "model.safetensors")
    for side, change, match in (
        ("text_config", {"hidden_act": "gelu"}, "uses gelu in its text_config; OpenAI's CLIP has quick_gelu"),
        ("vision_config", {"hidden_act": "gelu"}, "uses gelu in its vision_config"),
        ("vision_config", {"num_attention_heads": 4}, "has 4 heads in its vision_config of width 128"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, side: {**config[side], **change}}))
        for path in (tmp_path, tmp_path / "model.safetensors"):
            with pytest.raises(UsageError, match=match):
                load(path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    load(tmp_path / "model.safetensors")

    state = load_file(source / "model.safetensors")
    (tmp_path / "text").mkdir()
    text_side = {key: value for key, value in state.items() if key.startswith("text_model")}
    save_file(text_side, tmp_path / "text" / "model.safetensors")
    with pytest.raises(UsageError, match="holds no whole CLIP model: 'logit_scale' is missing"):
        load(tmp_path / "text")


def test_weights_of_another_model_than_asked_for(checkpoints):
    with pytest.raises(UsageError, match="holds custom 64 16 128 2 32, not ViT-B/32; leave out `model`"):
        load(checkpoints["vit", "plain"], model="ViT-B/32")


# -- files that would run code -----------------------------------------------------------------------------------


class Hostile(torch.nn.Module):
    """A module whose TorchScript archive writes `WRITTEN` to a path of its author's choice when it is opened."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.weight = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[str, torch.Tensor, bool]:
        return (self.path, self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]) -> None:
        self.path = state[0]
        self.weight = torch.from_file(state[0], True, 4, dtype=torch.uint8).fill_(33).float()
        self.training = state[2]


WRITTEN = b"!!!!"


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """An archive, and the file that opening it writes. That it does is tried on another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("tried", "evil"):
            torch.jit.script(Hostile(str(tmp_path / f"by_{name}"))).save(str(tmp_path / f"{name}.pt"))
        torch.jit.load(tmp_path / "tried.pt")
    assert (tmp_path / "by_tried").read_bytes() == WRITTEN
    return tmp_path / "evil.pt", tmp_path / "by_evil"


def test_an_archive_s_code_never_runs_in_extraction(hostile: tuple[Path, Path], tmp_path: Path, capsys):
    archive, written = hostile
    assert extract(make_course(tmp_path / "set", 2), tmp_path / "out", archive) == 2
    error = capsys.readouterr().err
    assert f"{archive} is a TorchScript archive that OpenAI didn't publish" in error and "state_dict()" in error
    assert error.count("\n") == 1 and not written.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("known", [False, True])
def test_an_archive_s_code_never_runs_in_inference(hostile, tmp_path: Path, capsys, monkeypatch, known: bool):
    """Not even with the digest of a published archive: the run was trained with another."""
    archive, written = hostile
    if known:
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        monkeypatch.setitem(clip_encoder._MODELS, "RN50", f"https://example.org/{digest}/RN50.pt")
    made_by = {"encoder": "clip", "model": "ViT-B/32", "text_clean": "tweet", "tokens": False}
    make_cache(tmp_path / "feats", "clip", fingerprint=made_by)
    folders = ["--feats", str(tmp_path / "feats"), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert train_head.main(["--vtype", "clip", "--ep", "1", "--D", "4", *folders]) == 0
    capsys.readouterr()
    (tmp_path / "some.jpg").write_bytes(b"")
    pair = ["--text", "a", "--image", str(tmp_path / "some.jpg"), "--weights", f"clip={archive}"]
    assert inference_head.main([*pair, *folders]) == 2
    assert f"{archive} isn't the file asked for (weights_sha256" in capsys.readouterr().err
    assert not written.exists()


def test_other_people_s_archives_are_refused_and_can_be_converted(checkpoints, models, pictures, tmp_path: Path):
    clip_encoder._MODELS["ViT-L/14"] = "https://example.org/another/vit.pt"  # undone by `published`
    archive = checkpoints["vit", "archive"]
    with pytest.raises(UsageError, match="TorchScript archive that OpenAI didn't publish"):
        load(archive)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(torch.jit.load(archive, map_location="cpu").state_dict(), tmp_path / "weights.pt")
    close(image_features(load(tmp_path / "weights.pt"), pictures)["feats"], reference_images(models["vit"], pictures))


# -- where weights come from ------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and empty caches in the folder returned: `home` and `hub`."""

    def unresolved(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror("no network in tests")

    close_session()  # and its open connections
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


def put_in_hub_cache(root: Path, weights: Path) -> Path:
    repository = root / "hub" / f"models--{HUB_REPOSITORIES['ViT-B/32'].replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    os.link(weights, snapshot / HUB_FILE)
    return snapshot / HUB_FILE


def put_in_package_cache(root: Path, weights: Path) -> Path:
    folder = root / "home" / ".cache" / "clip"
    folder.mkdir(parents=True)
    os.link(weights, folder / "ViT-B-32.pt")
    return folder / "ViT-B-32.pt"


def test_nothing_to_be_had_is_one_error_with_every_place_and_remedy(nowhere: Path, monkeypatch, capfd):
    data = make_course(nowhere / "set", 2)
    assert clip_extract_feats.main(["--data", str(data), "--out", str(nowhere / "out"), "--device", "cpu"]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    repository = HUB_REPOSITORIES["ViT-B/32"]
    same = f"--data {data} --out {nowhere / 'out'}"
    lines = captured.err.splitlines()
    assert lines[0] == "error: no weights for CLIP ViT-B/32; tried:"
    assert lines[1:4] == [
        f"  the clip package's cache {nowhere / 'home' / '.cache' / 'clip' / 'ViT-B-32.pt'}",
        f"  the hub's cache {nowhere / 'hub'} (nothing of {repository})",
        f"  the hub, {constants.ENDPOINT}/{repository} (no answer)",
    ]
    assert lines[4].startswith(f"  {package._MODELS['ViT-B/32']} (")
    assert lines[7] == f"  python feats/efficientnet_extract_feats.py {same}"
    for said in ("minilm_extract_feats.py", "ngrams_extract_feats.py"):
        assert f"  python feats/{said} {same}" in lines
    clip = f"python feats/clip_extract_feats.py {same} --device cpu"
    for command in (f"{clip} --weights PATH", f"HF_ENDPOINT=https://MIRROR {clip}", f"HF_HOME=FOLDER {clip}"):
        assert f"  {command}" in lines
    assert not (nowhere / "out").exists() and not (nowhere / "home").exists()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"for CLIP RN50\. .*resnet50_clip\.openai \(HF_HUB_OFFLINE is set\)"):
        load_encoder("clip", "RN50")


def test_a_damaged_file_in_the_package_s_cache_is_passed_over(nowhere: Path, checkpoints):
    put_in_package_cache(nowhere, checkpoints["vit", "archive"])
    with pytest.raises(UsageError, match=r"\(1\) .*ViT-B-32\.pt \(its sha256 isn't 40d365715913\.\.\.: damaged\)"):
        find_weights("ViT-B/32")
    cached = put_in_hub_cache(nowhere, checkpoints["vit", "safetensors"])
    assert find_weights("ViT-B/32") == cached


def test_the_package_s_cache_comes_first(nowhere: Path, checkpoints, monkeypatch):
    archive = checkpoints["vit", "archive"]
    put_in_hub_cache(nowhere, checkpoints["vit", "safetensors"])
    cached = put_in_package_cache(nowhere, archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(clip_encoder._MODELS, "ViT-B/32", f"https://example.org/{digest}/ViT-B-32.pt")
    assert find_weights("ViT-B/32") == cached
    assert load_encoder("clip").identity["weights_sha256"] == digest


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """A hub that has nothing."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    class NotFound(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        for variable in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(variable, "127.0.0.1")
        yield server
        server.shutdown()


def test_hub_reachable(hub: HTTPServer, monkeypatch: pytest.MonkeyPatch):
    assert hub_reachable()  # any answer is one
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_reachable()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert not hub_reachable()


def test_a_megabyte_long_word_takes_no_time(models, checkpoints):
    """Byte pair encoding takes time with the square of a word's length: only what the context holds is encoded."""
    tokenize = load(checkpoints["vit", "plain"]).text.tokenize
    (long,) = tokenize(["x" * 1_000_000])
    assert long.length == 77 and long.truncated
    for text in ("", "hello", "a" * 1500, "it's 5 o'clock… ✨ café " * 20):
        np.testing.assert_array_equal(
            np.pad(tokenize([text])[0].ids, (0, 77 - tokenize([text])[0].length)),
            package.tokenize(text, truncate=True)[0],
        )
