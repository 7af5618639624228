"""Feature caches joined by id into tensors. No encoder, no picture, no text."""

import math
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import feats
from feats.cache_reader import DONE, PENDING, CacheReader
from feats.errors import UsageError
from feats.names import cache_path, checked_cache
from feats.parts import cache_paths, is_cache, open_cache
from feats.source import SIDES
from feats.strings import Labels, Strings, row_type
from modeling.choices import FEATS
from modeling.features.duplicates import Duplicates, duplicate_groups
from modeling.features.target import Target

DEFAULT_FOLDER = FEATS

BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class FeatureSource:
    """Which caches features are joined from: `<folder>/<name>_<split>.h5` or its parts, for each side the names of
    some.

    `tokens`: whether token features are read. `fingerprints` say what made each cache, `contents` which rows it
    holds (`FeatureStore.content_digest`), `parameters` how many the encoder of each side has (absent where a cache
    doesn't tell); all are filled in when they are read. Raises `UsageError` for a name that leads out of the folder."""

    folder: Path = DEFAULT_FOLDER
    image: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    tokens: bool = False
    fingerprints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)
    contents: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    parameters: Mapping[str, Mapping[str, int]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in self.text:
            checked_cache(name, "ttype")
        for name in (*self.image, *self.fingerprints, *self.contents):
            checked_cache(name, "vtype")

    def path(self, name: str, split: str) -> Path:
        """Where a cache lies. Raises `UsageError` for a name that leads elsewhere."""
        return cache_path(self.folder, name, split)

    def of(self, side: str) -> tuple[str, ...]:
        """The caches of a side, "image" or "text"."""
        return {"image": self.image, "text": self.text}[side]

    @property
    def names(self) -> list[str]:
        """All caches, each once."""
        return list(dict.fromkeys([*self.image, *self.text]))


@dataclass(frozen=True)
class Rows:
    """Rows without their features. `tags` are '' where unknown. `image_hash` and `text_key` (N,) uint64 are equal for
    rows with the same picture file and the same text; 0 where no joined cache knows."""

    ids: Strings
    tags: Labels
    image_hash: np.ndarray
    text_key: np.ndarray

    @classmethod
    def of(cls, ids: Iterable[str], tags: Iterable[str], image_hash: np.ndarray, text_key: np.ndarray) -> "Rows":
        """Rows of any strings."""
        return cls(Strings.of(ids), Labels.of(tags), image_hash, text_key)

    @cached_property
    def labelled(self) -> "Rows":
        """Those with a label."""
        return self.take(np.flatnonzero(self.tags.known))

    @cached_property
    def duplicates(self) -> Duplicates | None:
        """The duplicate group of each row; None where no joined cache knows their contents."""
        if not self.image_hash.any() and not self.text_key.any():
            return None
        return Duplicates(self.ids, duplicate_groups(self.image_hash, self.text_key))

    def take(self, rows: np.ndarray) -> "Rows":
        """Some of the rows, by ascending numbers."""
        if len(rows) == len(self.ids):
            return self
        first, stop = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        some = slice(first, stop) if stop - first == len(rows) else rows
        return Rows(self.ids[some], self.tags[some], self.image_hash[some], self.text_key[some])


@dataclass(frozen=True)
class Ragged:
    """Token features of N texts of different lengths: `values` (ΣL, D), text i in rows offsets[i]:offsets[i + 1]."""

    values: torch.Tensor
    offsets: torch.Tensor  # (N + 1,) int64

    def padded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, L, D) of `rows` (B,) int64, zero behind each text's end, and which are real: mask (B, L)."""
        start, stop = self.offsets[rows], self.offsets[rows + 1]
        longest = int((stop - start).max()) if len(rows) else 0
        place = torch.arange(longest, device=rows.device)
        mask = place < (stop - start)[:, None]
        if not longest:
            return self.values.new_zeros(len(rows), 0, self.values.shape[1]), mask
        index = (start[:, None] + place).clamp(max=len(self.values) - 1)
        return self.values[index].masked_fill(~mask[..., None], 0), mask

    def take(self, rows: torch.Tensor) -> "Ragged":
        """The texts `rows` (M,) int64."""
        rows = rows.to(self.offsets.device)
        lengths = self.offsets.diff()[rows]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        place = torch.arange(int(offsets[-1]), device=rows.device)
        return Ragged(self.values[place + (self.offsets[rows] - offsets[:-1]).repeat_interleave(lengths)], offsets)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Ragged":
        """The same on `device`, the values in `dtype`."""
        return Ragged(self.values.to(device=device, dtype=dtype), self.offsets.to(device=device))


Values = TypeVar("Values", torch.Tensor, Ragged)


@dataclass(frozen=True)
class FeatureSet:
    """N rows that every joined cache has, in the first cache's order.

    The dictionaries are keyed by cache name; one cache may be in `image` and in `text`. Tensors are float16 as cached
    until `to`. `left_out` says of each row that is missing why; `dataset` holds all rows, those included: split it
    rather than `ids`, and every choice of caches over the same data gets the same split.
    """

    split: str
    rows: Rows
    image: dict[str, torch.Tensor]  # (N, Dv)
    text: dict[str, torch.Tensor]  # (N, Dt)
    views: dict[str, torch.Tensor]  # (N, K, Dv), of the image caches that have views
    image_tokens: dict[str, torch.Tensor]  # (N, P, Dv')
    text_tokens: dict[str, Ragged]
    source: FeatureSource
    left_out: dict[str, str]
    dataset: Rows = field(repr=False)
    told_by: tuple[str, ...] = ()  # other caches that told which pictures and texts are the same
    target: Target | None = field(default=None, repr=False)  # whose labels these are, None: the caches'
    corrections: Mapping[str, str] = field(default_factory=dict, repr=False)  # labels that `corrected` changed, by id

    def __len__(self) -> int:
        return len(self.rows.ids)

    @property
    def ids(self) -> Strings:
        """Of the N rows, in their order."""
        return self.rows.ids

    @property
    def tags(self) -> Labels:
        """The label of each row, '' where unknown."""
        return self.rows.tags

    @property
    def image_hash(self) -> np.ndarray:
        """(N,) uint64, see `Rows`."""
        return self.rows.image_hash

    @property
    def text_key(self) -> np.ndarray:
        """(N,) uint64, see `Rows`."""
        return self.rows.text_key

    @property
    def widths(self) -> dict[str, dict[str, int]]:
        """{"image": {cache: Dv}, "text": {cache: Dt}}."""
        return {side: {name: x.shape[1] for name, x in getattr(self, side).items()} for side in SIDES}

    def positions(self, ids: Sequence[str]) -> torch.Tensor:
        """Row numbers of `ids`, (len(ids),) int64. Raises `UsageError` naming those that aren't here, and why."""
        rows = self.ids.positions(ids)
        if (rows < 0).any():
            absent = [ids[k] for k in np.flatnonzero(rows < 0).tolist()]
            why = next((f"; {i} was left out ({self.left_out[i]})" for i in absent if i in self.left_out), "")
            raise UsageError(f"{_few(absent)} not among the {len(self)} {self.split} rows{why}")
        return torch.from_numpy(rows)

    def tags_of(self, ids: Sequence[str]) -> Labels:
        """The labels of `ids`, '' where unknown. Raises as `positions`."""
        return self.tags[self.positions(ids).numpy()]

    def labelled(self, ids: Sequence[str] | None = None) -> tuple[Strings, Labels]:
        """Those of `ids` (of all rows without) that have a label, and their labels. Raises `UsageError` if none has."""
        rows = np.arange(len(self)) if ids is None else self.positions(ids).numpy()
        kept = rows[self.tags.known[rows]]
        if not len(kept):
            raise UsageError(f"none of the {len(rows)} rows has a label; there is nothing to compare with")
        return self.ids[kept], self.tags[kept]

    def corrected(self, labels: Mapping[str, str]) -> "FeatureSet":
        """The same rows with other `labels`, by id, beside those that were corrected before. `dataset` keeps the
        caches' labels, and with them every split stays as it was."""
        corrections = {**self.corrections, **labels}
        rows = self.ids.positions(list(corrections))
        here = rows >= 0  # the others may be in quarantine
        changed = [label for label, there in zip(corrections.values(), here, strict=True) if there]
        tags = self.tags.with_changes(rows[here], changed)
        return replace(self, rows=replace(self.rows, tags=tags), corrections=corrections)

    def with_target(self, target: Target) -> "FeatureSet":
        """The same rows with the labels of another target, '' where it has none; in `dataset`, too: what is split is
        split by these."""
        rows = replace(self.rows, tags=target.tags(self.split, self.ids))
        dataset = replace(self.dataset, tags=target.tags(self.split, self.dataset.ids))
        return replace(self, rows=rows, dataset=dataset, target=target)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "FeatureSet":
        """The same rows with every tensor on `device`, the features in `dtype`."""
        return self.with_tensors(lambda x: x.to(device=device, dtype=dtype), lambda x: x.to(device, dtype))

    def with_tensors(
        self, dense: Callable[[torch.Tensor], torch.Tensor], ragged: Callable[[Ragged], Ragged]
    ) -> "FeatureSet":
        """The same caches with what two functions make of each tensor and of each text's tokens."""

        def of(tensors: dict[str, Values], change: Callable[[Values], Values]) -> dict[str, Values]:
            return {name: change(x) for name, x in tensors.items()}

        return replace(
            self,
            image=of(self.image, dense),
            text=of(self.text, dense),
            views=of(self.views, dense),
            image_tokens=of(self.image_tokens, dense),
            text_tokens=of(self.text_tokens, ragged),
        )

    def only(self, caches: Mapping[str, Collection[str]]) -> "FeatureSet":
        """Without some tensors: `caches` names those to keep of image, text, views, image_tokens or text_tokens; what
        it doesn't mention stays as it is."""

        def of(kind: str, tensors: dict[str, Values]) -> dict[str, Values]:
            return {name: x for name, x in tensors.items() if name in caches.get(kind, tensors)}

        return replace(
            self,
            image=of("image", self.image),
            text=of("text", self.text),
            views=of("views", self.views),
            image_tokens=of("image_tokens", self.image_tokens),
            text_tokens=of("text_tokens", self.text_tokens),
        )

    def require_tokens(self, side: str) -> None:
        """Raise `UsageError` when no cache of `side` ("image" or "text") holds token features."""
        if not getattr(self, f"{side}_tokens"):
            if not self.source.tokens:
                raise UsageError(
                    f"this head needs {side} tokens, and none were loaded; load the features with `tokens`"
                )
            names = ", ".join(getattr(self, side)) or "none"
            raise UsageError(
                f"this head needs {side} tokens, and no {side} cache has them (there: {names}); make one with "
                "`tokens`, e.g. python feats/clip_extract_feats.py `tokens` `name` clip_tokens"
            )

    def summary(self) -> str:
        """One line: rows, what was joined, and who was left out."""
        joined = [f"{side} {name} {width}" for side, widths in self.widths.items() for name, width in widths.items()]
        line = f"{self.split}: {len(self)} rows ({', '.join(joined)})"
        if self.left_out:
            some = "; ".join(f"{i} ({why})" for i, why in list(self.left_out.items())[:5])
            line += f"; left out {len(self.left_out)}: {some}{'; ...' if len(self.left_out) > 5 else ''}"
        return line


# -- loading ----------------------------------------------------------------------------------------------------


def load_features(
    folder: Path | str = DEFAULT_FOLDER,
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


def source_of(
    folder: Path | str, image: str | Sequence[str] = (), text: str | Sequence[str] = (), tokens: bool = False
) -> FeatureSource:
    """Caches by name: one, or some of each side."""
    of_image, of_text = ((names,) if isinstance(names, str) else tuple(names) for names in (image, text))
    return FeatureSource(Path(folder), of_image, of_text, tokens)


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


def content_digests(folder: Path | str, split: str, names: Iterable[str]) -> dict[str, str]:
    """`FeatureStore.content_digest` of the caches `<folder>/<name>_<split>.h5`, by name. Raises `UsageError` for those
    that are missing or damaged."""
    digests = {}
    for name in names:
        with open_cache(_path(FeatureSource(Path(folder), (), ()), split, name)) as store:
            digests[name] = store.content_digest()
    return digests


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
                f"({_few([self.dataset.ids[row] for row in rows])}); see python feats/inspect_feats.py `verify`, and "
                "make the cache again with `overwrite`"
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
            caches[name] = stack.enter_context(open_cache(_path(source, split, name)))
            pending = int((caches[name].status == PENDING).sum())
            if pending or not caches[name].complete:
                raise UsageError(
                    f"{caches[name].path} is incomplete: {pending} of {len(caches[name])} rows are still to be "
                    f"encoded; finish it with the command that made it, e.g. {_command(name, folder, split)}"
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


def _path(source: FeatureSource, split: str, name: str) -> Path:
    folder = source.folder
    path = cache_path(folder, name, split)
    if is_cache(path):
        return path
    there = [file.stem for file in cache_paths(folder)]
    names = [stem.removesuffix(f"_{split}") for stem in there if stem.endswith(f"_{split}")]
    close = get_close_matches(name, names, 1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"no cache {path}; make it with: {_command(name, folder, split)} (caches there: {', '.join(there) or 'none'})."
        f"{hint}{_other_parts(name, split, there)}{_with_those_there(source, split)}"
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
        able = kept or _able(side, source.folder, split)
        if able:
            first[side] = " ".join(able if kept else able[:1])
    chosen = " ".join(f"`{side}` {names}" for side, names in first.items())
    return f" Or take what is there: {chosen}" if chosen else ""


def _command(name: str, folder: Path, split: str) -> str:
    """What a user types to make the cache `name` of a split: with the encoder and options of its training cache where
    there is one, and the data of it, or of any other cache of the folder, where they say."""
    trained = folder / f"{name}_train.h5"
    encoder, options = _made_by(trained) or (name, {})
    known = (Path(feats.__file__).parent / f"{encoder}_extract_feats.py").is_file()
    words = [f"python feats/{encoder if known else '<encoder>'}_extract_feats.py"]
    data = _data_of([trained, *cache_paths(folder)])
    words += [f"`data` {shlex.quote(data)}"] if data else []
    words += [] if split == "train" else [f"`splits` {split}"]
    words += [f"`{key}` {shlex.quote(str(value))}" for key, value in options.items()]
    words += [] if encoder == name and known else [f"`name` {name}"]
    words += [] if folder == DEFAULT_FOLDER else [f"`out` {shlex.quote(str(folder))}"]
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


def _data_of(paths: Iterable[Path]) -> str | None:
    """The data folder or file that the first of the caches which tells it was made of: as it was given, where that is
    still so."""
    for path in filter(is_cache, paths):
        try:
            with open_cache(path) as store:
                source = store.source
        except UsageError:  # a foreign or damaged file has nothing to tell
            continue
        if source is not None:
            return source.data if Path(source.data).exists() else source.resolved
    return None


def _able(side: str, folder: Path, split: str) -> list[str]:
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


def _check_side(store: CacheReader, name: str, side: str, folder: Path, split: str) -> None:
    dataset = f"{side}_feats"
    if dataset in store.features:
        return
    [other] = set(SIDES) - {side}
    able = _able(side, folder, split)
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
            parts = [f"only in {cache}: {_few(some)}" for cache, some in ((first_name, lacking), (name, extra)) if some]
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
                    f"{caches[owner].path.name} and {store.path.name} were made from different {what}: {_few(ids)} "
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


def _few(ids: Sequence[str]) -> str:
    return f"{len(ids)} row{'s' if len(ids) > 1 else ''}: {', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''}"
