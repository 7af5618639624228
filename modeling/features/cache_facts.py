"""What caches tell without their features being read."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from feats.names import cache_path
from feats.parts import is_cache, open_cache
from feats.source import SIDES
from modeling.features.joined import FeatureSource
from modeling.features.missing import present_path


def float32_bytes(source: FeatureSource, split: str) -> int:
    """What the features of the caches take as heads read them, views included, and tokens where `source` reads them;
    of texts' tokens as many as the cache tells. Without caches that aren't there."""
    values = 0
    for path in (source.path(name, split) for name in source.names):
        if not is_cache(path):
            continue
        with open_cache(path) as store:
            for name, shape in store.features.items():
                if name.removesuffix("_tokens") == name or source.tokens:
                    rows = int(store.facts("n_tokens").sum()) if name == "text_tokens" else len(store)
                    values += rows * math.prod(shape)
    return 4 * values


def caches_with(side: str, folder: Path, split: str, names: Sequence[str]) -> list[str]:
    """Those of the caches that have a side. One that isn't there is left out: loading it says what is missing."""
    found = []
    for name in names:
        path = cache_path(folder, name, split)
        if is_cache(path):
            with open_cache(path) as store:
                found += [name] if f"{side}_feats" in store.features else []
    return found


def cached_widths(source: FeatureSource, split: str) -> dict[str, int]:
    """The widths of what the caches hold, tokens included, as `modeling.heads.base.Head` takes them. Without the tokens
    of a side of which several caches have some, and without caches that aren't there."""
    widths: dict[str, int] = {}
    for side in SIDES:
        shapes = []
        for path in (source.path(name, split) for name in source.of(side)):
            if is_cache(path):
                with open_cache(path) as store:
                    shapes.append(store.features)
        vectors = [shape[f"{side}_feats"][0] for shape in shapes if f"{side}_feats" in shape]
        tokens = [shape[f"{side}_tokens"] for shape in shapes if f"{side}_tokens" in shape]
        widths |= {side: sum(vectors)} if vectors else {}
        if len(tokens) == 1:
            widths[f"{side}_tokens"] = tokens[0][-1]
            widths |= {"image_positions": tokens[0][0]} if side == "image" else {}
    return widths


def are_complete(folder: Path, split: str, names: Iterable[str]) -> bool:
    """Whether the caches `<folder>/<name>_<split>.h5` are all there, every row of them done or in quarantine."""
    for path in (cache_path(folder, name, split) for name in names):
        if not is_cache(path):
            return False
        with open_cache(path) as store:
            if not store.complete:
                return False
    return True


def content_digests(folder: Path | str, split: str, names: Iterable[str]) -> dict[str, str]:
    """`FeatureStore.content_digest` of the caches `<folder>/<name>_<split>.h5`, by name. Raises `UsageError` for those
    that are missing or damaged."""
    digests = {}
    for name in names:
        with open_cache(present_path(FeatureSource(Path(folder), (), ()), split, name)) as store:
            digests[name] = store.content_digest()
    return digests
