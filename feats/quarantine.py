"""Why rows are in quarantine: a CSV beside the cache."""

import os
from collections.abc import Mapping
from pathlib import Path

from feats.csv_files import parse_csv, write_rows
from feats.writing import appearing


def quarantine_path(path: Path) -> Path:
    """Where the reasons of the rows in quarantine lie, for the cache at `path`."""
    return path.with_name(f"{path.stem}.quarantine.csv")


def read_reasons(path: Path) -> dict[str, str]:
    """Id -> why it is in quarantine, of the file at `path`; nothing where there is none."""
    if not path.is_file():
        return {}
    rows = parse_csv(path.read_bytes().decode(errors="replace"))  # whoever edited it: only a report
    rows = [row for row in rows if len(row) == 2]
    return {i: reason for i, reason in rows if (i, reason) != ("id", "reason")}


def write_reasons(path: Path, reasons: Mapping[str, str]) -> None:
    """Write the file at `path`, whole; without reasons there is none."""
    if not reasons:
        path.unlink(missing_ok=True)
        return
    with appearing(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        write_rows(file, [["id", "reason"], *reasons.items()])


def add_reasons(path: Path, reasons: Mapping[str, str]) -> None:
    """Write more reasons behind those in the file at `path`. They are on disk when this returns; what a kill or a full
    disk tears is behind all that was there, and for `write_reasons` to replace. Raises `OSError`."""
    with path.open("a", encoding="utf-8", newline="") as file:
        write_rows(file, reasons.items())
        file.flush()
        os.fsync(file.fileno())
