"""Any Hugging Face text encoder: BERT, RoBERTa, their kin, the encoder half of T5 and BART, causal models by mean."""

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi, constants as hub_constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from feats.encoders.base import Blocks, Encoder, Features, Loading, TextSide, Tokens, masked_mean, on_device
from feats.encoders.hidden_layers import find_layers
from feats.encoders.saved import RECORD
from feats.encoders.weights import HUB_TIMEOUT, sha256_of, unobtainable, verified_sha256, weight_files
from feats.errors import UsageError, first_line
from feats.escapes import short_name
from feats.json_files import read_json
from feats.leftovers import temporary_folder

FALLBACK_LENGTH = 512  # for models that state no limit: relative positions, a tokenizer with a sentinel
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "*.model")


@dataclass(frozen=True)
class Kind:
    """What a model folder is to hold: in words, an example of it on the hub, and whether a tokenizer belongs to it."""

    words: str
    example: str
    tokenizer: bool


TEXT = Kind("a text encoder", "roberta-base", tokenizer=True)


def load(model: str, weights: str | None, how: Loading, *, pooling: str) -> Encoder:
    """Load the text encoder `model`: a local folder, or a name looked for in the hub's cache, then on the hub.

    `weights` overrides it: a model folder, or a weights file, whose configuration and tokenizer come from beside it,
    else from `model`. Features are (B, D) float32, pooled in float32 over all tokens, special ones included; with
    `tokens` also the last layer's vectors (B, longest, D). `pooling` is `mean`, `cls`, `pooler` or `last4` (the
    masked mean of the sum of the last four layers, as in the feature-based runs of Devlin et al., BERT, 2019).

    Raises `UsageError` when the model can't be had or isn't a text encoder, and for a pooling it can't do: `pooler`
    without trained pooler weights, `cls` without a leading class token, `last4` with fewer than four layers.
    """
    folder, weights_file = find_model(model, weights)
    name = model_name(model, weights, folder, weights_file)
    return load_folder(folder, weights_file, how, name=name, pooling=pooling)


def load_folder(
    folder: Path,
    weights_file: Path | None,
    how: Loading,
    *,
    name: str,
    pooling: str,
    max_length: int | None = None,
    normalize: bool = False,
) -> Encoder:
    """The encoder in `folder`, with the weights of `weights_file` if given. `max_length` shortens the model's own
    limit; `normalize` scales the pooled vectors to length one. See `load` for the rest."""
    # Rows are tokenised in forked workers; the tokenizers' threads don't survive a fork, and they say so on stderr.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    weights_sha256 = verified_sha256(weights_file or weights_in(folder), how.expected_sha256)
    tokenizer, network, missing = _read_folder(folder, weights_file)
    source = weights_file or folder
    whole, lacking = network, set(missing)
    if network.config.is_encoder_decoder:
        network = network.get_encoder()
        missing = [key for key in missing if not key.startswith("decoder.")]
    untrained = [key for key in missing if key.split(".")[0] == "pooler"]
    refuse_lost(source, network, set(missing) - set(untrained))
    if pooling == "pooler" and (untrained or getattr(network, "pooler", None) is None):
        raise UsageError(
            f"{source} holds no trained pooler weights, its pooled output would be random; "
            "use `pooling` mean, cls or last4"
        )
    if untrained:
        network.register_module("pooler", None)  # random weights that nothing uses
    nn.Module.to(network, device=how.device, dtype=how.dtype)
    network.train(False).requires_grad_(how.trainable)

    limit = _longest_input(tokenizer, network)
    if max_length is not None:
        limit = min(limit, max_length)
    tokenize = _Tokenize(tokenizer, limit)
    forward = _forward(network, tokenize.pad, how.device, pooling, how.tokens, normalize)
    _check(source, network, tokenize, forward, pooling)

    def save(target: Path) -> None:
        save_folder(whole, lacking, folder, target)

    return Encoder(
        identity={
            "model": name,
            "weights_sha256": weights_sha256,
            "tokenizer_sha256": _vocabulary_sha256(folder),
            "pooling": pooling + (", normalised" if normalize else ""),
            "max_length": limit,
        },
        loading=how,
        text=TextSide(
            tokenize=tokenize,
            forward=forward,
            network=network,
            blocks=_blocks(network, tokenize, forward, pooling, how),
            padding=tokenize.pad,
        ),
        save=save if how.trainable else None,
    )


# -- where the model is ----------------------------------------------------------------------------------------


def find_model(model: str, weights: str | None, kind: Kind = TEXT) -> tuple[Path, Path | None]:
    """The model folder, and the weights file where that isn't the folder's own. Raises `UsageError` if not found."""
    if weights is None:
        return find_folder(model, kind), None
    path = Path(weights).expanduser()
    if path.is_dir():
        return find_folder(str(path), kind), None
    if not path.is_file():
        raise UsageError(f"`weights` {weights}: no such file or folder; expected a model folder or its weights file")
    beside = not _lacking(path.parent, kind, with_weights=False)
    return path.parent if beside else find_folder(model, kind, with_weights=False), path


def model_name(model: str, weights: str | None, folder: Path, weights_file: Path | None) -> str:
    """What `find_model` found, as the fingerprint calls it. A hub snapshot's folder is named by a hash; folders the
    user gave are named by themselves, wherever they lie."""
    overridden = weights is not None and (weights_file is None or weights_file.parent == folder)
    return folder.resolve().name if overridden or Path(model).expanduser().is_dir() else model


def find_folder(model: str, kind: Kind = TEXT, with_weights: bool = True) -> Path:
    """A folder with configuration, tokenizer (of texts' models) and weights: `model` itself, the hub's cache, a
    download from the hub.

    Raises `UsageError` for a folder that isn't there or lacks files, and when neither cache nor hub has the model.
    """
    local = Path(model).expanduser()
    if local.is_dir():
        if lacking := _lacking(local, kind, with_weights):
            raise UsageError(
                f"model folder {local} lacks {', '.join(lacking)}; give a folder as save_pretrained makes it"
            )
        return local
    if local.exists() or model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise UsageError(f"no model folder at {local}; give an existing folder or a hub name such as {kind.example}")
    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        raise UsageError(
            f"{model!r} is no hub name and no folder; expected NAME, OWNER/NAME or an existing folder"
        ) from None

    tried = [f"local folder {model} (not there)"]
    if isinstance(cached, str):
        folder = Path(cached).parent
        lacking = _lacking(folder, kind, with_weights)
        if not lacking:
            return folder
        tried.append(f"the hub's cache {folder} (lacks {', '.join(lacking)})")
    else:
        tried.append(f"the hub's cache {hub_constants.HF_HUB_CACHE} (nothing of {model})")
    try:
        with quiet(progress=True):
            # One unrepeated question first: without a network it fails at once, where a download would wait and retry.
            entries = HfApi().model_info(model, timeout=HUB_TIMEOUT).siblings
            wanted = _wanted([entry.rfilename for entry in entries or ()], with_weights)
            folder = Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as error:  # the hub's http library, and with it the exceptions, differ between its versions
        tried.append(f"the hub {hub_constants.ENDPOINT} ({type(error).__name__}: {first_line(error)})")
        raise unobtainable(model, tried) from error
    if lacking := _lacking(folder, kind, with_weights):
        raise UsageError(f"{model} on the hub lacks {', '.join(lacking)}; choose another model")
    return folder


def _lacking(folder: Path, kind: Kind, with_weights: bool) -> list[str]:
    """What a model folder needs and `folder` hasn't, in words."""
    lacking = [] if (folder / "config.json").is_file() else ["config.json"]
    if kind.tokenizer and not _vocabulary(folder):
        lacking.append(f"tokenizer files ({', '.join(VOCABULARIES)})")
    if with_weights:
        indices = (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json")
        index = next((file for file in indices if file.is_file()), None)
        told = read_json(index, "fetch the model again", {"weight_map": {str: str}}) if index else {"weight_map": {}}
        lacking += [
            short_name(shard) for shard in sorted(set(told["weight_map"].values())) if not _is_inside(folder, shard)
        ]
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
            lacking.append("weights (*.safetensors or pytorch_model*.bin)")
    return lacking


def _is_inside(folder: Path, shard: str) -> bool:
    """Whether a shard is a file of the folder itself, as all that save_pretrained writes are."""
    try:
        return Path(shard).name == shard and (folder / shard).is_file()
    except (OSError, ValueError):  # no file's name
        return False


def _wanted(files: Sequence[str], with_weights: bool) -> list[str]:
    """Which of a hub repository's files to download: one format of the weights, no conversions for other libraries."""
    top = [file for file in files if "/" not in file]
    wanted = [file for file in top if file.endswith((".json", ".txt", ".model"))]
    if with_weights:
        safe = [file for file in top if file.startswith("model") and file.endswith(".safetensors")]
        wanted += safe or [file for file in top if file.startswith("pytorch_model") and file.endswith(".bin")]
        if safe:
            wanted = [file for file in wanted if file != "pytorch_model.bin.index.json"]
    return wanted


def _vocabulary(folder: Path) -> list[Path]:
    return sorted({file for pattern in VOCABULARIES for file in folder.glob(pattern)})


def _vocabulary_sha256(folder: Path) -> str:
    """sha256 of tokenizer.json, which alone decides the tokens where there is one; else of the vocabulary files."""
    if (folder / "tokenizer.json").is_file():
        return sha256_of(folder / "tokenizer.json")
    return hashlib.sha256("".join(map(sha256_of, _vocabulary(folder))).encode()).hexdigest()


def weights_in(folder: Path) -> Path:
    """What transformers reads: model.safetensors where there is one; the shards or older files, named by the folder."""
    single = folder / "model.safetensors"
    if single.is_file():
        return single
    weight_files(folder)
    return folder


# -- loading ---------------------------------------------------------------------------------------------------


@contextmanager
def quiet(progress: bool = False) -> Iterator[None]:
    """Silence the warnings of transformers and the hub and, unless `progress`, their bars, for the block only."""
    levels = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    hide_bars = not progress and transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if hide_bars:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if hide_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _read_folder(
    folder: Path, weights_file: Path | None
) -> tuple[PreTrainedTokenizerBase, transformers.PreTrainedModel, list[str]]:
    """Tokenizer, model and the names of the weights that the checkpoint lacks, see `read_network`."""
    with _refused_if_unreadable(weights_file or folder, TEXT):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer, *read_network(folder, weights_file, TEXT)


def read_network(folder: Path, weights_file: Path | None, kind: Kind) -> tuple[transformers.PreTrainedModel, list[str]]:
    """The model, and the names of the weights that the checkpoint lacks (left random by transformers)."""
    with temporary_folder() as assembled, _refused_if_unreadable(weights_file or folder, kind):
        if weights_file is not None:
            # transformers reads folders: make one of the configuration and this file.
            safe = weights_file.suffix == ".safetensors"
            shutil.copy(folder / "config.json", assembled)
            os.symlink(weights_file.resolve(), Path(assembled, "model.safetensors" if safe else "pytorch_model.bin"))
        network, info = AutoModel.from_pretrained(
            assembled if weights_file else folder, output_loading_info=True, trust_remote_code=False
        )
    return network, list(info["missing_keys"])


@contextmanager
def _refused_if_unreadable(source: Path, kind: Kind) -> Iterator[None]:
    try:
        with quiet():
            yield
    except Exception as error:  # foreign files: the libraries under transformers raise anything at all
        raise UsageError(
            f"{source} can't be loaded as {kind.words} "
            f"({type(error).__name__}: {first_line(error)}); give a folder as save_pretrained makes it"
        ) from error


def refuse_lost(source: Path, network: nn.Module, lost: Set[str]) -> None:
    """Raise `UsageError` when weights that the model uses are `lost`: they would be random."""
    if lost:
        raise UsageError(
            f"{source} lacks {len(lost)} weights of its {type(network).__name__} ({min(lost)}, ...); "
            "give the checkpoint that belongs to this config.json"
        )


@contextmanager
def refused_if_failing(source: Path, network: nn.Module, kind: Kind) -> Iterator[None]:
    """Try a forward pass within: errors of a model that isn't of this kind become a `UsageError`."""
    try:
        with torch.no_grad():  # not inference mode: what a network keeps must serve training, too
            yield
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{source} holds a {type(network).__name__}, which doesn't work as {kind.words} "
            f"({type(error).__name__}: {first_line(error)}); give a model such as {kind.example}"
        ) from error


def _longest_input(tokenizer: PreTrainedTokenizerBase, network: nn.Module) -> int:
    """The most tokens the model takes, special ones included."""
    limits = [tokenizer.model_max_length]
    positions = getattr(network.config, "max_position_embeddings", None) or 0
    if positions > 0:
        # RoBERTa and its kin number positions from padding_idx + 1 and so lose the places below.
        tables = (module for name, module in network.named_modules() if name.endswith("position_embeddings"))
        padding = next((getattr(table, "padding_idx", None) for table in tables), None)
        limits.append(positions - (0 if padding is None else padding + 1))
    known = [limit for limit in limits if 0 < limit < 10**6]  # "no limit" is written as 1e30
    return int(min(known, default=FALLBACK_LENGTH))


def _check(
    source: Path,
    network: nn.Module,
    tokenize: "_Tokenize",
    forward: Callable[[list[list[int]]], Features],
    pooling: str,
) -> None:
    """Try one text; raises `UsageError` for a model that isn't a text encoder or can't be pooled this way."""
    ids = tokenize(["a"])[0].ids
    if pooling == "cls" and (tokenize.tokenizer.cls_token_id is None or ids[0] != tokenize.tokenizer.cls_token_id):
        raise UsageError(f"{source} puts no class token first, `pooling` cls means nothing here; use mean or last4")
    layers = getattr(network.config, "num_hidden_layers", 4)
    if pooling == "last4" and layers < 4:
        raise UsageError(f"{source} has {layers} layers, `pooling` last4 needs 4; use `pooling` mean")
    with refused_if_failing(source, network, TEXT):
        forward([ids])


# -- saving ----------------------------------------------------------------------------------------------------


def save_folder(network: transformers.PreTrainedModel, lacking: Collection[str], source: Path, target: Path) -> None:
    """Write a model folder, less the weights that the checkpoint itself was `lacking`: they are random, and nobody
    must take them for trained ones. The other files are copied from `source`: written anew they'd have other digests.
    """
    nn.Module.float(network)  # of an encoder half the decoder, which stayed as it was loaded
    state = {key: value for key, value in network.state_dict().items() if key not in lacking}
    with quiet():
        network.save_pretrained(target, state_dict=state)
    for name in _wanted([file.name for file in source.iterdir()], with_weights=False):
        if name not in ("config.json", RECORD) and not name.endswith(".index.json"):
            shutil.copyfile(source / name, target / name)


# -- running ---------------------------------------------------------------------------------------------------


class _Tokenize:
    """Texts -> `Tokens`, cut to `max_length` with the closing special token kept. Picklable."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        # GPT-like tokenizers have no padding token; the mask hides it, so any known id will do.
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(token for token in candidates if token is not None)

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        if not texts:
            return []
        ids = self._ids(texts)
        long = [i for i, row in enumerate(ids) if len(row) > self.max_length]
        if long:
            # Cut by the tokenizer, which knows where its special tokens belong.
            cut = self._ids([texts[i] for i in long], truncation=True, max_length=self.max_length)
            for i, row in zip(long, cut, strict=True):
                ids[i] = row
        truncated = set(long)
        # A tokenizer without special tokens makes nothing of an empty text: one padding token keeps it a row.
        return [Tokens(row or [self.pad], max(len(row), 1), i in truncated) for i, row in enumerate(ids)]

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        made = self.tokenizer(
            list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False, **options
        )
        ids: list[list[int]] = made["input_ids"]
        return ids


def _forward(
    network: nn.Module, pad: int, device: torch.device, pooling: str, tokens: bool, normalize: bool
) -> Callable[[list[list[int]]], Features]:
    def forward(ids: list[list[int]]) -> Features:
        longest = max(map(len, ids))
        padded = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
        lengths = torch.tensor([len(row) for row in ids])
        mask = on_device((torch.arange(longest) < lengths[:, None]).long(), device)  # (B, L)
        out = network(
            input_ids=on_device(padded, device),
            attention_mask=mask,
            output_hidden_states=pooling == "last4",
            return_dict=True,
        )
        hidden = out.last_hidden_state  # (B, L, D)
        if pooling == "mean":
            feats = masked_mean(hidden.float(), mask)
        elif pooling == "cls":
            feats = hidden[:, 0].float()
        elif pooling == "pooler":
            feats = out.pooler_output.float()
        else:
            feats = masked_mean(sum(layer.float() for layer in out.hidden_states[-4:]), mask)
        if normalize:
            feats = F.normalize(feats, dim=1)
        return {"feats": feats, "tokens": hidden} if tokens else {"feats": feats}

    return forward


def _blocks(
    network: nn.Module,
    tokenize: _Tokenize,
    forward: Callable[[list[list[int]]], Features],
    pooling: str,
    how: Loading,
) -> Blocks | None:
    """The network's layers as blocks; None where they can't be told apart, as tried on one text."""
    last_states = _forward(network, tokenize.pad, how.device, "mean", tokens=True, normalize=False)
    layers = find_layers(network, lambda: last_states([tokenize(["a"])[0].ids])["tokens"])
    if layers is None:
        return None
    count = len(layers.modules)

    def below(ids: list[list[int]], k: int) -> torch.Tensor:
        return layers.states_before(k, lambda: forward(ids))

    def above(hidden: torch.Tensor, ids: list[list[int]], k: int) -> Features:
        if pooling == "last4" and k > count - 3:
            raise UsageError(
                f"`pooling` last4 reads the last four of {count} blocks, whose outputs aren't there above a cut at "
                f"{k}; cut at {count - 3} or below, or use `pooling` mean"
            )
        with layers.entered_with(hidden.to(how.dtype), k):
            return forward(ids)

    return Blocks(layers.modules, layers.after, below, above, count - 3 if pooling == "last4" else None)
