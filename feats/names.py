"""Names that become paths: of caches, splits, runs and comparisons. None of them may lead out of its folder."""

import unicodedata
from pathlib import Path

from feats.errors import UsageError

MAX_NAME_BYTES = 180  # file systems hold 255 for a name with all that is written around it: "_<split>.h5", ".lock"


def checked_name(name: str, setting: str) -> str:
    """The name as it is, where it can be that of one file or folder.

    Raises `UsageError`, which calls it `setting`, for none, `.` and `..`, one with a slash, a backslash, a control
    character or a lone surrogate, one that a blank begins or ends, and one of more than `MAX_NAME_BYTES` bytes.
    """
    problem = _problem(name)
    if problem:
        raise UsageError(
            f"`{setting}` {_shown(name)} can't be a file's name ({problem}); give one of letters, digits, - and _"
        )
    return name


def checked_cache(name: str, setting: str) -> str:
    """As `checked_name`, for a cache's name: it may lie in folders of the folder of caches (sub/clip)."""
    for part in name.split("/"):
        if _problem(part):
            raise UsageError(
                f"`{setting}` {_shown(name)} can't be a cache's name ({_problem(part)}); give that of a file in the "
                "folder of caches, without its _<split>.h5, and that folder with `feats`"
            )
    return name


def cache_path(folder: Path, name: str, split: str) -> Path:
    """Where the cache `name` of a split lies: `<folder>/<name>_<split>.h5`. Raises `UsageError` as `checked_cache`."""
    return folder / f"{checked_cache(name, 'name')}_{checked_name(split, 'split')}.h5"


def _problem(name: str) -> str:
    """Why a name can't be a file's, '' where it can."""
    if not name:
        return "it is empty"
    if name in (".", ".."):
        return "it is a folder's own or that above it"
    if "/" in name or "\\" in name:
        return "it holds a slash"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "it holds a control character or a lone surrogate"
    if name != name.strip():
        return "a blank begins or ends it"
    size = len(name.encode())
    return f"it takes {size} bytes, of {MAX_NAME_BYTES} there may be" if size > MAX_NAME_BYTES else ""


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 60 else f"{name[:60]}...")
