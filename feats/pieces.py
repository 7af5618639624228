"""A split's pairs piece by piece: what several processes share out, and what needn't be in memory as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from feats.records import Pairs
from feats.source import data_identity


class Pieces(Protocol):
    """The pairs of one split, cut the same way by whoever cuts them. The pieces in order are the split."""

    @property
    def layout(self) -> str:
        """As `Pairs.layout`."""
        ...

    @property
    def split(self) -> str:
        """As `Pairs.split`."""
        ...

    def __len__(self) -> int:
        """How many pieces there are."""
        ...

    def describe(self, number: int) -> Mapping[str, Any]:
        """Which rows a piece holds and where they lie, as JSON values: equal for all who share the work."""
        ...

    def read(self, number: int) -> Pairs:
        """The pairs of a piece. Raises as `feats.records.read_dataset`."""
        ...


@dataclass(frozen=True)
class RowPieces:
    """Pieces of `rows` pairs each, of pairs that are in memory; the last may be shorter."""

    pairs: Pairs
    rows: int

    @property
    def layout(self) -> str:
        """As `Pairs.layout`."""
        return self.pairs.layout

    @property
    def split(self) -> str:
        """As `Pairs.split`."""
        return self.pairs.split

    def __len__(self) -> int:
        return -(-len(self.pairs) // self.rows)

    def describe(self, number: int) -> Mapping[str, Any]:
        """The first row, how many, and which."""
        return {"first": number * self.rows, **data_identity(record.id for record in self.read(number))}

    def read(self, number: int) -> Pairs:
        """The pairs of a piece."""
        return self.pairs[number * self.rows : (number + 1) * self.rows]
