"""What a run did to a cache, and how it tells how far it is. Knows no encoder."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from feats.quarantine import quarantine_path

Progress = Callable[[int, int], None]  # rows done so far, rows to do


@dataclass
class Summary:
    """What one run did to one cache. `done` and `quarantined` count the cache's rows, the others this run's."""

    path: Path
    done: int = 0
    quarantined: int = 0
    encoded: int = 0
    truncated: int = 0
    relabelled: int = 0
    encodings: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.done} rows done", f"{self.quarantined} quarantined"]
        if self.truncated:
            parts.append(f"{self.truncated} text{'s' if self.truncated > 1 else ''} truncated")
        if self.encodings:
            parts.append("text encodings " + ", ".join(f"{k} {n}" for k, n in self.encodings.most_common()))
        if self.relabelled:
            parts.append(f"{self.relabelled} labels brought up to date")
        rate = f", {self.encoded / self.seconds:.1f} rows/s" if self.encoded else ""
        parts.append(f"{self.encoded} encoded now in {self.seconds:.1f} s{rate}")
        lines = f"{self.path.stem}: {'; '.join(parts)} -> {self.path}"
        if self.quarantined:
            lines += f" (reasons: {quarantine_path(self.path)})"
        return lines
