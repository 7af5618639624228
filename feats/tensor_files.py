"""Tensors in files that anybody may have written: the one door for safetensors, and for pickled state dicts, of which
nothing but tensors is ever unpickled. Each failure is one line that names the file."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from feats.errors import UsageError, first_line

SUFFIX = ".safetensors"


def read_safetensors(path: Path, remedy: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a file by name. Raises `UsageError`, which ends with `remedy`, for anything else."""
    check_plain(path, remedy)
    try:
        return load_file(path, device=device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - safetensors' own errors, and torch's for types that it lacks
        raise UsageError(f"{path} can't be read as safetensors ({first_line(error)}); {remedy}") from None


def safetensors_metadata(path: Path) -> dict[str, str]:
    """What a file says beside its tensors; nothing for what isn't safetensors."""
    try:
        if not path.is_file():
            return {}
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except Exception:  # noqa: BLE001 - a pickle, or damaged, as whoever reads its tensors finds out
        return {}


def read_pickled(path: Path, remedy: str) -> Any:
    """What torch.save wrote into a file: tensors in plain containers. Raises `UsageError` for all else, and for an
    archive that claims more bytes than it has; no code of a pickle is run."""
    check_plain(path, remedy)
    try:
        claimed = _claimed_bytes(path)
        if claimed > path.stat().st_size:
            raise ValueError(f"an archive of {path.stat().st_size} bytes that unpacks to {claimed}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch itself wouldn't write
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - bytes that are no pickle make the unpickler raise anything
        # torch's own words about what it refuses fill a screen, and advise to run the code in it.
        what = first_line(error) if type(error) is ValueError else type(error).__name__
        raise UsageError(f"{path} can't be read as tensors ({what}); {remedy}") from None


def _claimed_bytes(path: Path) -> int:
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist())


def check_plain(path: Path, remedy: str) -> None:
    """Raise `UsageError` for what isn't a regular file: a pipe would be waited for."""
    try:
        plain = path.is_file()
    except (OSError, ValueError):
        plain = False
    if not plain:
        raise UsageError(f"{path} is no regular file; {remedy}")
