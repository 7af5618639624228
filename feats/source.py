"""Raw pairs: their sides, and where they lay when a cache was made of them."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIDES = ("image", "text")  # of a pair


@dataclass(frozen=True)
class Source:
    """The place of a split's pairs: the data folder or file as it was given and as an absolute path, and in it, row by
    row, their files.

    `images` and `texts` (N,) are relative to `folder`, separated by "/"; a member of a tar is
    "<archive>::<member>", the archive's whole URL where it has one. Empty: there is no such file (a text that stands in
    the manifest), or its name couldn't be written down. Of data at a URL both `data` and `resolved` are it.
    `columns` are those of a table that were named, see `feats.records.read_dataset`.
    """

    data: str
    resolved: str
    layout: str
    split: str
    images: Sequence[str]
    texts: Sequence[str]
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """What the rows' paths are relative to: the data folder, or the folder of the file. Means nothing for data at
        a URL, whose rows tell whole URLs."""
        path = Path(self.resolved)
        return path if path.is_dir() else path.parent


def data_identity(ids: Iterable[str]) -> dict[str, Any]:
    """Which rows a cache is of, for its fingerprint: how many, and the hex sha256 of their ids in order, one a line."""
    digest, rows = hashlib.sha256(), 0
    for rows, name in enumerate(ids, 1):
        digest.update(f"\n{name}".encode() if rows > 1 else name.encode())
    return {"rows": rows, "ids_sha256": digest.hexdigest()}
