"""The encoders there are, by name, and loading one. Naming them imports none of their libraries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from feats.errors import UsageError
from feats.source import SIDES

if TYPE_CHECKING:
    import torch

    from feats.encoders.base import Encoder


@dataclass(frozen=True)
class Option:
    """A setting that one encoder has and others haven't: its default, whose type it takes, and what there is to it.
    `flag` is its name on a command line, where that isn't the setting's own."""

    default: str | int
    help: str
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    flag: str | None = None


@dataclass(frozen=True)
class EncoderSpec:
    """A line of the registry: where an encoder's code is, and what can be known of it without loading it.

    `module` has `load(model, weights, how: Loading, **options) -> Encoder`, where `options` are the values of those
    declared here. `sides` are what it encodes, `tokens` whether it gives token vectors, `takes_weights` whether
    it can be given others. `text_clean` is the default cleaning level, `auto_dtype` what the dtype "auto" means where
    it isn't the device's fastest, `trainable` whether there is a network that gradients go through.
    """

    module: str
    summary: str
    default_model: str | None
    text_clean: str = "tweet"
    options: Mapping[str, Option] = field(default_factory=dict)
    model_help: str = ""
    auto_dtype: str | None = None
    trainable: bool = True
    sides: tuple[str, ...] = SIDES
    tokens: bool = True
    takes_weights: bool = True


# Of every encoder of pictures; `load_encoder` sees to it itself.
RESIZER = {
    "resizer": Option(
        "pil",
        "what resizes pictures: pil; or torch, in a third of the time, with features that differ in the third digit",
        ("pil", "torch"),
    )
}

ENCODERS: dict[str, EncoderSpec] = {
    "clip": EncoderSpec(
        "feats.encoders.openai_clip",
        "OpenAI CLIP, image and text",
        None,
        options=RESIZER,
        model_help="RN50, RN101, RN50x4, RN50x16, RN50x64, ViT-B/32, ViT-B/16, ViT-L/14 or ViT-L/14@336px "
        "(default: what the weights hold, else ViT-B/32)",
    ),
    "roberta": EncoderSpec(
        "feats.encoders.huggingface_text",
        "a Hugging Face text encoder",
        "roberta-base",
        options={
            "pooling": Option(
                "mean",
                "how token vectors become one: masked mean; the first token; the checkpoint's trained pooler; or the "
                "masked mean of the sum of the last four layers",
                ("mean", "cls", "pooler", "last4"),
            )
        },
        model_help="a hub name or a local folder: roberta-base, bert-base-uncased, bert-base-chinese, ...",
        sides=("text",),
    ),
    "resnet": EncoderSpec(
        "feats.encoders.torchvision_image",
        "a torchvision image encoder",
        "resnet50",
        options={
            "layer": Option(
                "pooled",
                "the pooled vector before the classifier, or the classifier's 1000 logits",
                ("pooled", "logits"),
            ),
            **RESIZER,
        },
        model_help="resnet18, resnet34, resnet50, resnet101, resnet152 or vit_b_16",
        sides=("image",),
    ),
    "vit": EncoderSpec(
        "feats.encoders.huggingface_image",
        "a Hugging Face image encoder",
        "google/vit-base-patch16-224-in21k",
        options={
            "pooling": Option(
                "cls",
                "how token vectors become one: the class token, or the mean of the patches",
                ("cls", "mean"),
            ),
            **RESIZER,
        },
        model_help="a hub name or a local folder of a ViT, DeiT, DINOv2, Swin, ...",
        sides=("image",),
    ),
    "minilm": EncoderSpec(
        "feats.encoders.minilm", "all-MiniLM-L6-v2 (offline), text", "all-MiniLM-L6-v2", sides=("text",)
    ),
    "efficientnet": EncoderSpec(
        "feats.encoders.efficientnet_lite",
        "EfficientNet-Lite (offline), image",
        "lite2",
        options=RESIZER,
        model_help="lite0, lite1 or lite2",
        # bf16 gains a third only, and takes single pictures to a cosine of 0.999 to fp32
        auto_dtype="fp32",
        sides=("image",),
    ),
    "vader": EncoderSpec(
        "feats.encoders.vader",
        "VADER sentiment scores (offline), text",
        "vader",
        text_clean="none",
        auto_dtype="fp32",
        trainable=False,
        sides=("text",),
        takes_weights=False,
        tokens=False,
    ),
    "ngrams": EncoderSpec(
        "feats.encoders.ngrams",
        "hashed character n-grams (offline), text",
        "ngrams",
        options={
            "columns": Option(
                4096, "the features' width, into which the n-grams are hashed", metavar="D", flag="hash-columns"
            )
        },
        auto_dtype="fp32",
        trainable=False,
        sides=("text",),
        takes_weights=False,
        tokens=False,
    ),
    "pixels": EncoderSpec(
        "feats.encoders.pixels",
        "the pixels themselves (offline), image",
        "pixels",
        options={
            "size": Option(224, "the square's side, to which pictures are resized and cropped", metavar="PIXELS"),
            **RESIZER,
        },
        auto_dtype="fp32",
        sides=("image",),
        takes_weights=False,
    ),
}

# Of each side those whose weights come with a package, or that have none, the nearest to a learned encoder first.
OFFLINE = {"image": ("efficientnet", "pixels"), "text": ("minilm", "ngrams", "vader")}


def load_encoder(
    name: str,
    model: str | None = None,
    weights: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "fp32",
    tokens: bool = False,
    trainable: bool = False,
    expected_sha256: str | None = None,
    **options: str | int,
) -> Encoder:
    """Load the encoder `name` of `ENCODERS` in eval mode on `device`; only its own backend is imported.

    `device` and `dtype` may be given by name, as on the command line: "auto", "cuda", ...; "auto", "fp32", "bf16",
    "fp16". With `tokens` its sides also give token vectors. With `trainable` its networks' parameters require
    gradients, nothing is folded away, and the weights stay float32; computing in less is `torch.autocast`'s affair.
    `expected_sha256` is what `identity["weights_sha256"]` must become. Where `weights` is the folder of a saved
    encoder, or a run that holds one (see `feats.encoders.saved.find_saved`), the model, the cleaning level
    and those options that aren't given are the saved one's.

    Raises `UsageError` for an unknown name, model or option, a device or dtype that can't be used, when the weights
    can't be had, and, before they are opened, when they aren't the expected ones; also for a model or option other
    than the saved encoder's.
    """
    from feats.acceleration import DTYPES, resolve_device, resolve_dtype
    from feats.encoders.base import Loading
    from feats.encoders.saved import find_saved, read_saved

    spec = ENCODERS.get(name)
    if spec is None:
        raise UsageError(f"unknown encoder {name!r}; there are {', '.join(ENCODERS)}")
    unknown = options.keys() - spec.options.keys()
    if unknown:
        raise UsageError(f"encoder {name!r} has no option {', '.join(sorted(unknown))}; it has {list(spec.options)}")
    if isinstance(device, str):
        device = resolve_device(device)
    if isinstance(dtype, str):
        dtype = resolve_dtype(spec.auto_dtype if dtype == "auto" and spec.auto_dtype else dtype, device)
    if trainable and dtype != DTYPES["fp32"]:
        raise UsageError(
            "trainable weights stay float32, so `dtype` must be fp32; to compute in less, run under torch.autocast"
        )
    folder = find_saved(Path(weights).expanduser(), name) if weights else None
    saved = read_saved(folder) if folder else None
    if saved:
        model, options, weights = saved.model_for(model), saved.options_with(options), str(folder)
    chosen = {key: options.get(key, option.default) for key, option in spec.options.items()}
    encoder: Encoder = import_module(spec.module).load(
        model or spec.default_model,
        weights,
        Loading(device, dtype, tokens, trainable, expected_sha256),
        **{key: value for key, value in chosen.items() if key not in RESIZER},
    )
    encoder.identity = {"encoder": name, **encoder.identity}
    if chosen.get("resizer", "pil") != "pil":
        encoder = _resized_by(encoder, str(chosen["resizer"]))
    if saved:
        encoder.identity["model"] = saved.model  # not the folder's name
    encoder.options = chosen
    encoder.text_clean = saved.text_clean if saved else spec.text_clean
    return encoder


def _resized_by(encoder: Encoder, resizer: str) -> Encoder:
    """The encoder with its pictures resized by something else, which its identity says: fingerprints of caches that
    PIL resized stay as they are."""
    from feats.images import ResizeCrop

    side = encoder.image_side()
    assert isinstance(side.preprocess, ResizeCrop)
    if resizer not in RESIZER["resizer"].choices:
        raise UsageError(f"unknown `resizer` {resizer!r}; there are {', '.join(RESIZER['resizer'].choices)}")
    image = replace(side, preprocess=replace(side.preprocess, resizer=resizer))
    return replace(encoder, image=image, identity={**encoder.identity, "resizer": resizer})
