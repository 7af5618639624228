"""Encoders saved after training: a folder each, with what `load_encoder` must be told to load it again.

<folder>/encoder.json               encoder, model, options, identity; written last
<folder>/model.safetensors, ...     what the encoder's backend takes as `weights`
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from feats.encoders.base import Encoder
from feats.encoders.weights import sha256_of
from feats.errors import UsageError
from feats.json_files import read_json
from feats.writing import cant_write, write_json

RECORD = "encoder.json"
FORMAT_VERSION = 1
SHAPE = {"format_version": int, "encoder": str, "model": str, "options": {str: str | int}, "text_clean": str}


@dataclass(frozen=True)
class SavedEncoder:
    """What `encoder.json` in `folder` says: which encoder of the registry, which model, with which options."""

    folder: Path
    encoder: str
    model: str
    options: Mapping[str, str | int]
    text_clean: str

    def model_for(self, given: str | None) -> str:
        """The saved model. Raises `UsageError` if another one is given."""
        self._check("model", self.model, self.model if given is None else given)
        return self.model

    def options_with(self, given: Mapping[str, str | int]) -> dict[str, str | int]:
        """The saved options, with those that are `given`. Raises `UsageError` where these differ."""
        for key, value in given.items():
            self._check(key, self.options.get(key, value), value)
        return {**self.options, **given}

    def _check(self, key: str, saved: str | int, given: str | int) -> None:
        if saved != given:
            raise UsageError(f"{self.folder} holds an encoder of `{key}` {saved}, not {given}; leave out `{key}`")


def save_encoder(encoder: Encoder, folder: Path) -> str:
    """Save a trainable encoder with its present weights as `folder`; returns their sha256.

    `load_encoder(name, weights=folder)` gives the same identity, but for `weights_sha256`, and the same features.
    Raises `UsageError` for a folder that isn't empty or can't be written and an encoder without anything to save.
    """
    name = encoder.identity["encoder"]
    if encoder.save is None:
        raise UsageError(f"encoder {name} has no trained weights to save; load one that learns, with `trainable`")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already, and isn't an empty folder; save the encoder elsewhere")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        encoder.save(folder)
    except (OSError, SafetensorError) as error:
        raise cant_write(folder, error) from None
    digest = sha256_of(folder)
    record = {
        "format_version": FORMAT_VERSION,
        "encoder": name,
        "model": encoder.identity["model"],
        "options": encoder.options,
        "text_clean": encoder.text_clean,
        "identity": {**encoder.identity, "weights_sha256": digest},
    }
    write_json(folder / RECORD, record)
    return digest


def find_saved(path: Path, name: str) -> Path | None:
    """The folder of the saved encoder `name`: `path` itself, or the one in a finetuned run `path`, which has
    `encoders/<cache>/` for each of its encoders. None where `path` is something else.

    Raises `UsageError` when `path` has saved encoders, but none of this name or several.
    """
    folders = [path] if (path / RECORD).is_file() else [file.parent for file in path.glob(f"encoders/*/{RECORD}")]
    if not folders:
        return None
    kinds = {folder: read_saved(folder).encoder for folder in sorted(folders)}
    fitting = [folder for folder, kind in kinds.items() if kind == name]
    if not fitting:
        raise UsageError(f"{path} holds no encoder {name}, but {', '.join(kinds.values())}; give weights of {name}")
    if len(fitting) > 1:
        raise UsageError(f"{path} holds {len(fitting)} encoders {name}; name one: {', '.join(map(str, fitting))}")
    return fitting[0]


def read_saved(folder: Path) -> SavedEncoder:
    """What `save_encoder` wrote into `folder` beside the weights. Raises `UsageError` for anything else."""
    path = folder / RECORD
    record = read_json(path, "save the encoder again", SHAPE)
    if (version := record["format_version"]) != FORMAT_VERSION:
        raise UsageError(f"{path} has format version {version}, expected {FORMAT_VERSION}; save the encoder again")
    return SavedEncoder(folder, record["encoder"], record["model"], record["options"], record["text_clean"])
