"""OpenAI CLIP through the `clip` package: all nine models, weights in five formats.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
"""

import html
import warnings
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen
from zipfile import BadZipFile, ZipFile, is_zipfile

import ftfy
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms import Normalize

from feats.encoders.base import Blocks, Encoder, Features, ImageSide, Loading, TextSide, Tokens, on_device
from feats.encoders.stack import map_tokens, products_dtype, stacked
from feats.encoders.weights import (
    HUB_TIMEOUT,
    hub_reachable,
    save_weights,
    sha256_of,
    unobtainable,
    verified_sha256,
    weight_files,
)
from feats.errors import UsageError, first_line
from feats.escapes import short_name
from feats.images import ResizeCrop
from feats.json_files import read_json
from feats.tensor_files import SUFFIX, check_plain, read_pickled, read_safetensors
from feats.text import fix_text

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)
    from clip.clip import _MODELS, _download, _tokenizer, _transform
    from clip.model import CLIP, build_model
    from clip.simple_tokenizer import whitespace_clean

# Hub repositories that hold OpenAI's weights as safetensors, under open_clip's names.
HUB_REPOSITORIES = {
    "RN50": "timm/resnet50_clip.openai",
    "RN101": "timm/resnet101_clip.openai",
    "RN50x4": "timm/resnet50x4_clip.openai",
    "RN50x16": "timm/resnet50x16_clip.openai",
    "RN50x64": "timm/resnet50x64_clip.openai",
    "ViT-B/32": "timm/vit_base_patch32_clip_224.openai",
    "ViT-B/16": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L/14": "timm/vit_large_patch14_clip_224.openai",
    "ViT-L/14@336px": "timm/vit_large_patch14_clip_336.openai",
}
HUB_FILE = "open_clip_model.safetensors"
DEFAULT_MODEL = "ViT-B/32"
MAX_WORD = 2000  # letters; more tokens than the context holds, even where every one is 16 letters long
MAX_CACHED_WORDS = 100_000

StateDict = dict[str, torch.Tensor]


def load(model: str | None, weights: str | None, how: Loading) -> Encoder:
    """Load CLIP. With `tokens`, the image side also gives the last layer's patch vectors (B, P, width) after the final
    LayerNorm (ResNets: the last feature map, position-major), the text side the last layer's vectors (B, L, width)
    after the final LayerNorm.

    `weights` is a TorchScript archive that OpenAI published, a state dict (.pt or .safetensors), an open_clip
    checkpoint, a folder of a Hugging Face `CLIPModel` or of a saved encoder; without it the local caches, the hub and
    OpenAI's address are tried in this order.
    Raises `UsageError` for an unknown model, weights of another model than asked for, or none to be had.
    """
    unpublished = weights is not None and model is not None and model.startswith(UNPUBLISHED)
    if model is not None and model not in _MODELS and not unpublished:
        raise UsageError(f"unknown CLIP model {model!r}; there are {', '.join(_MODELS)}")
    path = Path(weights).expanduser() if weights else find_weights(model or DEFAULT_MODEL)
    if not path.exists():
        raise UsageError(f"no weights at {path}; `weights` wants a file or a folder of a Hugging Face CLIPModel")
    weights_sha256 = verified_sha256(path, how.expected_sha256)
    state = read_state_dict(path, weights_sha256)
    try:
        network = _network_of(state)
    except (AssertionError, KeyError, RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UsageError(f"{path} holds no CLIP model ({type(error).__name__}: {first_line(error)})") from None
    architecture = architecture_of(state)
    if model is not None and architecture != model:
        raise UsageError(f"{path} holds {architecture}, not {model}; leave out `model` or give the right weights")
    is_resnet = not hasattr(network.visual, "transformer")
    # In bf16 rounding errors add up over a ResNet's depth: cosines to fp32 fall below 0.999.
    _cast(network, how.dtype, image_side=not (is_resnet and how.dtype is torch.bfloat16))
    network = network.to(how.device).eval().requires_grad_(how.trainable)
    visual = network.visual
    del network.visual  # what is left is the text side: each has its own parameters, under OpenAI's names

    def save(folder: Path) -> None:
        images = {f"visual.{key}": value for key, value in visual.state_dict().items()}
        save_weights(folder, {**network.state_dict(), **images})

    resolution = visual.input_resolution
    preprocess = ResizeCrop(resolution, resolution, "bicubic")  # as the package's own transform
    normalise = next(step for step in _transform(resolution).transforms if isinstance(step, Normalize))
    image_forward, image_blocks = (_resnet if is_resnet else _vit)(visual, how.tokens)
    text_forward, text_blocks = _text(network, how.device, how.tokens)
    tokenize = _Tokenize(network.context_length)
    return Encoder(
        identity={
            "model": architecture,
            "weights_sha256": weights_sha256,
            "preprocess": preprocess.as_json(normalise.mean, normalise.std),
            "image_dtype": str(visual.conv1.weight.dtype).removeprefix("torch."),
        },
        loading=how,
        image=ImageSide(
            preprocess=preprocess,
            mean=normalise.mean,
            std=normalise.std,
            forward=image_forward,
            network=visual,
            channels_last=is_resnet,
            blocks=image_blocks,
        ),
        text=TextSide(
            tokenize=tokenize,
            forward=text_forward,
            network=network,
            blocks=text_blocks,
            padding=tokenize.end,  # not 0, with which the package pads: it is "!", and may carry a mood
        ),
        save=save if how.trainable else None,
    )


# -- weights ---------------------------------------------------------------------------------------------------


def find_weights(model: str) -> Path:
    """The weights file of one of the nine models: the clip package's cache, the hub's cache, the hub, OpenAI's address.

    Raises `UsageError` listing each place tried when none of them has it.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    url = _MODELS[model]
    cached = Path.home() / ".cache" / "clip" / Path(url).name
    tried = [f"the clip package's cache {cached}"]
    if cached.is_file():
        expected = _published_sha256(model)
        if sha256_of(cached) == expected:
            return cached
        tried[-1] += f" (its sha256 isn't {expected[:12]}...: damaged)"
    repository = HUB_REPOSITORIES[model]
    try:
        return Path(hf_hub_download(repository, HUB_FILE, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        tried.append(f"the hub's cache {constants.HF_HUB_CACHE} (nothing of {repository})")
    if hub_reachable():
        try:
            return Path(hf_hub_download(repository, HUB_FILE, etag_timeout=HUB_TIMEOUT))
        except Exception as error:  # noqa: BLE001 - the hub's http library and its exceptions differ by version
            tried.append(f"the hub, {constants.ENDPOINT}/{repository} ({type(error).__name__}: {first_line(error)})")
    else:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no answer"
        tried.append(f"the hub, {constants.ENDPOINT}/{repository} ({offline})")
    try:
        urlopen(Request(url, method="HEAD"), timeout=HUB_TIMEOUT).close()  # the package's download waits without end
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the damaged file is replaced
            return Path(_download(url, str(cached.parent)))
    except (OSError, HTTPException, RuntimeError, TypeError) as error:  # TypeError: an answer without a length
        tried.append(f"{url} ({first_line(error)})")
    raise unobtainable(f"CLIP {model}", tried)


def read_state_dict(path: Path, sha256: str) -> StateDict:
    """A CLIP state dict under OpenAI's names, from any of the five formats, of a file or folder with that digest.

    Raises `UsageError` if it is none of them, or a TorchScript archive that isn't one of OpenAI's nine: opening such
    an archive runs the code in it, which may do anything.
    """
    try:
        if not path.is_dir():
            check_plain(path, "give CLIP weights")
        if path.is_dir():
            state: Any = {}
            for file in weight_files(path):
                state |= _read_tensors(file)
        elif path.suffix == SUFFIX:
            state = _read_tensors(path)
        elif _is_archive(path):
            if sha256 not in {_published_sha256(name) for name in _MODELS}:
                # The load named here is for users to run themselves, on a file they trust; it is never done for them.
                raise UsageError(
                    f"{path} is a TorchScript archive that OpenAI didn't publish (sha256 {sha256}); opening it would "
                    "run whatever code is in it. Give its weights alone: where you trust its author, "
                    'torch.save(torch.jit.load(PATH, map_location="cpu").state_dict(), "weights.pt")'
                )
            state = _load_archive(path)
        else:
            state = _read_tensors(path)
        if isinstance(state.get("state_dict"), dict):  # open_clip's training checkpoints
            state = state["state_dict"]
        weights: StateDict = {
            key.removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)
        }
        if "text_model.embeddings.token_embedding.weight" in weights:
            _check_config(path if path.is_dir() else path.parent)
            weights = _from_hugging_face(weights)
    except KeyError as error:
        raise UsageError(f"{path} holds no whole CLIP model: {error} is missing") from None
    except (
        BadZipFile,
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        AttributeError,
        TypeError,
    ) as error:
        raise UsageError(f"{path} can't be read as CLIP weights ({first_line(error)})") from None
    return weights


def _published_sha256(model: str) -> str:
    """The digest of OpenAI's file, which its address holds."""
    return str(_MODELS[model]).split("/")[-2]


def _is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, by what torch itself tells them by; nothing of it is run."""
    if not is_zipfile(path):
        return False
    with ZipFile(path) as file:
        return any(name.endswith("constants.pkl") for name in file.namelist())


def _load_archive(path: Path) -> StateDict:
    """The state dict of a TorchScript archive. Runs the archive's own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated; OpenAI's files aren't rewritten
        state: StateDict = torch.jit.load(path, map_location="cpu").state_dict()
    return state


def _read_tensors(path: Path) -> StateDict:
    """A state dict of either kind of file; no code of a pickle is run."""
    remedy = "give CLIP weights"
    state = read_safetensors(path, remedy) if path.suffix == SUFFIX else read_pickled(path, remedy)
    if not isinstance(state, dict):
        raise UsageError(f"{path} can't be read as CLIP weights (a {type(state).__name__}, no state dict); {remedy}")
    return state


def _check_config(folder: Path) -> None:
    """Refuse what a Hugging Face config.json has and OpenAI's models haven't: the weights' shapes don't show it."""
    if not (folder / "config.json").is_file():
        return
    shape = {"hidden_act?": str, "num_attention_heads?": int, "hidden_size?": int}
    config = read_json(
        folder / "config.json", "give a CLIPModel's folder", {"text_config?": shape, "vision_config?": shape}
    )
    for side in ("text_config", "vision_config"):
        activation = config.get(side, {}).get("hidden_act", "quick_gelu")
        if activation != "quick_gelu":
            raise UsageError(
                f"{folder} uses {short_name(activation)} in its {side}; OpenAI's CLIP has quick_gelu: another model"
            )
        heads, width = (config.get(side, {}).get(key) for key in ("num_attention_heads", "hidden_size"))
        if heads and width and width != 64 * heads:
            raise UsageError(f"{folder} has {heads} heads in its {side} of width {width}; OpenAI's CLIP has width / 64")


def _from_hugging_face(state: StateDict) -> StateDict:
    """Rename a `transformers.CLIPModel` state dict to OpenAI's names (q, k and v are stacked there)."""
    out = {
        "logit_scale": state["logit_scale"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
    }
    for part in ("weight", "bias"):
        out[f"ln_final.{part}"] = state[f"text_model.final_layer_norm.{part}"]
        out[f"visual.ln_pre.{part}"] = state[f"vision_model.pre_layrnorm.{part}"]
        out[f"visual.ln_post.{part}"] = state[f"vision_model.post_layernorm.{part}"]
    renamed = {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for theirs, ours in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        layers = {int(key.split(".")[3]) for key in state if key.startswith(f"{theirs}.encoder.layers.")}
        for i in layers:
            source, target = f"{theirs}.encoder.layers.{i}", f"{ours}.resblocks.{i}"
            for part in ("weight", "bias"):
                for old, new in renamed.items():
                    out[f"{target}.{new}.{part}"] = state[f"{source}.{old}.{part}"]
                out[f"{target}.attn.in_proj_{part}"] = torch.cat(
                    [state[f"{source}.self_attn.{x}_proj.{part}"] for x in "qkv"]
                )
    return out


UNPUBLISHED = "custom "  # how the names of other architectures begin
# resolution, patch size (0: ResNet), vision width, vision layers, embedding width
_ARCHITECTURES = {
    (224, 0, 64, (3, 4, 6, 3), 1024): "RN50",
    (224, 0, 64, (3, 4, 23, 3), 512): "RN101",
    (288, 0, 80, (4, 6, 10, 6), 640): "RN50x4",
    (384, 0, 96, (6, 8, 18, 8), 768): "RN50x16",
    (448, 0, 128, (3, 15, 36, 10), 1024): "RN50x64",
    (224, 32, 768, 12, 512): "ViT-B/32",
    (224, 16, 768, 12, 512): "ViT-B/16",
    (224, 14, 1024, 24, 768): "ViT-L/14",
    (336, 14, 1024, 24, 768): "ViT-L/14@336px",
}


def _network_of(state: StateDict) -> CLIP:
    """The network with the weights of `state`, in fp32, exactly: `build_model` alone rounds them to fp16."""
    weights = dict(state)
    network = build_model(weights).float()  # takes out of `weights` what are no parameters
    network.load_state_dict(weights)
    return network


def architecture_of(state: StateDict) -> str:
    """The name of the model a state dict holds, read off its shapes; its measures if it is none of the nine."""
    width = state["text_projection"].shape[1]
    if "visual.proj" in state:
        patch = state["visual.conv1.weight"].shape[-1]
        positions = state["visual.positional_embedding"].shape[0] - 1
        layers: Any = len({key.split(".")[3] for key in state if key.startswith("visual.transformer.resblocks.")})
        vision_width = state["visual.conv1.weight"].shape[0]
    else:
        patch = 0
        positions = state["visual.attnpool.positional_embedding"].shape[0] - 1
        layers = tuple(
            len({key.split(".")[2] for key in state if key.startswith(f"visual.layer{i}.")}) for i in (1, 2, 3, 4)
        )
        vision_width = state["visual.layer1.0.conv1.weight"].shape[0]
    resolution = round(positions**0.5) * (patch or 32)
    measures = (resolution, patch, vision_width, layers, width)
    return _ARCHITECTURES.get(measures, UNPUBLISHED + " ".join(map(str, measures)))


# -- forward passes --------------------------------------------------------------------------------------------


def _cast(network: CLIP, dtype: torch.dtype, image_side: bool) -> None:
    """What `clip.model.convert_weights` does for fp16, for any dtype: products in `dtype`, all norms in fp32."""
    for place, module in network.named_modules():
        if place.startswith("visual") and not image_side:
            continue
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear, nn.MultiheadAttention)):
            module.to(dtype)
        for name in ("text_projection", "proj"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                getattr(module, name).data = getattr(module, name).data.to(dtype)


def _layer_norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """LayerNorm in fp32 whatever the dtype of `x`. CPU kernels take a bf16 `x` with fp32 weights in one pass; the
    package's own module casts there and back."""
    if x.device.type == "cpu":
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    normed: torch.Tensor = norm(x)
    return normed


def _in_proj(attention: Any, x: torch.Tensor) -> torch.Tensor:
    """Query, key and value of x (B, L, width) side by side, (B, L, 3 * width)."""
    if isinstance(attention, nn.MultiheadAttention):
        return F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    projected: torch.Tensor = attention.in_proj(x)  # layers that must be called: they carry adapters
    return projected


def _residual_block(block: Any, x: torch.Tensor, causal: bool) -> torch.Tensor:
    """A block of `clip.model.Transformer` on x (B, L, width). The package's works on (L, B, width), through
    `nn.MultiheadAttention`, which copies x into another layout several times a layer."""
    q, k, v = _heads(block, x)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    return _mixed_in(block, x, mixed.reshape(x.shape))


def _last_block(block: Any, x: torch.Tensor, read: torch.Tensor, causal: bool) -> torch.Tensor:
    """What `_residual_block` gives at position read[b] of each row b, (B, width): a quarter of its products."""
    q, k, v = _heads(block, x)
    rows = torch.arange(len(x), device=x.device)
    seen = torch.arange(x.shape[1], device=x.device) <= read[:, None] if causal else None  # (B, L)
    mask = None if seen is None else seen[:, None, None]
    mixed = F.scaled_dot_product_attention(q[rows, :, read][:, :, None], k, v, attn_mask=mask)  # (B, heads, 1, d)
    return _mixed_in(block, x[rows, read], mixed.flatten(1))


def _heads(block: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value of a block's attention, each (B, heads, L, d)."""
    batch, length, _ = x.shape
    qkv = _in_proj(block.attn, _layer_norm(block.ln_1, x))
    return qkv.view(batch, length, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()


def _mixed_in(block: Any, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """What leaves a block, of what entered it and of what its heads give, both (..., width)."""
    x = x + block.attn.out_proj(mixed)
    hidden = block.mlp.c_fc(_layer_norm(block.ln_2, x))
    gate = (hidden * 1.702).sigmoid_()  # QuickGELU
    mapped: torch.Tensor = block.mlp.c_proj(gate * hidden if gate.requires_grad else gate.mul_(hidden))
    return x + mapped


def _vit(visual: Any, tokens: bool) -> tuple[Callable[[torch.Tensor], Features], Blocks]:
    blocks = tuple(visual.transformer.resblocks)

    def begin(pixels: torch.Tensor) -> torch.Tensor:
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)  # (B, P, width)
        start = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        return _layer_norm(visual.ln_pre, torch.cat([start, x], 1) + visual.positional_embedding.to(x.dtype))

    def end(x: torch.Tensor, pixels: torch.Tensor | None) -> Features:
        if not tokens:
            return {"feats": _layer_norm(visual.ln_post, x[:, 0]) @ visual.proj}
        x = _layer_norm(visual.ln_post, x)
        return {"feats": x[:, 0] @ visual.proj, "tokens": x[:, 1:]}

    def read(x: torch.Tensor, pixels: torch.Tensor | None) -> Features:
        first = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return {"feats": _layer_norm(visual.ln_post, _last_block(blocks[-1], x, first, causal=False)) @ visual.proj}

    return stacked(
        blocks,
        after=("ln_post.", "proj"),
        begin=begin,
        step=lambda i, x: _residual_block(blocks[i], x, causal=False),
        end=end,
        entering=lambda k: products_dtype(visual.conv1.weight),
        read=None if tokens else read,
    )


def _resnet(visual: Any, tokens: bool) -> tuple[Callable[[torch.Tensor], Features], Blocks]:
    visual.to(memory_format=torch.channels_last)
    blocks = (*visual.layer1, *visual.layer2, *visual.layer3, *visual.layer4)
    dtype = visual.conv1.weight.dtype

    def begin(pixels: torch.Tensor) -> torch.Tensor:
        x = visual.relu1(visual.bn1(visual.conv1(pixels.to(dtype))))
        x = visual.relu2(visual.bn2(visual.conv2(x)))
        x = visual.relu3(visual.bn3(visual.conv3(x)))
        pooled: torch.Tensor = visual.avgpool(x)
        return pooled

    def end(grid: torch.Tensor, pixels: torch.Tensor | None) -> Features:
        feats = visual.attnpool(grid)
        return {"feats": feats, "tokens": map_tokens(grid)} if tokens else {"feats": feats}

    return stacked(
        blocks,
        after=("attnpool.",),
        begin=begin,
        step=lambda i, grid: blocks[i](grid),
        end=end,
        entering=lambda k: dtype,
        maps=True,
    )


class _Tokenize:
    """Texts to CLIP's tokens, as `clip.tokenize(truncate=True)` makes them, without its padding."""

    def __init__(self, context_length: int):
        self.context_length = context_length
        self.start = _tokenizer.encoder["<|startoftext|>"]
        self.end = _tokenizer.encoder["<|endoftext|>"]

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> Tokens:
        # `_tokenizer.encode`, but for what nobody needs: tokens beyond the context, and byte pairs of endless words,
        # whose search takes time with the square of their length. Its cache of words would grow for ever.
        room = self.context_length - 2
        body: list[int] = []
        for word in _tokenizer.pat.findall(whitespace_clean(_basic_clean(text)).lower()):
            letters = "".join(_tokenizer.byte_encoder[byte] for byte in word[:MAX_WORD].encode())
            body += [_tokenizer.encoder[token] for token in _tokenizer.bpe(letters).split(" ")]
            if len(body) > room:
                break
        if len(_tokenizer.cache) > MAX_CACHED_WORDS:
            _tokenizer.cache.clear()
            _tokenizer.cache |= {special: special for special in ("<|startoftext|>", "<|endoftext|>")}
        ids = np.array([self.start, *body[:room], self.end], np.int64)
        return Tokens(ids, len(ids), len(body) > room)


def _basic_clean(text: str) -> str:
    """The package's `basic_clean`."""
    return html.unescape(html.unescape(fix_text(text, ftfy.TextFixerConfig(explain=False)))).strip()


def _text(network: CLIP, device: torch.device, tokens: bool) -> tuple[Callable[[list[Any]], Features], Blocks]:
    """The text tower is causal and is read at the end token, so positions after the longest text change nothing:
    they are cut off, where `CLIP.encode_text` computes all 77."""
    blocks = tuple(network.transformer.resblocks)
    dtype = network.text_projection.dtype

    def begin(ids: list[Any]) -> torch.Tensor:
        padded = on_device(pad_sequence([torch.from_numpy(i) for i in ids], batch_first=True), device)  # (B, L)
        positions = network.positional_embedding[: padded.shape[1]]
        embedded: torch.Tensor = network.token_embedding(padded).to(dtype) + positions.to(dtype)  # (B, L, width)
        return embedded

    def last_positions(ids: list[Any]) -> torch.Tensor:
        return on_device(torch.tensor([len(i) for i in ids]), device) - 1

    def end(x: torch.Tensor, ids: list[Any]) -> Features:
        ends = torch.arange(len(ids), device=device), last_positions(ids)
        if not tokens:
            return {"feats": _layer_norm(network.ln_final, x[ends]) @ network.text_projection}
        x = _layer_norm(network.ln_final, x)
        return {"feats": x[ends] @ network.text_projection, "tokens": x}

    def read(x: torch.Tensor, ids: list[Any]) -> Features:
        x = _last_block(blocks[-1], x, last_positions(ids), causal=True)
        return {"feats": _layer_norm(network.ln_final, x) @ network.text_projection}

    return stacked(
        blocks,
        after=("ln_final.", "text_projection", "logit_scale"),
        begin=begin,
        step=lambda i, x: _residual_block(blocks[i], x, causal=True),
        end=end,
        entering=lambda k: dtype,
        read=None if tokens else read,
    )
