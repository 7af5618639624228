"""What an encoder is, and the registry of those there are.

An encoder has an image side, a text side, or both. A side splits its work in two, so that the first part can
run in worker processes and overlap with the second:

    image:  RGB PIL image --preprocess--> PIL image --(shared: to tensor, normalise)--> forward --> features
    text:   str           --tokenize----> Tokens    ------------------------------------forward --> features

A later encoder is one new file with a `load()` function, one entry in `ENCODERS` and its script.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from PIL import Image

from feats.errors import UsageError

Features = dict[str, torch.Tensor]  # "feats": (B, D); with --tokens also "tokens": (B, P, D')


@dataclass(frozen=True)
class Tokens:
    """One tokenised text. `ids` is whatever the encoder's own forward takes, `length` its number of tokens."""

    ids: Any
    length: int
    truncated: bool = False


@dataclass
class ImageSide:
    """`preprocess` runs in forked worker processes and returns RGB images of one size.

    `forward` takes pixels (B, 3, H, W), scaled to [0, 1], normalised with `mean` and `std`, in the compute dtype and
    on the compute device. Tokens, where the model has them, are its patch or grid positions (B, P, D').
    """

    preprocess: Callable[[Image.Image], Image.Image]
    mean: Sequence[float]
    std: Sequence[float]
    forward: Callable[[torch.Tensor], Features]
    channels_last: bool = False  # memory format of the pixels: convolutional nets want it


@dataclass
class TextSide:
    """`forward` takes a list of `Tokens.ids`, in any number and any mix of lengths.

    It pads to the longest itself; its tokens are (B, longest, D') with row b valid up to its length.
    """

    tokenize: Callable[[Sequence[str]], list[Tokens]]
    forward: Callable[[list[Any]], Features]


@dataclass
class Encoder:
    """A loaded model, ready to run. `identity` holds all that decides the features' values, for the fingerprint:
    model, weights_sha256, preprocessing, pooling, ... as JSON values."""

    identity: dict[str, Any]
    image: ImageSide | None = None
    text: TextSide | None = None


@dataclass(frozen=True)
class Loading:
    """How to load an encoder, whichever it is. With `expected_sha256`, weights of another digest are refused before
    anything of them is opened."""

    device: torch.device
    dtype: torch.dtype
    tokens: bool = False
    expected_sha256: str | None = None


@dataclass(frozen=True)
class EncoderSpec:
    """A registry line: where the encoder's code is and which defaults its script shows.

    `module` has `load(model, weights, how: Loading, **options) -> Encoder`, where `options` are the values of the
    arguments declared in `options`.
    """

    module: str
    summary: str
    default_model: str | None
    text_clean: str = "tweet"  # default cleaning level
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # argument name -> argparse keywords
    model_help: str = ""
    auto_dtype: str | None = None  # what --dtype auto means, where it isn't the device's fastest


ENCODERS: dict[str, EncoderSpec] = {
    "clip": EncoderSpec(
        "feats.encoders.openai_clip",
        "OpenAI CLIP, image and text",
        None,
        model_help="RN50, RN101, RN50x4, RN50x16, RN50x64, ViT-B/32, ViT-B/16, ViT-L/14 or ViT-L/14@336px "
        "(default: what --weights holds, else ViT-B/32)",
    ),
    "roberta": EncoderSpec(
        "feats.encoders.huggingface_text",
        "a Hugging Face text encoder",
        "roberta-base",
        options={
            "pooling": {
                "choices": ("mean", "cls", "pooler", "last4"),
                "default": "mean",
                "help": "how token vectors become one: masked mean; the first token; the checkpoint's trained "
                "pooler; or the masked mean of the sum of the last four layers",
            }
        },
        model_help="a hub name or a local folder: roberta-base, bert-base-uncased, bert-base-chinese, ...",
    ),
    "resnet": EncoderSpec(
        "feats.encoders.torchvision_image",
        "a torchvision image encoder",
        "resnet50",
        options={
            "layer": {
                "choices": ("pooled", "logits"),
                "default": "pooled",
                "help": "the pooled vector before the classifier, or the classifier's 1000 logits",
            }
        },
        model_help="resnet18, resnet34, resnet50, resnet101, resnet152 or vit_b_16",
    ),
    "minilm": EncoderSpec("feats.encoders.minilm", "all-MiniLM-L6-v2 (offline), text", "all-MiniLM-L6-v2"),
    "efficientnet": EncoderSpec(
        "feats.encoders.efficientnet_lite",
        "EfficientNet-Lite (offline), image",
        "lite2",
        model_help="lite0, lite1 or lite2",
        # bf16 gains a third only, and takes single pictures to a cosine of 0.999 to fp32
        auto_dtype="fp32",
    ),
    "vader": EncoderSpec(
        "feats.encoders.vader",
        "VADER sentiment scores (offline), text",
        "vader",
        text_clean="none",
        auto_dtype="fp32",
    ),
    "ngrams": EncoderSpec(
        "feats.encoders.ngrams",
        "hashed character n-grams (offline), text",
        "ngrams",
        options={
            "columns": {
                "type": int,
                "default": 4096,
                "metavar": "D",
                "help": "the features' width, into which the n-grams are hashed",
            }
        },
        auto_dtype="fp32",
    ),
}


def load_encoder(
    name: str,
    model: str | None = None,
    weights: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens: bool = False,
    expected_sha256: str | None = None,
    **options: Any,
) -> Encoder:
    """Load the encoder `name` of `ENCODERS` in eval mode on `device`; only its own backend is imported.

    `expected_sha256` is what `identity["weights_sha256"]` must become. Raises `UsageError` for an unknown name, model
    or option, when the weights can't be had, and, before they are opened, when they aren't the expected ones.
    """
    spec = ENCODERS.get(name)
    if spec is None:
        raise UsageError(f"unknown encoder {name!r}; there are {', '.join(ENCODERS)}")
    defaults = {key: keywords["default"] for key, keywords in spec.options.items()}
    unknown = options.keys() - defaults.keys()
    if unknown:
        raise UsageError(f"encoder {name!r} has no option {', '.join(sorted(unknown))}; it has {list(defaults)}")
    encoder = import_module(spec.module).load(
        model or spec.default_model,
        weights,
        Loading(torch.device(device), dtype, tokens, expected_sha256),
        **{**defaults, **options},
    )
    encoder.identity = {"encoder": name, **encoder.identity}
    return encoder
