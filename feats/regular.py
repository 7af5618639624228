"""What is read whole must have an end: named pipes and devices block for ever, or never stop."""

import errno
import stat
from pathlib import Path


def check_regular(path: Path) -> None:
    """Raise `OSError` for what is no regular file, nor a link to one; of folders, opening them says it."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
