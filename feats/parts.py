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

from feats.errors import UsageError, first_line

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

    @classmethod
    def from_json(cls, text: str) -> "PartsPlan":
        """The plan of that text. Raises `ValueError` that says what is wrong for anything else."""
        told = json.loads(text)
        if not isinstance(told, dict) or told.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"it isn't a plan of format {FORMAT_VERSION}")
        kinds = {"fingerprint": dict, "kept": dict, "features": dict, "layout": str, "split": str, "pieces": list}
        if told.keys() != {"format_version", *kinds}:
            raise ValueError(f"it has {', '.join(told)}; expected format_version, {', '.join(kinds)}")
        wrong = [name for name, kind in kinds.items() if not isinstance(told[name], kind)]
        if not isinstance(told["kept"], dict) or not isinstance(told["kept"].get("block_rows"), int):
            wrong.append("kept.block_rows")
        if not wrong and not all(map(_is_shape, told["features"].values())):
            wrong.append("features")
        if not wrong and not all(isinstance(piece, dict) for piece in told["pieces"]):
            wrong.append("pieces")
        if wrong:
            raise ValueError(f"its {wrong[0]} isn't of the right kind")
        return cls(**{name: told[name] for name in kinds})


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(isinstance(size, int) and size > 0 for size in shape)


def plan_path(folder: Path) -> Path:
    """Where the plan lies in a folder of parts."""
    return folder / "plan.json"


def read_plan(folder: Path) -> PartsPlan | None:
    """The plan of a folder of parts; None where there is none yet. Raises `UsageError` for one that is damaged."""
    path = plan_path(folder)
    try:
        return PartsPlan.from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read ({first_line(error)}); remove {folder} and make it again") from None
