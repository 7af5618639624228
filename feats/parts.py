"""A cache in parts: what several processes have made of a split, each of them a cache of some rows.

Beside the place of the joined cache, `<name>_<split>.h5`, lies the folder `<name>_<split>.parts/` with `plan.json`,
what all workers agree on, and one `part-<number>.h5` for each piece of the split, complete and readable alone. A part
appears under its name only when it is whole.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


def parts_folder(path: Path) -> Path:
    """Where the parts of the cache at `path` lie."""
    return path.with_suffix(".parts")


def part_path(folder: Path, number: int) -> Path:
    """Where part `number` lies in a folder of parts."""
    return folder / f"part-{number:08d}.h5"


@dataclass(frozen=True)
class PartsPlan:
    """What all who make parts of one cache agree on.

    `fingerprint` is the features' without its "data", which each part and the joined cache have of their own rows;
    `kept` as `feats.extraction.plan.Plan.kept`; `features` maps datasets to the shape of one row; `pieces` describe
    the rows of each part (`feats.pieces.Pieces.describe`).
    """

    fingerprint: Mapping[str, Any]
    kept: Mapping[str, Any]
    features: Mapping[str, Sequence[int]]
    layout: str
    split: str
    pieces: Sequence[Mapping[str, Any]]

    def to_json(self) -> str:
        """As `plan.json` holds it."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1)
