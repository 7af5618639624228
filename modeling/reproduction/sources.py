"""Which caches stand in for the encoders that a study had, and what of that differs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feats.errors import UsageError
from feats.parts import cache_paths, open_cache
from feats.source import SIDES
from modeling.features.joined import FeatureSource
from modeling.finetuning.studies import EncoderChoice
from modeling.heads.registry import head_class
from modeling.reproduction.published import Row

SPLIT = "train"
SUFFIX = f"_{SPLIT}.h5"
# Encoders of one kind: before others, one takes the place of another. Those not named are of a kind of their own.
KINDS = {
    "resnet": "network of pictures",
    "vit": "network of pictures",
    "efficientnet": "network of pictures",
    "roberta": "network of texts",
    "minilm": "network of texts",
}
ITSELF = "pixels"  # the picture, no encoder of it: nothing stands in for it, and it for nothing


@dataclass(frozen=True)
class Cache:
    """A complete cache: which sides it has, of which also tokens, and what made it."""

    name: str
    sides: tuple[str, ...]
    tokens: tuple[str, ...]
    fingerprint: Mapping[str, Any]


def caches_in(folder: Path) -> list[Cache]:
    """The complete caches of training data in a folder, by name. What can't be read is left out."""
    found = []
    for path in cache_paths(folder, SPLIT):
        try:
            with open_cache(path) as store:
                if not store.complete:
                    continue
                sides, tokens = (
                    tuple(side for side in SIDES if f"{side}_{kind}" in store.features) for kind in ("feats", "tokens")
                )
                found.append(Cache(path.name.removesuffix(SUFFIX), sides, tokens, store.fingerprint))
        except UsageError:
            continue
    return found


def source_for(
    row: Row, caches: Sequence[Cache], folder: Path, named: Mapping[str, Sequence[str] | None] = {}
) -> FeatureSource:
    """The caches that a row's head is trained on: of each side it reads those `named`, else `stand_in`.

    Raises `UsageError` when there is none of a side, or none with tokens where the head needs them."""
    chosen: dict[str, tuple[str, ...]] = dict.fromkeys(SIDES, ())
    for side in row.sides:
        names = named.get(side)
        if names is not None:
            chosen[side] = tuple(names)
            continue
        wanted = row.wanted(side)
        assert wanted is not None
        found = stand_in(wanted, side, caches, side in head_class(row.head).tokens)
        if found is None:
            raise UsageError(f"{_lacking(wanted, side, row)}, and there is none in {folder}")
        chosen[side] = (found.name,)
    return FeatureSource(folder, chosen["image"], chosen["text"])


def _lacking(wanted: EncoderChoice, side: str, row: Row) -> str:
    tokens = " made with `tokens`" if side in head_class(row.head).tokens else ""
    what = f"encoder {ITSELF}" if wanted.name == ITSELF else {"image": "pictures", "text": "texts"}[side]
    return f"{row.head} needs a cache of {what}{tokens}"


def stand_in(wanted: EncoderChoice, side: str, caches: Sequence[Cache], tokens: bool = False) -> Cache | None:
    """The cache that comes nearest to a study's encoder: of the same encoder, model and options; of the same encoder
    and model; of the same encoder; of one of the same kind; any other. Of equals the first by name. None when no cache
    has the side (with `tokens`: its tokens), and for pixels when there is none of that encoder."""
    able = [cache for cache in caches if side in (cache.tokens if tokens else cache.sides)]
    able = [cache for cache in able if (cache.fingerprint["encoder"] == ITSELF) == (wanted.name == ITSELF)]
    return min(able, key=lambda cache: (distance(wanted, cache), cache.name), default=None)


def distance(wanted: EncoderChoice, cache: Cache) -> int:
    """How far a cache is from a study's encoder, 0 to 4: see `stand_in`."""
    encoder = cache.fingerprint["encoder"]
    if encoder != wanted.name:
        return 3 if KINDS.get(encoder, encoder) == KINDS.get(wanted.name, wanted.name) else 4
    if not _is_model(cache.fingerprint["model"], wanted.model):
        return 2
    return int(any(cache.fingerprint.get(option) != value for option, value in wanted.options.items()))


def _is_model(found: str, wanted: str | None) -> bool:
    return wanted is None or found == wanted or found.endswith(f"/{wanted}")  # a hub's owner before its name


# -- in words ---------------------------------------------------------------------------------------------------


def differences(row: Row, source: FeatureSource, caches: Mapping[str, Cache]) -> list[str]:
    """What of the encoders differs from the study's, a line for each side that isn't the same."""
    found = []
    for side in row.sides:
        wanted, chosen = row.wanted(side), [caches[name] for name in source.of(side)]
        assert wanted is not None
        if len(chosen) > 1 or distance(wanted, chosen[0]) > 1:
            here = " + ".join(map(_of_cache, chosen))
            found.append(f"{side}: {here} in place of {_of_choice(wanted)}")
        else:
            fingerprint = chosen[0].fingerprint
            found += [
                f"{side}: {option} {fingerprint.get(option)} of {wanted.name} in place of {value}"
                for option, value in wanted.options.items()
                if fingerprint.get(option) != value
            ]
    return found


def _of_cache(cache: Cache) -> str:
    encoder, model = cache.fingerprint["encoder"], cache.fingerprint["model"]
    told = encoder if encoder == model else f"{encoder} {model}"
    return told if cache.name == encoder else f"{told} (cache {cache.name})"


def _of_choice(choice: EncoderChoice) -> str:
    if choice.name == choice.model:
        return choice.name
    options = ", ".join(f"{option} {value}" for option, value in choice.options.items())
    return " ".join(filter(None, [choice.name, choice.model, f"({options})" if options else ""]))
