"""Feature caches joined by id: all rows at once, in blocks, or as they are asked for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from feats.cache_reader import DONE, PENDING, CacheReader
from feats.errors import UsageError
from feats.parts import cache_paths, open_cache
from feats.source import SIDES
from feats.strings import Labels, Strings, row_type
from modeling.choices import FEATS
from modeling.features.joined import FeatureSet, FeatureSource, Ragged, Rows, few_rows, source_of
from modeling.features.missing import caches_of_side, command_for, present_path

BLOCK_ROWS = 1 << 16


def load_features(
    folder: Path | str = FEATS,
    split: str = "train",
    image: str | Sequence[str] = (),
    text: str | Sequence[str] = (),
    *,
    views: bool = True,
    tokens: bool = False,
) -> FeatureSet:
    """Join the caches `<folder>/<name>_<split>.h5` by id: names `image` give the image side, `text` the text side.

    `views` also reads augmented views where a cache has them, `tokens` token features. Memory beyond the result is
    one chunk. Rows in quarantine in any cache are left out.
    Raises `UsageError` for a missing or incomplete cache, one without the asked side, caches of different data (other
    ids, texts, pictures or labels), values that aren't finite, and no row in common.
    """
    with _join(source_of(folder, image, text, tokens), split) as join:
        contents = {name: store.content_digest() for name, store in join.caches.items()}
        data = join.read(join.kept, views)
        return _with_known_duplicates(replace(data, source=replace(data.source, contents=contents)))


def iter_features(
    source: FeatureSource, split: str, *, block_rows: int = BLOCK_ROWS, views: bool = False
) -> Iterator[FeatureSet]:
    """`load_features` in blocks of `block_rows` rows, in order, for caches that are larger than memory."""
    with _join(source, split) as join:
        for low in range(0, len(join.kept), block_rows):
            yield join.read(join.kept[low : low + block_rows], views)


class OpenFeatures:
    """What `load_features` gives, its values read by rows while the caches stay open: for caches that are larger than
    memory. Joining is done once. Raises as `load_features`; for values that aren't finite, as they are read.

    `shell` is all but the values: tensors on torch's meta device, which have shapes only."""

    def __init__(self, source: FeatureSource, split: str):
        self.source, self._stack = source, ExitStack()
        self._join = self._stack.enter_context(_join(source, split))
        try:
            contents = {name: store.content_digest() for name, store in self._join.caches.items()}
            first = self._join.read(self._join.kept[:1], views=True)
            n = len(self._join.kept)
            shell = first.with_tensors(
                lambda x: _shape_of(x, n), lambda x: Ragged(_shape_of(x.values, 0), _shape_of(x.offsets, n + 1))
            )
            rows = self._join.dataset.take(self._join.kept)
            self.shell = _with_known_duplicates(
                replace(shell, rows=rows, source=replace(shell.source, contents=contents))
            )
        except BaseException:
            self.close()
            raise

    def read(self, rows: np.ndarray, source: FeatureSource | None = None, *, views: bool = False) -> FeatureSet:
        """Ascending `rows` of the shell; only the caches of `source`, where that is given."""
        join = self._join if source is None else replace(self._join, source=source)
        return join.read(join.kept[rows], views)

    def close(self) -> None:
        """Close the caches; more than once does no harm."""
        self._stack.close()


def _shape_of(x: torch.Tensor, n: int) -> torch.Tensor:
    return x.new_empty((n, *x.shape[1:]), device="meta")


def _with_known_duplicates(features: FeatureSet) -> FeatureSet:
    """The same features, their `dataset` with what other caches in their folder know of its pictures and texts.

    A text cache alone can't tell which pictures are the same: its split would be another than that of both sides. Only
    complete caches of the same rows are asked, none that contradicts what is known.
    """
    known = {"image_hash": features.dataset.image_hash, "text_key": features.dataset.text_key}
    told_by = []
    for path in cache_paths(features.source.folder, features.split):
        if all(values.all() for values in known.values()):
            break
        try:
            with open_cache(path) as store:
                if not store.complete or Strings.of(store.ids) != features.dataset.ids:
                    continue
                tags, others = Labels.of(store.tags), {fact: store.facts(fact) for fact in known}
        except UsageError:  # a foreign or damaged file has nothing to tell
            continue
        if differing_labels(tags, features.dataset.tags).any() or any(
            ((known[f] != others[f]) & (known[f] != 0) & (others[f] != 0)).any() for f in known
        ):
            continue
        if any(((known[f] == 0) & (others[f] != 0)).any() for f in known):
            told_by.append(path.name)
            known = {fact: np.where(values == 0, others[fact], values) for fact, values in known.items()}
    dataset = replace(features.dataset, image_hash=known["image_hash"], text_key=known["text_key"])
    return replace(features, dataset=dataset, told_by=tuple(told_by))


@dataclass(frozen=True)
class _Join:
    split: str
    source: FeatureSource
    caches: dict[str, CacheReader]
    dataset: Rows
    order: dict[str, np.ndarray]  # per cache, where the rows of `dataset` are
    kept: np.ndarray  # rows of `dataset` that all caches have, ascending
    left_out: dict[str, str]

    def read(self, rows: np.ndarray, views: bool) -> FeatureSet:
        """Some of the rows `kept`, of every cache."""
        image, text, tokens = self.source.image, self.source.text, self.source.tokens
        fingerprints = {n: store.fingerprint for n, store in self.caches.items()}
        parameters = {n: counted for n, store in self.caches.items() if (counted := store.parameters) is not None}
        return FeatureSet(
            split=self.split,
            rows=self.dataset.take(rows),
            image={n: self._read(n, "image_feats", rows) for n in image},
            text={n: self._read(n, "text_feats", rows) for n in text},
            views={n: self._read(n, "image_views", rows) for n in image if views and self._has(n, "image_views")},
            image_tokens={
                n: self._read(n, "image_tokens", rows) for n in image if tokens and self._has(n, "image_tokens")
            },
            text_tokens={n: self._read_tokens(n, rows) for n in text if tokens and self._has(n, "text_tokens")},
            source=replace(self.source, fingerprints=fingerprints, parameters=parameters),
            left_out=self.left_out,
            dataset=self.dataset,
        )

    def _has(self, name: str, dataset: str) -> bool:
        return dataset in self.caches[name].features

    def _read(self, name: str, dataset: str, rows: np.ndarray) -> torch.Tensor:
        values = self.caches[name].read_rows(dataset, self.order[name][rows])
        self._refuse(name, dataset, rows[_not_finite(values)])
        return torch.from_numpy(values)

    def _read_tokens(self, name: str, rows: np.ndarray) -> Ragged:
        values, offsets = self.caches[name].read_token_rows(self.order[name][rows])
        texts = np.unique(np.searchsorted(offsets, _not_finite(values), "right") - 1)
        self._refuse(name, "text_tokens", rows[texts])
        return Ragged(torch.from_numpy(values), torch.from_numpy(offsets))

    def _refuse(self, name: str, dataset: str, rows: np.ndarray) -> None:
        if len(rows):
            raise UsageError(
                f"{self.caches[name].path}: {dataset} holds NaN or infinite values "
                f"({few_rows([self.dataset.ids[row] for row in rows])}); see python feats/inspect_feats.py `verify`, "
                "and make the cache again with `overwrite`"
            )


@contextmanager
def _join(source: FeatureSource, split: str) -> Iterator[_Join]:
    folder = source.folder
    if not source.names:
        raise UsageError("no cache was named; give `image`, `text` or both")
    for side in SIDES:
        names = source.of(side)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"`{side}` names {', '.join(twice)} twice; once is enough")
    with ExitStack() as stack:
        caches: dict[str, CacheReader] = {}
        for name in source.names:
            caches[name] = stack.enter_context(open_cache(present_path(source, split, name)))
            pending = int((caches[name].status == PENDING).sum())
            if pending or not caches[name].complete:
                raise UsageError(
                    f"{caches[name].path} is incomplete: {pending} of {len(caches[name])} rows are still to be "
                    f"encoded; finish it with the command that made it, e.g. {command_for(name, folder, split)}"
                )
        for side in SIDES:
            for name in source.of(side):
                _check_side(caches[name], name, side, folder, split)
        order = _common_order(caches)
        statuses = {name: store.status[order[name]] for name, store in caches.items()}
        done = np.all([status == DONE for status in statuses.values()], axis=0)
        kept = np.flatnonzero(done).astype(row_type(len(done)))
        _check_same_content(caches, order, kept)
        first = next(iter(caches.values()))
        ids = Strings.of(first.ids)
        hashes = [_merge_facts(fact, caches, order) for fact in ("image_hash", "text_key")]
        dataset = Rows(ids, _merge_tags(caches, order, ids), *hashes)
        left_out = _reasons(caches, statuses, ids)
        if not len(kept):
            some = "; ".join(f"{i} ({why})" for i, why in list(left_out.items())[:3]) or "the caches are empty"
            raise UsageError(f"no row of the {split} data is in all of {', '.join(caches)}: {some}")
        yield _Join(split, source, caches, dataset, order, kept, left_out)


def _check_side(store: CacheReader, name: str, side: str, folder: Path, split: str) -> None:
    dataset = f"{side}_feats"
    if dataset in store.features:
        return
    [other] = set(SIDES) - {side}
    able = caches_of_side(side, folder, split)
    raise UsageError(
        f"{store.path} has no {side} side; {name} can be `{other}` only. For `{side}` there are: "
        f"{', '.join(able) or 'none yet'}"
    )


def _common_order(caches: Mapping[str, CacheReader]) -> dict[str, np.ndarray]:
    """Per cache, where the rows of the first one are. Every cache must have the same ids, quarantined ones included."""
    (first_name, first), *others = caches.items()
    order = {first_name: np.arange(len(first), dtype=row_type(len(first)))}
    ids = Strings.of(first.ids)
    for name, store in others:
        own = Strings.of(store.ids)
        if ids == own:
            order[name] = order[first_name]
            continue
        order[name] = own.positions(ids).astype(row_type(len(own)))
        lacking = ids[order[name] < 0]
        extra = [] if len(ids) - len(lacking) == len(own) else sorted(own[ids.positions(own) < 0])
        if lacking or extra:
            parts = [
                f"only in {cache}: {few_rows(some)}" for cache, some in ((first_name, lacking), (name, extra)) if some
            ]
            raise UsageError(
                f"{first.path.name} and {store.path.name} are of different data: {len(first)} and {len(store)} rows, "
                f"{len(first) - len(lacking)} in common ({'; '.join(parts)}). Extract both from the same `data`, with "
                "the same `limit`"
            )
    return order


def _check_same_content(caches: Mapping[str, CacheReader], order: Mapping[str, np.ndarray], kept: np.ndarray) -> None:
    """The same id must mean the same picture and text in every cache that knows them."""
    if len(caches) == 1:
        return
    for fact, what in (("image_hash", "pictures"), ("text_hash", "texts")):
        known: np.ndarray | None = None
        owner = ""
        for name, store in caches.items():
            values = store.facts(fact)[order[name]][kept]
            if not values.any():
                continue
            if known is None:
                known, owner = values, name
                continue
            differ = np.flatnonzero((known != values) & (known != 0) & (values != 0))
            if len(differ):
                ids = Strings.of(next(iter(caches.values())).ids)[kept[differ]]
                raise UsageError(
                    f"{caches[owner].path.name} and {store.path.name} were made from different {what}: {few_rows(ids)} "
                    "differ under the same id. Extract both from the same `data` with `overwrite`"
                )


def _merge_tags(caches: Mapping[str, CacheReader], order: Mapping[str, np.ndarray], ids: Sequence[str]) -> Labels:
    """The label of each row: the one any cache knows."""
    (owner, first), *others = caches.items()
    merged = Labels.of(first.tags)[order[owner]]
    for name, store in others:
        tags = Labels.of(store.tags)[order[name]]
        differ = np.flatnonzero(differing_labels(merged, tags))
        if len(differ):
            row = differ[0]
            raise UsageError(
                f"{caches[owner].path.name} and {store.path.name} disagree on the labels of {len(differ)} rows, e.g. "
                f"{ids[row]}: {merged[row]} and {tags[row]}. Run the extraction of both again: it brings labels up to "
                "date"
            )
        names = sorted({*merged.names, *tags.names})
        merged = Labels(np.where(merged.known, merged.numbers_as(names), tags.numbers_as(names)), names)
    return merged


def differing_labels(tags: Labels, others: Labels) -> np.ndarray:
    """(N,) bool: which rows have two labels, neither of them ''."""
    names = sorted({*tags.names, *others.names})
    return np.asarray((others.numbers_as(names) != tags.numbers_as(names)) & tags.known & others.known)


def _merge_facts(fact: str, caches: Mapping[str, CacheReader], order: Mapping[str, np.ndarray]) -> np.ndarray:
    """A fact of each row, (N,): what the first cache that knows it says."""
    (_, first), *others = caches.items()
    merged = first.facts(fact)
    for name, store in others:
        if not merged.all():
            merged = np.where(merged == 0, store.facts(fact)[order[name]], merged)
    return merged


def _reasons(
    caches: Mapping[str, CacheReader], statuses: Mapping[str, np.ndarray], ids: Sequence[str]
) -> dict[str, str]:
    """Why each row is left out, in the data set's order."""
    why: dict[int, list[str]] = {}
    for name, store in caches.items():
        for row in np.flatnonzero(statuses[name] != DONE).tolist():
            why.setdefault(row, []).append(f"{name}: {store.reasons.get(ids[row], 'in quarantine')}")
    return {ids[row]: "; ".join(why[row]) for row in sorted(why)}


def _not_finite(values: np.ndarray) -> np.ndarray:
    """Rows of float16 `values` (N, ...) that hold NaN or infinity: an exponent of all ones.

    By their bits, in pieces: numpy converts half precision one by one, and a mask of it all would take memory."""
    exponent = np.uint16(0x7C00)
    bits = values.view(np.uint16).reshape(len(values), -1)
    bad = [np.zeros(0, np.int64)]
    for low in range(0, len(bits), 4096):
        block = bits[low : low + 4096] & exponent
        if block.size and block.max() == exponent:
            bad.append(low + np.flatnonzero((block == exponent).any(1)))
    return np.concatenate(bad)
