"""What is read whole must have an end: named pipes and devices block for ever, or never stop. Only the pipes that a
shell hands over, `<(...)` and `... |`, have somebody who writes them."""

import errno
import stat
from pathlib import Path

DESCRIPTORS = (Path("/dev/fd"), Path("/proc/self/fd"))
STDIN = Path("/dev/stdin")


def check_regular(path: Path) -> None:
    """Raise `OSError` for what is no regular file, nor a link to one, nor a pipe from the shell; of folders, opening
    them says it."""
    mode = path.stat().st_mode
    if stat.S_ISFIFO(mode) and (path == STDIN or path.parent in DESCRIPTORS):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
