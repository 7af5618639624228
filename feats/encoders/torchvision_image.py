"""torchvision image encoders: the ResNet and Vision Transformer families, with the preprocessing of their weights."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import torch
import torchvision
from torchvision.models import ResNet, VisionTransformer, WeightsEnum, get_model, get_model_weights, list_models

from feats.encoders.base import Blocks, Encoder, Features, ImageSide, Loading, count_parameters
from feats.encoders.convolutional import fold_batch_norms, load_strictly, pool_map
from feats.encoders.stack import map_tokens, stacked
from feats.encoders.weights import save_weights, sha256_of, unobtainable, verified_sha256, weights_at
from feats.errors import UsageError, first_line
from feats.images import ResizeCrop
from feats.tensor_files import safetensors_metadata

FAMILIES = ("resnet", "resnext", "wide_resnet", "vit_")
PREPROCESSED_AS = "preprocessed_as"  # in a saved file's metadata: the weights name whose preprocessing it goes on with
STALL_SECONDS = 15  # a download that hears nothing for this long is given up


def load(model: str, weights: str | None, how: Loading, *, layer: str) -> Encoder:
    """Load a torchvision classifier as an encoder.

    `weights` is one of the model's torchvision weights (`IMAGENET1K_V1`, ...), a state-dict file (.pth, .pt,
    .safetensors), which gets the default weights' preprocessing, or the folder of a saved encoder, which keeps its own;
    without it the default weights are looked for in torch hub's cache, then downloaded. `layer` is `pooled` (ResNet:
    the last map's mean; ViT: the class token after the final LayerNorm), (B, D) float32, or `logits`, (B, 1000). With
    `tokens` also the last map's positions, row by row (ResNet: (B, 49, D)), or the patch tokens after the final
    LayerNorm (ViT: (B, 196, D)).

    Raises `UsageError` for an unknown model or weights name, weights of another model, or none to be had.
    """
    supported = [name for name in list_models(module=torchvision.models) if name.startswith(FAMILIES)]
    if model not in supported:
        raise UsageError(f"unknown torchvision model {model!r}; there are {', '.join(supported)}")
    entry, path = find_weights(model, weights)
    weights_sha256 = verified_sha256(path, how.expected_sha256)
    entry = _entry_saved_in(path, entry)
    options = {"image_size": entry.meta["min_size"][0]} if model.startswith("vit_") else {}
    network = get_model(model, weights=None, **options)
    load_strictly(network, path, model)
    network.eval().requires_grad_(how.trainable)
    n_parameters = count_parameters(network)
    is_resnet = isinstance(network, ResNet)
    if is_resnet and not how.trainable:
        fold_batch_norms(network)
    memory_format = torch.channels_last if is_resnet else torch.preserve_format
    network.to(device=how.device, dtype=how.dtype, memory_format=memory_format)

    def save(folder: Path) -> None:
        save_weights(folder, network.state_dict(), {PREPROCESSED_AS: entry.name})

    forward, blocks = (_resnet if is_resnet else _vit)(network, layer, how)
    preset = entry.transforms()
    preprocess = ResizeCrop(preset.resize_size[0], preset.crop_size[0], preset.interpolation.value)
    return Encoder(
        identity={
            "model": model,
            "weights_sha256": weights_sha256,
            "layer": layer,
            "preprocess": preprocess.as_json(preset.mean, preset.std),
        },
        loading=how,
        image=ImageSide(
            preprocess=preprocess,
            mean=preset.mean,
            std=preset.std,
            forward=forward,
            network=network,
            n_parameters=n_parameters,
            channels_last=is_resnet,
            blocks=blocks,
        ),
        save=save if how.trainable else None,
    )


# -- weights ---------------------------------------------------------------------------------------------------


def find_weights(model: str, weights: str | None) -> tuple[WeightsEnum, Path]:
    """The torchvision weights entry, which knows the preprocessing, and the file.

    Raises `UsageError` for a name or file that isn't there, and when neither cache nor download gives it.
    """
    entries = get_model_weights(model)
    if weights is None or weights in entries.__members__:
        entry = entries[weights or "DEFAULT"]
        return entry, _cached_or_downloaded(model, entry)
    path = weights_at(Path(weights).expanduser())
    if not path.is_file():
        names = ", ".join(entries.__members__)
        raise UsageError(f"`weights` {weights}: no such file, and {model} has only the weights {names}")
    return entries.DEFAULT, path


def _entry_saved_in(path: Path, default: WeightsEnum) -> WeightsEnum:
    """The weights that a saved encoder's file names, else `default`. Raises `UsageError` for another model's."""
    name = safetensors_metadata(path).get(PREPROCESSED_AS)
    entries = {entry.name: entry for entry in type(default)}
    if name is None:
        return default
    if name not in entries:
        raise UsageError(
            f"{path} is preprocessed as {name}, and the model has only {', '.join(entries)}; give the "
            "model that the file was saved from"
        )
    return entries[name]


def _cached_or_downloaded(model: str, entry: WeightsEnum) -> Path:
    name = Path(urlparse(entry.url).path).name
    cached = Path(torch.hub.get_dir(), "checkpoints", name)
    digest = Path(name).stem.rpartition("-")[2]  # torchvision's file names end in the head of their sha256
    if cached.is_file():
        if not sha256_of(cached).startswith(digest):
            raise UsageError(f"{cached} is damaged: its sha256 doesn't start with {digest}; delete it and run again")
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with _impatient():
            torch.hub.download_url_to_file(entry.url, str(cached), hash_prefix=digest)
    except (OSError, RuntimeError) as error:  # no network, no space; RuntimeError: another hash than expected
        tried = [f"torch hub's cache {cached} (not there)", f"{entry.url} ({first_line(error)})"]
        raise unobtainable(f"torchvision {model} {entry.name}", tried, torch_hub=True) from error
    return cached


@contextmanager
def _impatient() -> Iterator[None]:
    """Give up on a silent network; torch's download knows no time limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# -- running ---------------------------------------------------------------------------------------------------


def _resnet(network: ResNet, layer: str, how: Loading) -> tuple[Callable[[torch.Tensor], Features], Blocks]:
    blocks = (*network.layer1, *network.layer2, *network.layer3, *network.layer4)

    def begin(pixels: torch.Tensor) -> torch.Tensor:
        grid: torch.Tensor = network.maxpool(network.relu(network.bn1(network.conv1(pixels))))
        return grid

    def end(grid: torch.Tensor, pixels: torch.Tensor | None) -> Features:
        feats = pool_map(grid)  # of (B, D, 7, 7)
        if layer == "logits":
            feats = network.fc(feats.to(grid.dtype))
        return {"feats": feats, "tokens": map_tokens(grid)} if how.tokens else {"feats": feats}

    return stacked(
        blocks,
        after=("fc.",),
        begin=begin,
        step=lambda i, grid: blocks[i](grid),
        end=end,
        entering=lambda k: how.dtype,
        maps=True,
    )


def _vit(network: VisionTransformer, layer: str, how: Loading) -> tuple[Callable[[torch.Tensor], Features], Blocks]:
    blocks = tuple(network.encoder.layers)

    def begin(pixels: torch.Tensor) -> torch.Tensor:
        patches = map_tokens(network.conv_proj(pixels))  # (B, P, D)
        sequence = torch.cat([network.class_token.expand(len(pixels), -1, -1), patches], 1)
        embedded: torch.Tensor = network.encoder.dropout(sequence + network.encoder.pos_embedding)
        return embedded

    def end(sequence: torch.Tensor, pixels: torch.Tensor | None) -> Features:
        sequence = network.encoder.ln(sequence)
        feats = sequence[:, 0]
        if layer == "logits":
            feats = network.heads(feats)
        return {"feats": feats, "tokens": sequence[:, 1:]} if how.tokens else {"feats": feats}

    return stacked(
        blocks,
        after=("encoder.ln.", "heads."),
        begin=begin,
        step=lambda i, sequence: blocks[i](sequence),
        end=end,
        entering=lambda k: how.dtype,
    )
