"""Many strings in little memory: ids as fixed-width bytes, labels as numbers of names. Both are sequences of str; a
Python object is made only of what is asked for."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

BLOCK = 1 << 16  # strings that are Python objects at one time


def row_type(n: int) -> type[np.signedinteger[Any]]:
    """The smaller of the usual types that numbers of `n` rows fit into: of ten million rows each takes much of what
    memory there is."""
    return np.int32 if n <= np.iinfo(np.int32).max else np.int64


class Strings(Sequence[str]):
    """N strings as `encoded` (N,) fixed-width UTF-8, as HDF5 has them. A slice, an index array or a mask gives Strings.

    UTF-8 sorts as its characters do, so that whatever needs an order or a look-up works on the bytes.
    """

    def __init__(self, encoded: np.ndarray):
        self.encoded: np.ndarray = encoded.view(f"S{encoded.dtype.itemsize}")  # less what h5py notes in a type

    @classmethod
    def of(cls, values: Iterable[str]) -> "Strings":
        """Strings of any others. Raises `ValueError` for one with a NUL or a lone surrogate, which has no such form."""
        if isinstance(values, Strings):
            return values
        encoded = [str(value).encode() for value in values]
        if any(b"\0" in one for one in encoded):
            raise ValueError("a string holds a NUL; rename it")
        return cls(np.array(encoded, f"S{max(1, *map(len, encoded))}" if encoded else "S1"))

    @classmethod
    def concatenate(cls, parts: Sequence["Strings"]) -> "Strings":
        """All parts, one after the other."""
        return cls(np.concatenate([part.encoded for part in parts])) if parts else cls.of(())

    def __len__(self) -> int:
        return len(self.encoded)

    @overload
    def __getitem__(self, at: int | np.integer[Any]) -> str: ...
    @overload
    def __getitem__(self, at: slice | np.ndarray) -> "Strings": ...
    def __getitem__(self, at: int | np.integer[Any] | slice | np.ndarray) -> "str | Strings":
        found = self.encoded[at]
        return Strings(found) if isinstance(found, np.ndarray) else found.decode()

    def __iter__(self) -> Iterator[str]:
        for low in range(0, len(self), BLOCK):
            for one in self.encoded[low : low + BLOCK].tolist():
                yield one.decode()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.positions([name])[0] >= 0)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strings):
            return np.array_equal(self.encoded, other.encoded)
        return _equal(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Strings({_shown(self)})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.tolist(), dtype or str)

    def tolist(self) -> list[str]:
        """All of them as Python's."""
        return [one.decode() for one in self.encoded.tolist()]

    @cached_property
    def order(self) -> np.ndarray:
        """(N,) of `row_type`: what sorts them; equal ones stay in their order."""
        if self.ascending:
            return np.arange(len(self), dtype=row_type(len(self)))
        return np.argsort(self.encoded, kind="stable").astype(row_type(len(self)))

    @property
    def width(self) -> int:
        """Bytes of the longest."""
        used = np.zeros(self.encoded.dtype.itemsize, bool)
        for low in range(0, len(self), BLOCK):
            block = np.ascontiguousarray(self.encoded[low : low + BLOCK])
            used |= block.view(np.uint8).reshape(len(block), -1).any(0)
        return 1 + int(np.flatnonzero(used).max(initial=-1))

    @property
    def unique(self) -> bool:
        """Whether no two are the same."""
        return self.ascending or not any(
            (self.encoded[rows[1:]] == self.encoded[rows[:-1]]).any()
            for rows in (self.order[low : low + BLOCK + 1] for low in range(0, len(self), BLOCK))
        )

    def repeated(self) -> list[str]:
        """Those that stand there more than once, each once, sorted."""
        if self.unique:
            return []
        ordered = self.encoded[self.order]
        return Strings(np.unique(ordered[1:][ordered[1:] == ordered[:-1]])).tolist()

    def positions(self, names: Sequence[str]) -> np.ndarray:
        """Where each of `names` is, (len(names),) int64; -1 for one that isn't here. Of repeated strings the first."""
        if isinstance(names, Strings):
            asked = names
        else:
            encoded = [str(name).encode(errors="surrogatepass") for name in names]
            # What can't be here must not become what can: numpy drops NULs at the end.
            asked = Strings.of([]) if not encoded else Strings(np.array([b"" if b"\0" in e else e for e in encoded]))
        rows = np.full(len(asked), -1, np.int64)
        if not len(self) or not len(asked):
            return rows
        if len(asked) == len(self) and self.ascending and np.array_equal(asked.encoded, self.encoded):
            return np.arange(len(self))
        # In order: the steps of one search are in the processor's cache for the next.
        asked_order, own_order = (None if one.ascending else one.order for one in (asked, self))
        for low in range(0, len(asked), BLOCK):
            block = slice(low, low + BLOCK) if asked_order is None else asked_order[low : low + BLOCK]
            wanted = asked.encoded[block]
            found = np.searchsorted(self.encoded, wanted, sorter=own_order).clip(max=len(self) - 1)
            found = found if own_order is None else own_order[found]
            rows[block] = np.where(self.encoded[found] == wanted, found, -1)
        if asked is not names:
            rows[[k for k, one in enumerate(encoded) if b"\0" in one]] = -1
        return rows

    @cached_property
    def ascending(self) -> bool:
        """Whether they are sorted and no two the same."""
        return bool((self.encoded[1:] > self.encoded[:-1]).all())


class Labels(Sequence[str]):
    """N labels as `codes` (N,) into `names`, which are sorted and each there once; no row need have one of them."""

    def __init__(self, codes: np.ndarray, names: Sequence[str]):
        self.codes, self.names = codes, tuple(names)

    @classmethod
    def of(cls, values: Iterable[str]) -> "Labels":
        """Labels of any strings."""
        if isinstance(values, Labels):
            return values
        listed = [str(value) for value in values]
        names = sorted(set(listed))
        number = {name: code for code, name in enumerate(names)}
        return cls(np.fromiter((number[value] for value in listed), _code_type(len(names)), len(listed)), names)

    @classmethod
    def of_blocks(cls, blocks: Iterable[np.ndarray]) -> "Labels":
        """Labels of fixed-width UTF-8, (n,) in each block."""
        number: dict[bytes, int] = {}
        found = [np.zeros(0, np.uint8)]
        for block in blocks:
            distinct, codes = np.unique(block, return_inverse=True)
            own = [number.setdefault(one, len(number)) for one in distinct.tolist()]
            found.append(np.array(own, _code_type(len(number)))[codes])
        names = [one.decode() for one in number]
        ordered = sorted(names)
        rank = np.array([ordered.index(name) for name in names], _code_type(len(names)))
        return cls(rank[np.concatenate(found)] if names else found[0], ordered)

    @classmethod
    def concatenate(cls, parts: Sequence["Labels"]) -> "Labels":
        """All parts, one after the other."""
        names = sorted({name for part in parts for name in part.names})
        return cls(np.concatenate([part.numbers_as(names) for part in parts]), names) if parts else cls.of(())

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, at: int | np.integer[Any]) -> str: ...
    @overload
    def __getitem__(self, at: slice | np.ndarray) -> "Labels": ...
    def __getitem__(self, at: int | np.integer[Any] | slice | np.ndarray) -> "str | Labels":
        found = self.codes[at]
        return Labels(found, self.names) if isinstance(found, np.ndarray) else self.names[found]

    def __iter__(self) -> Iterator[str]:
        for low in range(0, len(self), BLOCK):
            for code in self.codes[low : low + BLOCK].tolist():
                yield self.names[code]

    def __contains__(self, name: object) -> bool:
        return name in self.names and bool((self.codes == self.names.index(str(name))).any())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Labels):
            return len(self) == len(other) and np.array_equal(self.codes, other.numbers(self.names))
        return _equal(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Labels({_shown(self)})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(np.array(self.names or [""], dtype or str)[self.codes])

    def tolist(self) -> list[str]:
        """All of them as Python's, one object for each name."""
        return [self.names[code] for code in self.codes.tolist()]

    @property
    def known(self) -> np.ndarray:
        """(N,) bool: which aren't ''."""
        unknown = self.names.index("") if "" in self.names else len(self.names)
        return np.asarray(self.codes != unknown)

    def counts(self) -> dict[str, int]:
        """How many there are of each, of those that there are."""
        blocks = (self.codes[low : low + BLOCK] for low in range(0, len(self), BLOCK))  # each becomes int64 there
        counts = sum(
            (np.bincount(block, minlength=len(self.names)) for block in blocks), np.zeros(len(self.names), int)
        ).tolist()
        return {name: count for name, count in zip(self.names, counts, strict=True) if count}

    def numbers(self, names: Sequence[str]) -> np.ndarray:
        """(N,) int64: the place of each label in `names`, -1 where it isn't there."""
        place = {name: k for k, name in enumerate(names)}
        return np.asarray(np.array([place.get(name, -1) for name in self.names], np.int64)[self.codes])

    def with_changes(self, rows: np.ndarray, labels: Sequence[str]) -> "Labels":
        """The same but for `rows` (R,), which get `labels`."""
        names = sorted({*self.names, *labels})
        codes = self.numbers_as(names)
        codes[rows] = [names.index(label) for label in labels]
        return Labels(codes, names)

    def numbers_as(self, names: Sequence[str]) -> np.ndarray:
        """`codes` into other `names`, which hold all that any row has; of the smallest type that fits."""
        place = {name: k for k, name in enumerate(names)}
        return np.asarray(np.array([place.get(name, 0) for name in self.names], _code_type(len(names)))[self.codes])


def _code_type(names: int) -> np.dtype[Any]:
    return np.min_scalar_type(max(names - 1, 0))


def _equal(ours: Sequence[str], other: object) -> bool:
    if not isinstance(other, Sequence) or isinstance(other, str):
        return False
    return len(ours) == len(other) and not any(a != b for a, b in zip(ours, other, strict=True))


def _shown(strings: Sequence[str]) -> str:
    return f"{[strings[k] for k in range(min(3, len(strings)))]}{', ...' if len(strings) > 3 else ''}, {len(strings)}"
