"""What to say of a cache that isn't there: what is, and the command that makes it."""

import shlex
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import feats
from feats.errors import UsageError
from feats.names import cache_path
from feats.parts import cache_paths, is_cache, open_cache
from feats.source import SIDES
from modeling.choices import ENCODERS, FEATS
from modeling.features.joined import FeatureSource


def present_path(source: FeatureSource, split: str, name: str) -> Path:
    """Where a cache lies. Raises `UsageError` where it isn't there, with what to type."""
    folder = source.folder
    path = cache_path(folder, name, split)
    if is_cache(path):
        return path
    there = [file.stem for file in cache_paths(folder)]
    names = [stem.removesuffix(f"_{split}") for stem in there if stem.endswith(f"_{split}")]
    close = get_close_matches(name, names, 1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"no cache {path}; make it with: {command_for(name, folder, split)} (caches there: "
        f"{', '.join(there) or 'none'}).{hint}{_other_parts(name, split, there)}{_with_those_there(source, split)}"
    )


def _other_parts(name: str, split: str, there: Sequence[str]) -> str:
    """What helps where the data themselves have no such split, which its caches can't tell for sure."""
    parts = [stem.removeprefix(f"{name}_") for stem in there if stem.startswith(f"{name}_")]
    parts = [part for part in parts if "_" not in part]  # `clip_large_train` is another encoder's
    if not parts:
        return ""
    remedy = (
        "call the rows to train on so: shards train-000.tar, a folder train, train in a table's column split"
        if split == "train"
        else f"`split` {parts[0]} takes what is there"
    )
    return f" Where the data have no {split}, only {', '.join(parts)}: {remedy}."


def _with_those_there(source: FeatureSource, split: str) -> str:
    """The sides as they can be chosen from the caches of a training folder; none for another split, whose caches the
    run decides."""
    if split != "train":
        return ""
    first: dict[str, str] = {}
    for side in SIDES:
        kept = [name for name in source.of(side) if is_cache(source.folder / f"{name}_{split}.h5")]
        able = kept or caches_of_side(side, source.folder, split)
        if able:
            first[side] = " ".join(able if kept else able[:1])
    chosen = " ".join(f"`{side}` {names}" for side, names in first.items())
    return f" Or take what is there: {chosen}" if chosen else ""


def command_for(name: str, folder: Path, split: str) -> str:
    """What a user types to make the cache `name` of a split: with the encoder and options of its training cache where
    there is one, and the data of it, or of any other cache of the folder, where they say."""
    if (folder.parent / ENCODERS).is_dir():  # a finetuned run's own
        return f"python modeling/inference_head.py `run` {shlex.quote(str(folder.parent))} `split` {split}"
    trained = folder / f"{name}_train.h5"
    encoder, options = _made_by(trained) or (name, {})
    known = (Path(feats.__file__).parent / f"{encoder}_extract_feats.py").is_file()
    words = [f"python feats/{encoder if known else '<encoder>'}_extract_feats.py"]
    words += _data_of([trained, *cache_paths(folder)])
    words += [] if split == "train" else [f"`splits` {split}"]
    words += [f"`{key}` {shlex.quote(str(value))}" for key, value in options.items()]
    words += [] if encoder == name and known else [f"`name` {name}"]
    words += [] if folder == FEATS else [f"`out` {shlex.quote(str(folder))}"]
    return " ".join(words)


def _made_by(path: Path) -> tuple[str, dict[str, Any]] | None:
    """The encoder and options of a cache; None where it isn't there or can't tell."""
    from modeling.features.made_by import encoder_and_options  # the encoders' registry: of use to a refusal only

    if not is_cache(path):
        return None
    try:
        with open_cache(path) as store:
            return encoder_and_options(store.fingerprint)
    except UsageError:  # a foreign or damaged file has nothing to tell
        return None


def _data_of(paths: Iterable[Path]) -> list[str]:
    """The data folder or file that the first of the caches which tells it was made of, as one types it: as it was
    given, where that is still so, with the columns that were named."""
    for path in filter(is_cache, paths):
        try:
            with open_cache(path) as store:
                source = store.source
        except UsageError:  # a foreign or damaged file has nothing to tell
            continue
        if source is not None:
            place = source.data if Path(source.data).exists() else source.resolved
            columns = [shlex.quote(f"{role}={column}") for role, column in source.columns.items()]
            return [f"`data` {shlex.quote(place)}", *(["`columns`", *columns] if columns else [])]
    return []


def caches_of_side(side: str, folder: Path, split: str) -> list[str]:
    """The caches of a split that have a side."""
    able = []
    for path in cache_paths(folder, split):
        try:
            with open_cache(path) as candidate:
                if f"{side}_feats" in candidate.features:
                    able.append(path.stem.removesuffix(f"_{split}"))
        except UsageError:  # a foreign file is nothing to recommend
            continue
    return able
