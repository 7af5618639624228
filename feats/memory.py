"""How much memory a process may still take: the machine's, and that of the control groups it runs in."""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def available_bytes(root: Path = ROOT) -> int | None:
    """The least of what the kernel says is available (MemAvailable) and what each control group around this process
    leaves, versions 1 and 2 (https://docs.kernel.org/admin-guide/cgroup-v2.html, "Memory"). A group's inactive page
    cache counts as free, as in MemAvailable. On systems without /proc the machine's memory; None where nothing tells.

    `root`: where proc and sys lie."""
    found = [*_of_machine(root), *_of_groups(root)]
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return min(found, default=None)


def _of_machine(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])


def _of_groups(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, used, inactive = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, inactive = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        # In a container the path may be the host's, and what is mounted the container's own group.
        for folder in dict.fromkeys([*(f for f in (group, *group.parents) if f.is_relative_to(top)), top]):
            most, taken = _number(folder / limit), _number(folder / used)
            if most is not None and taken is not None:
                yield max(0, most - taken + _statistic(folder / "memory.stat", inactive))


def _statistic(path: Path, name: str) -> int:
    found = [line.split()[1] for line in _text(path).splitlines() if line.startswith(f"{name} ")]
    return int(found[0]) if found else 0


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None  # "max": no limit


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
